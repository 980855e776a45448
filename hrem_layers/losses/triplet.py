"""The triplet loss with four ways of choosing negatives (paper, section 3.5; Wu et al., ICCV 2017)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrem_layers._core.checks import check_choice, check_int, check_number, check_tensor
from hrem_layers.losses._pairs import REDUCTIONS, check_pairs

NEGATIVES = ("distance_weighted", "hardest", "all", "expected")


class TripletLoss(nn.Module):
    r"""Hinge on pairs of positives and negatives, images against texts and texts against images.

    .. math::
        \sum_{(x, y)} [\alpha - s(x, y) + s(x, y')]_+ + \sum_{(x, y)} [\alpha - s(x, y) + s(x', y)]_+

    over all positive pairs (x, y). Negatives are pairs that are not positives, chosen as

    - ``"distance_weighted"``: one negative per anchor and direction, drawn with probability ∝ w, where
      :math:`\log w = (2 - n) \log d - \frac{n - 3}{2} \log(1 - d^2 / 4)`,
      :math:`d = \max(\sqrt{2 - 2s}, \mathrm{cutoff})`, n = ``weight_dim``, and w = 0 from
      ``nonzero_cutoff`` on. Draws come from torch's default generator: ``torch.manual_seed`` repeats them.
    - ``"hardest"``: the most similar negative.
    - ``"all"``: every negative, summed.
    - ``"expected"``: the expectation of the distance-weighted loss, :math:`\sum_{y'} w\,[\cdot]_+` with w
      normalised over the negatives; no randomness.

    How this differs from the release: an anchor without a candidate contributes 0 and leaves the others
    alone (there the loss of that direction becomes 0 for the whole batch); all equal ids are positives
    (its hinge takes only the diagonal); an anchor with several positives has one draw for all of them
    (there one for each, from the same distribution). Similarities rounded over 1 give no NaN.

    Memory grows as N·M for every choice, also for ``"all"`` with several positives per row.

    Args:
        margin: α, in units of cosine, at least 0.
        negative_sampling: as above.
        cutoff: smallest distance used for w, in (0, 2).
        nonzero_cutoff: distance from which w = 0, in (cutoff, 2] (the release: 1.7 on Flickr30K, 1.9 on COCO).
        weight_dim: n, dimension of the sphere whose distances w corrects for, at least 2.
        reduction: ``"sum"`` (the release's scale) or ``"mean"``, the sum divided by the number of positive pairs.
    """

    def __init__(
        self,
        margin: float = 0.2,
        *,
        negative_sampling: str = "distance_weighted",
        cutoff: float = 0.5,
        nonzero_cutoff: float = 1.7,
        weight_dim: int = 512,
        reduction: str = "sum",
    ) -> None:
        super().__init__()
        self.margin = check_number("margin", margin, minimum=0)
        self.negative_sampling = check_choice("negative_sampling", negative_sampling, NEGATIVES)
        self.cutoff = check_number("cutoff", cutoff, above=0, below=2)
        self.nonzero_cutoff = check_number("nonzero_cutoff", nonzero_cutoff, above=self.cutoff, maximum=2)
        self.weight_dim = check_int("weight_dim", weight_dim, minimum=2)
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)

    def extra_repr(self) -> str:
        return (
            f"{self.margin}, negative_sampling={self.negative_sampling!r}, cutoff={self.cutoff}, "
            f"nonzero_cutoff={self.nonzero_cutoff}, weight_dim={self.weight_dim}, reduction={self.reduction!r}"
        )

    def draw_noise(self, similarity: Tensor) -> Tensor | None:
        """The random numbers of one call, (2, N, M) exponential variates; None where nothing is drawn.

        For callers that need the same draw elsewhere (several processes): pass it to :meth:`forward`.
        """
        if self.negative_sampling != "distance_weighted":
            return None
        shape = (2, *similarity.shape)
        dtype = torch.float64 if similarity.dtype == torch.float64 else torch.float32
        return torch.empty(shape, dtype=dtype, device=similarity.device).exponential_()

    def forward(self, similarity: Tensor, positives: Tensor, noise: Tensor | None = None) -> Tensor:
        """
        Args:
            similarity: (N, M) cosines, N images by M texts.
            positives: (N, M) bool, True = the pair belongs together.
            noise: (2, N, M) as from :meth:`draw_noise`; None = drawn here.

        Returns:
            A scalar, float32 or better. 0 where there is no positive pair or no negative.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        """
        s = check_pairs(similarity, positives)
        if noise is None:
            noise = self.draw_noise(s)
        else:
            check_tensor("noise", noise, (2, *s.shape), device=s.device)
        both = (None, None) if noise is None else (noise[0], noise[1].t())
        loss = self._one_way(s, positives, both[0]) + self._one_way(s.t(), positives.t(), both[1])
        if self.reduction == "mean":
            loss = loss / positives.sum().clamp(min=1)
        return loss

    def _one_way(self, s: Tensor, positives: Tensor, noise: Tensor | None) -> Tensor:
        """Anchors are the rows."""
        if self.negative_sampling == "all":
            return hinge_against_many(s, positives, (~positives).to(s.dtype), self.margin)
        if self.negative_sampling == "hardest":
            negative, found = hardest_negative(s, positives)
        else:
            log_w = self._log_weights(s, positives)
            if self.negative_sampling == "expected":
                found = (log_w > -torch.inf).any(dim=1, keepdim=True)
                weights = torch.where(found, log_w, 0).softmax(dim=1)
                return hinge_against_many(s, positives, torch.where(found, weights, 0), self.margin)
            negative, found = sampled_negative(s, log_w, noise)
        hinge = F.relu(self.margin - s + negative)  # [n, m]
        return torch.where(positives & found, hinge, 0).sum()

    def _log_weights(self, s: Tensor, positives: Tensor) -> Tensor:
        return distance_log_weights(
            s, positives, cutoff=self.cutoff, nonzero_cutoff=self.nonzero_cutoff, weight_dim=self.weight_dim
        )


def distance_log_weights(
    s: Tensor, positives: Tensor, *, cutoff: float, nonzero_cutoff: float, weight_dim: int
) -> Tensor:
    """log w of every pair as a negative (N, M), without gradient; −inf: no candidate."""
    s = s.detach()
    distance = (2 - 2 * s).clamp(min=0).sqrt().clamp(min=cutoff)
    # 1 − d²/4 is 0 at d = 2, which matters only if nonzero_cutoff lets such pairs in
    rest = (1 - distance.square() / 4).clamp(min=torch.finfo(s.dtype).eps)
    log_w = (2 - weight_dim) * distance.log() - (weight_dim - 3) / 2 * rest.log()
    return log_w.masked_fill(positives | (distance >= nonzero_cutoff), -torch.inf)


def sampled_negative(s: Tensor, log_weights: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """One negative a row, drawn ∝ exp(log_weights): its similarity (N, 1) and whether there was one (N, 1).

    The draw is a race: the smallest of exponential variates divided by w. It needs no normalisation, no
    cumulative sum whose rounding could reach a weight of zero, and no look at the values.
    """
    candidate = log_weights > -torch.inf
    lead = (log_weights - noise.log()).masked_fill(~candidate, -torch.inf)
    winner = lead.argmax(dim=1, keepdim=True)
    return s.gather(1, winner), candidate.any(dim=1, keepdim=True)


def hardest_negative(s: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar negative a row: its similarity (N, 1) and whether there was one (N, 1)."""
    found = ~positives.all(dim=1, keepdim=True)
    hardest = s.masked_fill(positives, -torch.inf).amax(dim=1, keepdim=True)
    return torch.where(found, hardest, 0), found


def hinge_against_many(s: Tensor, positives: Tensor, weights: Tensor, margin: float) -> Tensor:
    """Σ over positive pairs and negatives of ``weights · [margin − s_positive + s_negative]₊``, a scalar.

    ``weights`` (N, M) is 0 at positives. Written out, several positives a row would make N·M·M triplets.
    Instead, the negatives of a row are sorted; those over a positive's threshold are then a prefix, whose
    Σw and Σw·s two cumulative sums hold.
    """
    ranked, order = s.masked_fill(positives, -torch.inf).sort(dim=1, descending=True)
    w = weights.gather(1, order)
    w_s = w * torch.where(ranked > -torch.inf, ranked, 0)
    # how many negatives have s_negative > s_positive − margin
    reach = torch.searchsorted(-ranked.detach(), (margin - s.detach()).contiguous())  # [n, m]
    sum_w, sum_w_s = (F.pad(x.cumsum(dim=1), (1, 0)).gather(1, reach) for x in (w, w_s))
    return torch.where(positives, sum_w * (margin - s) + sum_w_s, 0).sum()
