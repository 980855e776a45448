"""Recall at K, median and mean position, rSum and the five-fold protocol of image-text retrieval.

``metrics`` holds the two functions and ``results`` what they return; ``matching`` says which texts describe which
image, ``similarity`` computes cosines exactly, ``positions`` counts the items ahead of each query's best match, and
``screening`` makes that fast.
"""

from hrem_layers.retrieval.metrics import retrieval_metrics, retrieval_metrics_from_similarity
from hrem_layers.retrieval.results import DirectionMetrics, RetrievalMetrics

__all__ = ["DirectionMetrics", "RetrievalMetrics", "retrieval_metrics", "retrieval_metrics_from_similarity"]
