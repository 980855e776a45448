"""Pair losses: callables ``(similarity, positives) -> scalar`` that HREMLoss applies to its four similarities."""

from hrem_layers.losses.infonce import InfoNCELoss
from hrem_layers.losses.triplet import TripletLoss

__all__ = ["InfoNCELoss", "TripletLoss"]
