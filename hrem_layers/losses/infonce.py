"""The contrastive loss of CLIP-like models, with any number of positives per row."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from hrem_layers._core.checks import check_bool, check_choice, check_tensor
from hrem_layers.losses._pairs import REDUCTIONS, check_constant, check_pairs, one_if_finite
from hrem_layers.losses._rows import RowLoss, sum_over_anchors
from hrem_layers.losses._scale import check_shared, check_temperature, clamp_own, log_of_inverse, scale_of, share

MAX_SCALE = 100.0
DEFAULT_TEMPERATURE = 0.07


def info_nce_loss(
    similarity: Tensor, positives: Tensor, *, scale: float | Tensor = 1 / DEFAULT_TEMPERATURE, reduction: str = "mean"
) -> Tensor:
    """What :class:`~hrem_layers.InfoNCELoss` computes, as a function of the scale 1/τ.

    Args:
        similarity: (N, M) cosines.
        positives: (N, M) bool.
        scale: 1/τ, a number above 0 or a 0-dimensional tensor, to which gradient flows.
        reduction: ``"mean"`` or ``"sum"``.

    Example:
        >>> import torch
        >>> from hrem_layers.losses import info_nce_loss
        >>> similarity = torch.tensor([[0.9, 0.2], [0.1, 0.7]])
        >>> info_nce_loss(similarity, torch.eye(2, dtype=torch.bool), scale=10.0)
        tensor(0.0026)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    s = check_pairs(similarity, positives)
    shared: tuple[Tensor, ...] = ()
    row_loss: RowLoss = _row_loss
    if isinstance(scale, Tensor):
        scale = check_tensor("scale", scale, (), device=s.device).to(s.dtype)
        shared = (scale,)
    else:
        row_loss = partial(_row_loss, scale=check_constant("scale", scale, above=0))
    loss = sum_over_anchors(
        row_loss, s, positives, ways=tuple((_weights(positives, d, reduction, s.dtype),) for d in (1, 0)), shared=shared
    )
    return loss * one_if_finite(s, *shared)


def _weights(positives: Tensor, dim: int, reduction: str, dtype: torch.dtype) -> Tensor:
    """What each anchor counts, (n, 1); those without a positive count 0 by having none."""
    anchors = positives.any(dim=dim).unsqueeze(1)
    weight = torch.full_like(anchors, 0.5, dtype=dtype)
    return weight / torch.count_nonzero(anchors).clamp(min=1) if reduction == "mean" else weight


def _row_loss(s: Tensor, positives: Tensor, weight: Tensor, scale: float | Tensor) -> Tensor:
    log_p = (s * scale).log_softmax(dim=1)
    count = positives.sum(dim=1, keepdim=True).clamp(min=1)
    return -(torch.where(positives, log_p, 0).sum(dim=1, keepdim=True) * weight / count).sum()


class InfoNCELoss(nn.Module):
    r"""Cross-entropy of softmax(s/τ) over rows and over columns, the mean of the two directions.

    .. math::
        \ell(x) = -\frac{1}{|P(x)|} \sum_{y \in P(x)} \log
        \frac{\exp(s(x, y) / \tau)}{\sum_{y'} \exp(s(x, y') / \tau)}

    P(x) are the positives of x. With one positive per row this is CLIP's loss (Radford et al., 2021); with
    several, the average over them outside the logarithm (Khosla et al., 2020, "L_out"). An anchor without
    a positive contributes 0. A NaN or an infinity anywhere in ``similarity`` makes the loss NaN.

    Args:
        temperature: τ > 0; at least 0.01 if learnable (less by up to 1%, as rounding leaves ``1 /
            clip.logit_scale.exp()`` at CLIP's own limit, is taken as 0.01). A number, or a tensor of one element, of
            which the value is taken once: no gradient flows back to where it came from.
        learnable: make log(1/τ) a parameter of this module (``log_scale``). 1/τ is held at 100 or less, as CLIP does:
            a call in training mode first sets the parameter back to the limit if it is beyond.
        log_scale: instead of a temperature, the parameter log(1/τ) of a model, such as ``clip.logit_scale``, of shape
            () or (1,). It is shared, not copied: gradient flows to it, ``loss.log_scale`` is the same object. It stays
            its owner's: it is neither in this module's ``parameters()`` nor in its ``state_dict()``, and never set
            back. A ``copy.deepcopy`` of the loss alone has a copy of it.
        reduction: ``"mean"`` over the anchors that have a positive, or ``"sum"`` over them; either way half
            the sum of the two directions.

    Raises:
        TypeError, ValueError: an option has the wrong type or is out of its range, or ``log_scale`` comes with a
            temperature or with ``learnable``.

    Example:
        >>> import torch
        >>> from hrem_layers.losses import InfoNCELoss
        >>> similarity = torch.tensor([[0.9, 0.2], [0.1, 0.7]])
        >>> InfoNCELoss(0.1)(similarity, torch.eye(2, dtype=torch.bool))
        tensor(0.0026)
    """

    log_scale: nn.Parameter

    def __init__(
        self,
        temperature: float | Tensor = DEFAULT_TEMPERATURE,
        *,
        learnable: bool = False,
        log_scale: nn.Parameter | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.learnable = check_bool("learnable", learnable)
        self.temperature = check_temperature(temperature, max_scale=MAX_SCALE if learnable else math.inf)
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)
        self.shared = log_scale is not None
        if log_scale is not None:
            if learnable or self.temperature != DEFAULT_TEMPERATURE:
                raise ValueError(
                    "log_scale must come without temperature and learnable: the parameter that it shares is both"
                )
            share(self, "log_scale", check_shared("log_scale", log_scale))
        elif learnable:
            self.log_scale = nn.Parameter(torch.tensor(log_of_inverse(self.temperature, MAX_SCALE)))

    def extra_repr(self) -> str:
        if self.shared:
            return f"log_scale={self.log_scale}, reduction={self.reduction!r}"
        return f"{self.temperature}, learnable={self.learnable}, log_scale=None, reduction={self.reduction!r}"

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
        scale: float | Tensor = 1 / self.temperature
        if self.shared:
            scale = scale_of(self.log_scale, s)
        elif self.learnable:
            if self.training:
                clamp_own(self.log_scale, MAX_SCALE)
            scale = scale_of(self.log_scale, s)
            scale = scale if self.training else scale.clamp(max=MAX_SCALE)
        return info_nce_loss(s, positives, scale=scale, reduction=self.reduction)
