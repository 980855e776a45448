"""The contrastive loss of CLIP-like models, with any number of positives per row."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hrem_layers._core.checks import check_bool, check_choice, check_tensor
from hrem_layers._core.exchange import ALONE, Exchange
from hrem_layers.losses._pairs import REDUCTIONS, as_bytes, check_constant, check_pairs, if_finite, one_if_finite
from hrem_layers.losses._positives import PositiveMatrix, Positives
from hrem_layers.losses._rows import Ways, is_taken_whole, sum_over_anchors
from hrem_layers.losses._scale import check_shared, check_temperature, clamp_own, log_of_inverse, scale_of, share
from hrem_layers.losses._streamed import open_stream, streamed_dtype, streamed_sum

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
    return _of_checked(check_pairs(similarity, positives), positives, scale, reduction)


def _of_checked(s: Tensor, positives: Tensor, scale: float | Tensor, reduction: str) -> Tensor:
    row_loss, shared = _with_scale(scale, s)
    if is_taken_whole(s):
        total = row_loss.both_ways(s, positives, reduction, *shared)
        return total * if_finite(-0.5, total)  # which sees all of s
    ways = _weights(PositiveMatrix(positives), tuple(s.shape), reduction, s)
    loss = sum_over_anchors(row_loss, s, positives, ways=ways, shared=shared)
    return loss * one_if_finite(loss)


def streamed_info_nce_loss(
    image_embedding: Tensor,
    text_embedding: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    positives: Tensor | None = None,
    scale: float | Tensor = 1 / DEFAULT_TEMPERATURE,
    reduction: str = "mean",
    normalize: bool = True,
    chunk_size: int | None = None,
    image_rows: slice | None = None,
    text_rows: slice | None = None,
    exchange: Exchange = ALONE,
) -> Tensor:
    """:func:`info_nce_loss` from embeddings, without the similarity in memory; arguments and errors as for
    :meth:`InfoNCELoss.from_embeddings <hrem_layers.InfoNCELoss.from_embeddings>`.

    Example:
        >>> import torch
        >>> from hrem_layers.losses import streamed_info_nce_loss
        >>> image, text = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[4.0, 3.0], [0.0, 1.0]])
        >>> streamed_info_nce_loss(image, text, scale=10.0, chunk_size=1)
        tensor(0.0707)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    x, y, plan = open_stream(
        image_embedding, text_embedding, image_ids=image_ids, text_ids=text_ids, positives=positives,
        normalize=normalize, chunk_size=chunk_size, image_rows=image_rows, text_rows=text_rows, exchange=exchange,
    )  # fmt: skip
    row_loss, shared = _with_scale(scale, x)
    ways = _weights(plan.positives, (x.shape[0], y.shape[0]), reduction, x)
    return streamed_sum(row_loss, x, y, plan, ways=ways, shared=shared)


def _with_scale(scale: float | Tensor, like: Tensor) -> tuple[_RowLoss, tuple[Tensor, ...]]:
    """The loss of rows, and the scale where it is a tensor that the rows share."""
    if isinstance(scale, Tensor):
        return _RowLoss(None), (check_tensor("scale", scale, (), device=like.device).to(like.dtype),)
    return _RowLoss(check_constant("scale", scale, above=0)), ()


def _weights(positives: Positives, lengths: tuple[int, ...], reduction: str, like: Tensor) -> Ways:
    """What each anchor counts, (n, 1) of both sides; those without a positive count 0 by having none."""
    ways = []
    for way, length in enumerate(lengths):
        weight = like.new_full((), 0.5)
        if reduction == "mean":
            weight = weight / positives.anchors(way).clamp(min=1)
        ways.append((weight.expand(length, 1),))
    return tuple(ways)


class _RowLoss:
    """The sum over rows, and its gradient. ``scale`` None: the rows share it, and gradient flows to it.

    What is not finite makes the sum NaN wherever it stands: a share of 0 does not hide it.
    """

    def __init__(self, scale: float | None) -> None:
        self.scale = scale

    def __call__(self, s: Tensor, positives: Tensor, weight: Tensor, *shared: Tensor) -> Tensor:
        log_p = (s * self._scale(shared)).log_softmax(dim=1)
        return -(log_p * _shares(positives, weight, s.dtype)[0]).sum()

    def with_gradients(self, s: Tensor, positives: Tensor, weight: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
        scale = self._scale(shared)
        log_p = (s * scale).log_softmax(dim=1)
        share, total = _shares(positives, weight, s.dtype)
        value = -torch.dot(log_p.flatten(), share.flatten())
        of_logits = log_p.exp_().mul_(total).sub_(share)
        of_scale = [torch.dot(of_logits.flatten(), s.flatten())] if shared else []
        return value, of_logits.mul_(scale), *of_scale

    def both_ways(self, s: Tensor, positives: Tensor, reduction: str, *shared: Tensor) -> Tensor:
        """−2 times the loss over rows and columns of all of s at once: what both need is made once, and nothing is
        transposed."""
        logits, flags = s * self._scale(shared), as_bytes(positives).to(s.dtype)
        total = logits.new_zeros(())
        for dim in (1, 0):
            count = flags.sum(dim=dim, keepdim=True)
            parts = count * torch.count_nonzero(count) if reduction == "mean" else count
            total = torch.addcmul(total, logits.log_softmax(dim=dim), flags / parts.clamp(min=1))
        return total.sum()

    def _scale(self, shared: tuple[Tensor, ...]) -> float | Tensor:
        if self.scale is not None:
            return self.scale
        (scale,) = shared
        return scale


def _shares(positives: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What log p of each pair counts (n, M), evenly over the positives of its row, and a row's total (n, 1)."""
    share = as_bytes(positives).to(dtype)
    count = share.sum(dim=1, keepdim=True)
    total = weight * count.clamp(max=1)
    return share.mul_(total / count.clamp(min=1)), total


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
            back. A ``copy.deepcopy`` of the loss alone has a copy of it. What gives the model another parameter in its
            place (``to_empty``, FSDP) does not reach the loss: share it afterwards.
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
        return _of_checked(s, positives, self._scale(s.dtype, s.device), self.reduction)

    def from_embeddings(
        self,
        image_embedding: Tensor,
        text_embedding: Tensor,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        positives: Tensor | None = None,
        normalize: bool = True,
        chunk_size: int | None = None,
        image_rows: slice | None = None,
        text_rows: slice | None = None,
        exchange: Exchange = ALONE,
    ) -> Tensor:
        """The loss of the cosines of two sets of embeddings, a few anchors at a time: equal to the loss of the whole
        similarity in value and gradient up to rounding, in memory that grows as N + M.

        Args:
            image_embedding: (N, D), of any length: normalised here.
            text_embedding: (M, D) likewise.
            image_ids: (N,) integer. None = row number.
            text_ids: (M,) integer; an image and a text with equal ids belong together. None = ``image_ids``, M = N.
                With ``image_ids=None`` it is the row of the image that each text describes.
            positives: (N, M) bool, True = the pair belongs together, instead of ids; it takes N·M bytes.
            normalize: False: similarities are the products of the rows as they are, which is the same for rows of
                length 1.
            chunk_size: anchors at a time; their similarities are what is in memory, chunk_size · max(N, M). None =
                about 2 million similarities on a CPU, 4 million elsewhere, and 128 anchors at least.
            image_rows: the images that are anchors here, a slice of step 1 in [0, N]; None = all. The loss is a sum
                over anchors: those of several calls whose ``image_rows`` and ``text_rows`` together are all images
                and all texts add up to the whole loss, and so do their gradients. ``"mean"`` divides by the numbers
                of the whole.
            text_rows: likewise the texts, in [0, M].
            exchange: of several processes, each of which calls this with the embeddings of all and rows of its own, and
                adds up the losses by ``exchange.add_up``. The gradients are added up here.

        Returns:
            A scalar, float32 or better.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        """
        scale = self._scale(streamed_dtype(image_embedding, text_embedding), image_embedding.device)
        return streamed_info_nce_loss(
            image_embedding, text_embedding, image_ids=image_ids, text_ids=text_ids, positives=positives,
            scale=scale, reduction=self.reduction, normalize=normalize, chunk_size=chunk_size,
            image_rows=image_rows, text_rows=text_rows, exchange=exchange,
        )  # fmt: skip

    def _scale(self, dtype: torch.dtype, device: torch.device) -> float | Tensor:
        if not (self.shared or self.learnable):
            return 1 / self.temperature
        if self.learnable and self.training:
            clamp_own(self.log_scale, MAX_SCALE)
        scale = scale_of(self.log_scale, dtype, device)
        return scale if self.shared or self.training else scale.clamp(max=MAX_SCALE)
