"""Relation modelling among the images and texts of a batch, for image-text retrieval."""

__version__ = "0.1.0"
