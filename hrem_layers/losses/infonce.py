"""The contrastive loss of CLIP-like models, with any number of positives per row."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hrem_layers._core.checks import check_bool, check_choice, check_number
from hrem_layers.losses._pairs import REDUCTIONS, check_pairs

MAX_SCALE = 100.0


class InfoNCELoss(nn.Module):
    r"""Cross-entropy of softmax(s/τ) over rows and over columns, the mean of the two directions.

    .. math::
        \ell(x) = -\frac{1}{|P(x)|} \sum_{y \in P(x)} \log
        \frac{\exp(s(x, y) / \tau)}{\sum_{y'} \exp(s(x, y') / \tau)}

    P(x) are the positives of x. With one positive per row this is CLIP's loss (Radford et al., 2021); with
    several, the average over them outside the logarithm (Khosla et al., 2020, "L_out"). An anchor without
    a positive contributes 0.

    Args:
        temperature: τ > 0; at least 0.01 if learnable.
        learnable: make log(1/τ) a parameter (``log_scale``). 1/τ is held at 100 or less, as CLIP does: a call in
            training mode first sets the parameter back to the limit if it is beyond.
        reduction: ``"mean"`` over the anchors that have a positive, or ``"sum"`` over them; either way half
            the sum of the two directions.
    """

    def __init__(self, temperature: float = 0.07, *, learnable: bool = False, reduction: str = "mean") -> None:
        super().__init__()
        self.learnable = check_bool("learnable", learnable)
        self.temperature = (
            check_number("temperature", temperature, minimum=1 / MAX_SCALE)
            if learnable
            else check_number("temperature", temperature, above=0)
        )
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)
        if learnable:
            self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def extra_repr(self) -> str:
        return f"{self.temperature}, learnable={self.learnable}, reduction={self.reduction!r}"

    def forward(self, similarity: Tensor, positives: Tensor) -> Tensor:
        """
        Args:
            similarity: (N, M) cosines, N images by M texts.
            positives: (N, M) bool, True = the pair belongs together.

        Returns:
            A scalar, float32 or better.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        """
        s = check_pairs(similarity, positives)
        if self.learnable:
            if self.training:
                # CLIP holds the parameter itself: a limit on 1/τ alone would also cut off the gradient that leads back
                with torch.no_grad():
                    self.log_scale.clamp_(max=math.log(MAX_SCALE))
            scale = self.log_scale.to(s.dtype).exp()
            logits = s * (scale if self.training else scale.clamp(max=MAX_SCALE))
        else:
            logits = s / self.temperature
        return (self._one_way(logits, positives) + self._one_way(logits.t(), positives.t())) / 2

    def _one_way(self, logits: Tensor, positives: Tensor) -> Tensor:
        count = positives.sum(dim=1)  # [n]
        log_p = torch.where(positives, logits.log_softmax(dim=1), 0).sum(dim=1)
        total = -(log_p / count.clamp(min=1)).sum()
        return total / (count > 0).sum().clamp(min=1) if self.reduction == "mean" else total
