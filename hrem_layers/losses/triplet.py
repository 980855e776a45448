"""The triplet loss and how it takes its negatives (paper, section 3.5; Wu et al., ICCV 2017)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from hrem_layers._core.checks import check_tensor, said
from hrem_layers._core.exchange import ALONE, Exchange
from hrem_layers.losses._pairs import check_pairs, one_if_finite
from hrem_layers.losses._rows import Ways, sum_over_anchors
from hrem_layers.losses._streamed import open_stream, streamed_sum
from hrem_layers.losses._triplet import (
    NEGATIVES,
    NegativeSampling,
    against_chosen,
    anchor_noise,
    check_options,
    row_loss,
)


def triplet_loss(
    similarity: Tensor,
    positives: Tensor,
    *,
    margin: float = 0.2,
    negative_sampling: str | NegativeSampling = "distance_weighted",
    cutoff: float = 0.5,
    nonzero_cutoff: float = 1.7,
    weight_dim: int = 512,
    reduction: str = "sum",
    noise: Tensor | None = None,
) -> Tensor:
    """What :class:`~hrem_layers.TripletLoss` computes, as a function; same options, arguments and errors.

    Example:
        >>> import torch
        >>> from hrem_layers.losses import triplet_loss
        >>> similarity = torch.tensor([[0.9, 0.8], [0.1, 0.7]])
        >>> triplet_loss(similarity, torch.eye(2, dtype=torch.bool), negative_sampling="hardest")
        tensor(0.4000)
    """
    if not torch.compiler.is_compiling():  # numbers may be symbols there
        check_options(margin, negative_sampling, cutoff, nonzero_cutoff, weight_dim, reduction)
    s = check_pairs(similarity, positives)
    noise = _noise(noise, negative_sampling, s.shape[0], s.shape[1], s)
    if isinstance(negative_sampling, str):
        options = {"cutoff": cutoff, "nonzero_cutoff": nonzero_cutoff, "weight_dim": weight_dim}
        sum_of_rows = row_loss(negative_sampling, margin, **options)
        loss = sum_over_anchors(sum_of_rows, s, positives, ways=_ways(noise, negative_sampling, s.shape[0]))
    else:
        loss = against_chosen(s, positives, negative_sampling, margin=margin)
        loss = loss + against_chosen(s.t(), positives.t(), negative_sampling, margin=margin)
    if reduction == "mean":
        loss = loss / torch.count_nonzero(positives).clamp(min=1)
    return loss * one_if_finite(s, *(() if noise is None else (noise,)))


def streamed_triplet_loss(
    image_embedding: Tensor,
    text_embedding: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    positives: Tensor | None = None,
    margin: float = 0.2,
    negative_sampling: str = "distance_weighted",
    cutoff: float = 0.5,
    nonzero_cutoff: float = 1.7,
    weight_dim: int = 512,
    reduction: str = "sum",
    noise: Tensor | None = None,
    normalize: bool = True,
    chunk_size: int | None = None,
    image_rows: slice | None = None,
    text_rows: slice | None = None,
    exchange: Exchange = ALONE,
) -> Tensor:
    """:func:`triplet_loss` from embeddings, without the similarity in memory; arguments and errors as for
    :meth:`TripletLoss.from_embeddings <hrem_layers.TripletLoss.from_embeddings>`.

    Example:
        >>> import torch
        >>> from hrem_layers.losses import streamed_triplet_loss
        >>> image, text = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[4.0, 3.0], [0.0, 1.0]])
        >>> streamed_triplet_loss(image, text, negative_sampling="hardest", chunk_size=1)
        tensor(0.)
    """
    if not torch.compiler.is_compiling():  # numbers may be symbols there
        check_options(margin, negative_sampling, cutoff, nonzero_cutoff, weight_dim, reduction)
    if not isinstance(negative_sampling, str):
        raise ValueError(
            "negative_sampling must be named where the similarity is not whole, for a callable may look at all of it: "
            f"one of {', '.join(map(repr, NEGATIVES))}, got {said(negative_sampling)}"
        )
    x, y, plan = open_stream(
        image_embedding, text_embedding, image_ids=image_ids, text_ids=text_ids, positives=positives,
        normalize=normalize, chunk_size=chunk_size, image_rows=image_rows, text_rows=text_rows, exchange=exchange,
    )  # fmt: skip
    noise = _noise(noise, negative_sampling, x.shape[0], y.shape[0], x)
    options = {"cutoff": cutoff, "nonzero_cutoff": nonzero_cutoff, "weight_dim": weight_dim}
    ways = _ways(noise, negative_sampling, x.shape[0])
    loss = streamed_sum(row_loss(negative_sampling, margin, **options), x, y, plan, ways=ways)
    if reduction == "mean":
        loss = loss / plan.positives.pairs().clamp(min=1)
    return loss if noise is None else loss * one_if_finite(noise)


def _noise(
    noise: Tensor | None, negative_sampling: str | NegativeSampling, n: int, m: int, like: Tensor
) -> Tensor | None:
    """What was given, checked, or what the choice needs."""
    if noise is not None:
        return check_tensor("noise", noise, (n + m,), device=like.device)
    return anchor_noise(n + m, like.dtype, like.device) if negative_sampling == "distance_weighted" else None


def _ways(noise: Tensor | None, negative_sampling: str, n: int) -> Ways:
    """What each anchor of both sides has of its own."""
    if noise is None or negative_sampling != "distance_weighted":
        return (), ()
    return (noise[:n].unsqueeze(1),), (noise[n:].unsqueeze(1),)


class TripletLoss(nn.Module):
    r"""Hinge on pairs of positives and negatives, images against texts and texts against images.

    .. math::
        \sum_{(x, y)} [\alpha - s(x, y) + s(x, y')]_+ + \sum_{(x, y)} [\alpha - s(x, y) + s(x', y)]_+

    over all positive pairs (x, y). Negatives are pairs that are not positives, chosen as

    - ``"distance_weighted"``: one negative per anchor and direction, drawn with probability ∝ w, where
      :math:`\log w = (2 - n) \log d - \frac{n - 3}{2} \log(1 - d^2 / 4)`,
      :math:`d = \max(\sqrt{2 - 2s}, \mathrm{cutoff})`, n = ``weight_dim``, and w = 0 from
      ``nonzero_cutoff`` on (Wu et al., ICCV 2017). Draws come from torch's default generator:
      ``torch.manual_seed`` repeats them.
    - ``"hardest"``: the most similar negative; negatives equal to it up to rounding share the gradient evenly.
    - ``"all"``: every negative, summed.
    - ``"expected"``: the expectation of the distance-weighted loss, :math:`\sum_{y'} w\,[\cdot]_+` with w
      normalised over the negatives; no randomness.
    - a callable ``(similarity, positives) -> (negative, found)``, for a choice of your own: for anchors that are the
      rows of ``similarity`` (N, M) and of ``positives`` (N, M) bool it returns the similarity of one negative per
      anchor, (N, 1), with the gradient that it should have, and whether the anchor has one, (N, 1) bool. It is called
      twice, the second time with the transposed matrices. A module's parameters are trained along.

    The first two are such functions, :func:`~hrem_layers.losses.distance_weighted_negative` and
    :func:`~hrem_layers.losses.hardest_negative`. ``"all"`` and ``"expected"`` are not: they sum over many negatives,
    with the weights of :func:`~hrem_layers.losses.every_negative_weights` and
    :func:`~hrem_layers.losses.expected_negative_weights`.

    How this differs from the release: an anchor without a candidate contributes 0 and leaves the others
    alone (there the loss of that direction becomes 0 for the whole batch); all equal ids are positives
    (its hinge takes only the diagonal); an anchor with several positives has one draw for all of them
    (there one for each, from the same distribution). Similarities rounded over 1 give no NaN. A NaN or an infinity
    anywhere in ``similarity`` or ``noise`` makes the loss NaN.

    Memory grows as N·M for every choice, also for ``"all"`` with several positives per row.

    Args:
        margin: α, in units of cosine, at least 0.
        negative_sampling: as above.
        cutoff: smallest distance used for w, in (0, 2).
        nonzero_cutoff: distance from which w = 0, in (cutoff, 2] (the release: 1.7 on Flickr30K, 1.9 on COCO).
        weight_dim: n, dimension of the sphere whose distances w corrects for, at least 2.
        reduction: ``"sum"`` (the release's scale) or ``"mean"``, the sum divided by the number of positive pairs.

    Raises:
        TypeError, ValueError: an option has the wrong type or is out of its range.

    Example:
        >>> import torch
        >>> from hrem_layers.losses import TripletLoss
        >>> similarity = torch.tensor([[0.9, 0.8], [0.1, 0.7]])
        >>> TripletLoss(negative_sampling="hardest")(similarity, torch.eye(2, dtype=torch.bool))
        tensor(0.4000)
    """

    def __init__(
        self,
        margin: float = 0.2,
        *,
        negative_sampling: str | NegativeSampling = "distance_weighted",
        cutoff: float = 0.5,
        nonzero_cutoff: float = 1.7,
        weight_dim: int = 512,
        reduction: str = "sum",
    ) -> None:
        super().__init__()
        check_options(margin, negative_sampling, cutoff, nonzero_cutoff, weight_dim, reduction)
        self.margin = float(margin)
        self.negative_sampling = negative_sampling
        self.cutoff = float(cutoff)
        self.nonzero_cutoff = float(nonzero_cutoff)
        self.weight_dim = int(weight_dim)
        self.reduction = reduction

    def extra_repr(self) -> str:
        choice = self.negative_sampling
        shown = repr(choice) if isinstance(choice, str) else getattr(choice, "__name__", type(choice).__name__)
        return (
            f"{self.margin}, negative_sampling={shown}, cutoff={self.cutoff}, "
            f"nonzero_cutoff={self.nonzero_cutoff}, weight_dim={self.weight_dim}, reduction={self.reduction!r}"
        )

    def draw_noise(self, similarity: Tensor) -> Tensor | None:
        """The random numbers of one call, (N + M,) uniform in [0, 1), the images' first; None where nothing is drawn.

        For callers that need the same draw elsewhere (several processes): pass it to :meth:`forward`.
        """
        if self.negative_sampling != "distance_weighted":
            return None
        return anchor_noise(sum(similarity.shape), similarity.dtype, similarity.device)

    def forward(self, similarity: Tensor, positives: Tensor, noise: Tensor | None = None) -> Tensor:
        """
        Args:
            similarity: (N, M) cosines, N images by M texts.
            positives: (N, M) bool, True = the pair belongs together.
            noise: (N + M,) as from :meth:`draw_noise`; None = drawn here.

        Returns:
            A scalar, float32 or better. 0 where there is no positive pair or no negative.

        Raises:
            TypeError, ValueError: an argument, or a result of a callable ``negative_sampling``, has the wrong type,
                dtype, shape or device.
        """
        if noise is None and self.negative_sampling == "distance_weighted":
            check_pairs(similarity, positives)
            noise = self.draw_noise(similarity)
        return triplet_loss(
            similarity,
            positives,
            margin=self.margin,
            negative_sampling=self.negative_sampling,
            cutoff=self.cutoff,
            nonzero_cutoff=self.nonzero_cutoff,
            weight_dim=self.weight_dim,
            reduction=self.reduction,
            noise=noise,
        )

    def from_embeddings(
        self,
        image_embedding: Tensor,
        text_embedding: Tensor,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        positives: Tensor | None = None,
        noise: Tensor | None = None,
        normalize: bool = True,
        chunk_size: int | None = None,
        image_rows: slice | None = None,
        text_rows: slice | None = None,
        exchange: Exchange = ALONE,
    ) -> Tensor:
        """The loss of the cosines of two sets of embeddings, a few anchors at a time: arguments and result as for
        :meth:`InfoNCELoss.from_embeddings <hrem_layers.InfoNCELoss.from_embeddings>`.

        ``"distance_weighted"`` draws what it draws from the whole similarity: the generator gives the same N + M
        numbers, one per anchor, and an anchor's draw depends on its number and its own row alone, not on
        ``chunk_size``. (The similarities may differ in their last bit, and with them a draw at the border between two
        negatives.) With ``image_rows`` and ``text_rows`` as well N + M numbers are drawn, so that calls that share a
        seed add up to the whole.

        Args:
            noise: (N + M,) uniform in [0, 1), the images' numbers first; None = drawn here.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device, or ``negative_sampling`` is a
                callable: it may look at the whole similarity.
        """
        return streamed_triplet_loss(
            image_embedding, text_embedding, image_ids=image_ids, text_ids=text_ids, positives=positives,
            margin=self.margin, negative_sampling=cast(str, self.negative_sampling), cutoff=self.cutoff,
            nonzero_cutoff=self.nonzero_cutoff, weight_dim=self.weight_dim, reduction=self.reduction, noise=noise,
            normalize=normalize, chunk_size=chunk_size, image_rows=image_rows, text_rows=text_rows, exchange=exchange,
        )  # fmt: skip
