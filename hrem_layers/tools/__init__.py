"""Beside the method: what looks at it, moves in from elsewhere, or helps to train with it. Imported only when used."""

from hrem_layers.tools.diagnosis import Diagnosis, Finding, diagnose

__all__ = ["Diagnosis", "Finding", "diagnose"]
