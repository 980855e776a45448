"""One global batch from the batches of all processes: collectives with their gradients, agreement, shares."""

from hrem_layers.distributed.agreement import agree
from hrem_layers.distributed.collectives import is_distributed, one_random_stream
from hrem_layers.distributed.shares import Shares, gather_embeddings

__all__ = ["Shares", "agree", "gather_embeddings", "is_distributed", "one_random_stream"]
