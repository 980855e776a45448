"""The sigmoid loss of SigLIP, with any number of positives per row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrem_layers._core.checks import check_bool, check_choice, check_number, check_tensor
from hrem_layers._core.exchange import ALONE, Exchange
from hrem_layers.losses._pairs import REDUCTIONS, as_bytes, check_constant, check_pairs, if_finite
from hrem_layers.losses._rows import sum_over_anchors
from hrem_layers.losses._scale import as_number, check_shared, check_temperature, scale_of, share
from hrem_layers.losses._streamed import open_stream, streamed_dtype, streamed_sum

DEFAULT_TEMPERATURE = 0.1
DEFAULT_BIAS = -10.0


def sigmoid_loss(
    similarity: Tensor,
    positives: Tensor,
    *,
    scale: float | Tensor = 1 / DEFAULT_TEMPERATURE,
    bias: float | Tensor = DEFAULT_BIAS,
    reduction: str = "mean",
) -> Tensor:
    """What :class:`~hrem_layers.SigmoidLoss` computes, as a function of the scale t = 1/τ and the bias b.

    Args:
        similarity: (N, M) cosines.
        positives: (N, M) bool.
        scale: t, a number above 0 or a 0-dimensional tensor, to which gradient flows.
        bias: b, a number or a 0-dimensional tensor, to which gradient flows.
        reduction: ``"mean"`` or ``"sum"``.

    Example:
        >>> import torch
        >>> from hrem_layers.losses import sigmoid_loss
        >>> similarity = torch.tensor([[0.9, 0.2], [0.1, 0.7]])
        >>> sigmoid_loss(similarity, torch.eye(2, dtype=torch.bool), scale=10.0, bias=-5.0)
        tensor(0.1059)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    return _of_checked(check_pairs(similarity, positives), positives, scale, bias, reduction)


def _of_checked(s: Tensor, positives: Tensor, scale: float | Tensor, bias: float | Tensor, reduction: str) -> Tensor:
    row_loss, shared = _with_numbers(scale, bias, s)
    loss = sum_over_anchors(row_loss, s, positives, ways=((),), shared=shared)
    return loss * if_finite(_weight(s.shape, reduction), s, *shared)


def streamed_sigmoid_loss(
    image_embedding: Tensor,
    text_embedding: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    positives: Tensor | None = None,
    scale: float | Tensor = 1 / DEFAULT_TEMPERATURE,
    bias: float | Tensor = DEFAULT_BIAS,
    reduction: str = "mean",
    normalize: bool = True,
    chunk_size: int | None = None,
    image_rows: slice | None = None,
    text_rows: slice | None = None,
    exchange: Exchange = ALONE,
) -> Tensor:
    """:func:`sigmoid_loss` from embeddings, without the similarity in memory; arguments and errors as for
    :meth:`SigmoidLoss.from_embeddings <hrem_layers.SigmoidLoss.from_embeddings>`.

    Example:
        >>> import torch
        >>> from hrem_layers.losses import streamed_sigmoid_loss
        >>> image, text = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[4.0, 3.0], [0.0, 1.0]])
        >>> streamed_sigmoid_loss(image, text, scale=10.0, bias=-5.0, chunk_size=1)
        tensor(0.6907)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    x, y, plan = open_stream(
        image_embedding, text_embedding, image_ids=image_ids, text_ids=text_ids, positives=positives,
        normalize=normalize, chunk_size=chunk_size, image_rows=image_rows, text_rows=text_rows, exchange=exchange,
    )  # fmt: skip
    row_loss, shared = _with_numbers(scale, bias, x)
    loss = streamed_sum(row_loss, x, y, plan, ways=((),), shared=shared)
    return loss * _weight((x.shape[0], y.shape[0]), reduction)


def _weight(counts: Sequence[int], reduction: str) -> float:
    """Of each pair's log σ, for so many images and texts."""
    return -1 / max(counts) if reduction == "mean" else -1


def _with_numbers(scale: float | Tensor, bias: float | Tensor, like: Tensor) -> tuple[_RowLoss, tuple[Tensor, ...]]:
    """The loss of rows, and those of both that are tensors, which the rows share; checked."""
    numbers: list[float | None] = []
    shared = []
    for name, value, options in (("scale", scale, {"above": 0}), ("bias", bias, {})):
        if isinstance(value, Tensor):
            shared.append(check_tensor(name, value, (), device=like.device).to(like.dtype))
            numbers.append(None)
        else:
            numbers.append(check_constant(name, value, **options))
    return _RowLoss(*numbers), tuple(shared)


class _RowLoss:
    """Σ log σ(z (t s + b)) over rows, and its gradient. None: the rows share it, and gradient flows to it."""

    def __init__(self, scale: float | None, bias: float | None) -> None:
        self.scale, self.bias = scale, bias

    def __call__(self, s: Tensor, positives: Tensor, *shared: Tensor) -> Tensor:
        return F.logsigmoid(self._signed(s, positives, shared)[0]).sum()

    def with_gradients(self, s: Tensor, positives: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
        signed, factor = self._signed(s, positives, shared)
        log_p, exponential = torch.ops.aten.log_sigmoid_forward(signed)
        gradient = torch.ops.aten.log_sigmoid_backward(factor, signed, exponential)  # σ(−signed) · factor
        if not shared:
            return log_p.sum(), gradient
        of_shared = []
        if self.scale is None:
            of_shared.append(torch.dot(gradient.flatten(), s.flatten()))
        if self.bias is None:
            of_shared.append(gradient.sum())
        return log_p.sum(), gradient.mul_(shared[0] if self.scale is None else self.scale), *of_shared

    def _signed(self, s: Tensor, positives: Tensor, shared: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """z (t s + b), and its derivative in s; in t s + b if the rows share t or b."""
        flags = as_bytes(positives).to(s.dtype)
        signs = torch.add(flags.new_full((), -1), flags, alpha=2)  # z: 1 for positives, −1 for all other pairs
        if self.scale is not None and self.bias is not None:
            factor = signs * self.scale
            return torch.addcmul(signs.mul_(self.bias), s, factor), factor
        bias = shared[-1] if self.bias is None else s.new_full((), self.bias)
        logits = s * shared[0] + bias if self.scale is None else torch.add(bias, s, alpha=self.scale)
        return logits * signs, signs


class SigmoidLoss(nn.Module):
    r"""Every pair by itself, positive or not: the pair loss of SigLIP.

    .. math::
        -\frac{1}{\max(N, M)} \sum_{x, y} \log \sigma\bigl(z(x, y) \, (t \, s(x, y) + b)\bigr), \quad
        z = 1 \text{ for positives}, -1 \text{ for all other pairs}

    (Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, equation in section 3.2, where N = M.)
    No pair is compared with another, so any number of positives per row and column is as good as one. A NaN or an
    infinity anywhere in ``similarity`` makes the loss NaN.

    Args:
        temperature: τ = 1/t > 0 to start from. A number, or a tensor of one element, of which the value is taken once.
        bias: b to start from, likewise: negative, since most pairs are no positives. Or a model's own parameter of
            shape () or (1,), such as ``siglip.logit_bias``, which is then shared as ``log_scale`` is.
        learnable: make log t and b parameters of this module (``log_scale``, ``bias``), each unless it is shared. They
            are not held in any range.
        log_scale: instead of a temperature, the parameter log t of a model, such as ``siglip.logit_scale``, of shape
            () or (1,). It is shared, not copied: gradient flows to it, ``loss.log_scale`` is the same object. It stays
            its owner's, in neither ``parameters()`` nor ``state_dict()`` of this module. A ``copy.deepcopy`` of the
            loss alone has a copy of it.
        reduction: ``"mean"``, the sum over all pairs divided by the larger of N and M (with N = M the paper's, the
            mean over images), or ``"sum"``.

    Raises:
        TypeError, ValueError: an option has the wrong type or is out of its range, or ``log_scale`` comes with a
            temperature.

    Example:
        >>> import torch
        >>> from hrem_layers.losses import SigmoidLoss
        >>> similarity = torch.tensor([[0.9, 0.2], [0.1, 0.7]])
        >>> loss = SigmoidLoss(0.1, bias=-5.0)
        >>> print(round(loss(similarity, torch.eye(2, dtype=torch.bool)).item(), 4))
        0.1059
    """

    log_scale: Tensor | float
    bias: Tensor | float

    def __init__(
        self,
        temperature: float | Tensor = DEFAULT_TEMPERATURE,
        *,
        bias: float | Tensor = DEFAULT_BIAS,
        learnable: bool = True,
        log_scale: nn.Parameter | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)
        self.learnable = check_bool("learnable", learnable)
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)
        if log_scale is not None:
            if self.temperature != DEFAULT_TEMPERATURE:
                raise ValueError("log_scale must come without temperature: the parameter that it shares holds it")
            share(self, "log_scale", check_shared("log_scale", log_scale))
        else:
            self._own("log_scale", -math.log(self.temperature))
        self._bias: float | None = None  # what it started from, unless shared
        if isinstance(bias, nn.Parameter):
            share(self, "bias", check_shared("bias", bias))
        else:
            self._bias = check_number("bias", as_number(bias))
            self._own("bias", self._bias)
        self.shares_scale = log_scale is not None

    def _own(self, name: str, value: float) -> None:
        setattr(self, name, nn.Parameter(torch.tensor(value)) if self.learnable else value)

    def extra_repr(self) -> str:
        scale = f"log_scale={self.log_scale}" if self.shares_scale else f"{self.temperature}"
        bias = f"{self.bias}" if self._bias is None else f"{self._bias}"
        none = "" if self.shares_scale else ", log_scale=None"
        return f"{scale}, bias={bias}, learnable={self.learnable}{none}, reduction={self.reduction!r}"

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
        scale, bias = self._scale_and_bias(s.dtype, s.device)
        return _of_checked(s, positives, scale, bias, self.reduction)

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
        """The loss of the cosines of two sets of embeddings, a few images at a time: arguments, result and errors as
        for :meth:`InfoNCELoss.from_embeddings <hrem_layers.InfoNCELoss.from_embeddings>`.

        A pair counts once, with its image: only the images are anchors. ``text_rows`` is checked and changes nothing.
        """
        dtype = streamed_dtype(image_embedding, text_embedding)
        scale, bias = self._scale_and_bias(dtype, image_embedding.device)
        return streamed_sigmoid_loss(
            image_embedding, text_embedding, image_ids=image_ids, text_ids=text_ids, positives=positives,
            scale=scale, bias=bias, reduction=self.reduction, normalize=normalize, chunk_size=chunk_size,
            image_rows=image_rows, text_rows=text_rows, exchange=exchange,
        )  # fmt: skip

    def _scale_and_bias(self, dtype: torch.dtype, device: torch.device) -> tuple[float | Tensor, float | Tensor]:
        scale = scale_of(self.log_scale, dtype, device) if isinstance(self.log_scale, Tensor) else 1 / self.temperature
        return scale, self.bias.to(dtype).reshape(()) if isinstance(self.bias, Tensor) else self.bias
