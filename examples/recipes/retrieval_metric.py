"""R@K as a torchmetrics metric: over all batches of all processes, each caption and each image once."""

from __future__ import annotations

import torch
import torchmetrics
from torch import Tensor

from hrem_layers import retrieval_metrics


class RetrievalMetric(torchmetrics.Metric):
    """Collects embeddings, gathers them from all processes and drops what came twice.

    Samplers that share out a data set repeat items to fill the last batches. Counted twice, a repeated image stands in
    front of its own captions' rivals and a repeated caption is asked twice: figures change without a word.
    """

    full_state_update = False

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        for name in ("images", "texts", "image_ids", "caption_ids"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, image_embedding: Tensor, text_embedding: Tensor, image_ids: Tensor, caption_ids: Tensor) -> None:
        """A batch of pairs: embeddings (N, D) both, the image that each pair shows and its caption's number (N,)."""
        self.images.append(image_embedding.detach().float())
        self.texts.append(text_embedding.detach().float())
        self.image_ids.append(image_ids)
        self.caption_ids.append(caption_ids)

    def compute(self) -> dict[str, Tensor]:
        """The eleven figures of :meth:`hrem_layers.RetrievalMetrics.as_dict`."""
        images, texts, image_ids, caption_ids = (
            torch.cat(x) if isinstance(x, list) else x  # after the exchange between processes they are tensors
            for x in (self.images, self.texts, self.image_ids, self.caption_ids)
        )
        once, captions = _first_of_each(image_ids), _first_of_each(caption_ids)
        metrics = retrieval_metrics(
            images[once], texts[captions], image_ids=image_ids[once], text_ids=image_ids[captions]
        )
        return {name: torch.tensor(value, device=images.device) for name, value in metrics.as_dict().items()}


def _first_of_each(ids: Tensor) -> Tensor:
    """The row at which each id occurs first, by increasing id."""
    order = torch.argsort(ids, stable=True)
    new = torch.ones_like(order, dtype=torch.bool)
    new[1:] = ids[order][1:] != ids[order][:-1]
    return order[new]
