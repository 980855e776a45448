"""Soft targets for InfoNCE: a share of every anchor's target goes to what a teacher without gradient finds alike.

Tried as a use of relations; what it brought stands in docs/results.md.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hrem_layers import HREMLoss
from hrem_layers._core.masked import masked_mean
from hrem_layers._core.numerics import l2_normalize

SHARE, TEACHER_TEMPERATURE = 0.3, 0.1
TEACHERS = {
    "words": "cosines of the captions' mean word vectors, which are frozen",
    "within": "cosines among the images and among the texts, averaged",
    "across": "cosines of images with texts, the model's own answer",
    "relations": "cosines of the enhanced embeddings; no edge between positives, so that no partner leaks in",
}


class SoftTargetLoss(nn.Module):
    """(1 − share)·own pair + share·softmax(teacher/τ_t), cross-entropy over rows and columns, the mean of both.

    With the teacher ``"relations"`` the relation modules learn by L(v̄, ū) and L_reg, as in HREMLoss, and the encoders
    from them through the targets alone.
    """

    def __init__(self, teacher: str, temperature: float, hrem: HREMLoss | None = None) -> None:
        super().__init__()
        if teacher not in TEACHERS or (teacher == "relations") != (hrem is not None):
            raise ValueError(f"teacher: expected one of {', '.join(TEACHERS)}, relations with hrem, got {teacher!r}")
        self.teacher, self.temperature, self.hrem = teacher, temperature, hrem

    def forward(self, v: Tensor, u: Tensor, regions: Tensor, words: Tensor, region_mask: Tensor | None,
                mask: Tensor, owner: Tensor, meanings: Tensor) -> Tensor:  # fmt: skip
        """``meanings`` (M, W, d) are the word vectors; the rest as for :class:`~hrem_layers.HREMLoss`."""
        x, y = l2_normalize(v), l2_normalize(u)
        positives = owner.unsqueeze(1) == owner
        if self.hrem is None:
            return self._cross_entropy(x @ y.t(), positives, *self._teach(x.detach(), y.detach(), mask, meanings))
        detached = v.detach(), u.detach(), regions.detach(), words.detach()
        relations = self.hrem.relate(*detached, region_mask, mask, owner)
        enhanced = relations.image_enhanced @ relations.text_enhanced.t()
        own = self.hrem.pair_loss(enhanced, positives)
        reg = self.hrem.graph.regularization(relations.graph, x.detach(), y.detach())
        taught = enhanced.detach()
        base = self._cross_entropy(x @ y.t(), positives, taught, taught.t())
        return base + self.hrem.enhanced_weight * own + self.hrem.regularization_weight * reg

    def _teach(self, x: Tensor, y: Tensor, mask: Tensor, meanings: Tensor) -> tuple[Tensor, Tensor]:
        """What is alike for image anchors (N, M) and for text anchors (M, N), without gradient."""
        if self.teacher == "across":
            return x @ y.t(), y @ x.t()
        if self.teacher == "within":
            alike = (x @ x.t() + y @ y.t()) / 2
        else:
            z = l2_normalize(masked_mean(meanings, mask))
            alike = z @ z.t()
        return alike, alike

    def _cross_entropy(self, s: Tensor, positives: Tensor, to_text: Tensor, to_image: Tensor) -> Tensor:
        own = positives / positives.sum(dim=1, keepdim=True)
        total = s.new_zeros(())
        for logits, alike in ((s, to_text), (s.t(), to_image)):
            target = (1 - SHARE) * own + SHARE * torch.softmax(alike / TEACHER_TEMPERATURE, dim=1)
            total = total - (target * (logits / self.temperature).log_softmax(dim=1)).sum(dim=1).mean() / 2
        return total
