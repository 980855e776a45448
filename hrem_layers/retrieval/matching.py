"""Which texts describe which image, as the caller says it: ids, captions per image, or row by row; and folds."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hrem_layers._core.checks import check_choice, check_int, describe, holds_values, said

Ids = Tensor | np.ndarray | Sequence[int]
Captions = int | Tensor | np.ndarray | Sequence[int]

# Two rows that agree in this many columns are looked at in full.
_COLUMNS_TO_HASH = 16


class Matching(NamedTuple):
    """An image and a text match if their ids are equal."""

    images: Tensor  # (n,) int64
    texts: Tensor  # (m,)
    distractors: bool  # whether some may have no match

    def select(self, rows: Tensor, columns: Tensor) -> Matching:
        return Matching(self.images[rows], self.texts[columns], self.distractors)


def resolve_matching(
    counts: tuple[int, int],
    device: torch.device,
    image_ids: Ids | None,
    text_ids: Ids | None,
    captions_per_image: Captions | None,
    unmatched: str,
) -> Matching:
    """The ids of ``counts`` = (n, m) images and texts, on ``device``.

    Unless ``unmatched`` is ``"distractor"``, every item has a match, and with it, any has.
    """
    check_choice("unmatched", unmatched, ("error", "distractor"))
    n, m = counts
    images = torch.arange(n, device=device)
    source: tuple[str, str] | None  # names of what can leave images and texts without a match; None: nothing does
    if captions_per_image is not None:
        if image_ids is not None or text_ids is not None:
            raise ValueError("captions_per_image and ids exclude one another, got both")
        captions = _captions_of_each(captions_per_image, n, m)
        texts = torch.repeat_interleave(images, captions.to(device), output_size=m)
        source = ("captions_per_image", "captions_per_image") if captions.min() < 1 else None
    elif text_ids is None:
        if image_ids is not None:
            raise ValueError("text_ids must be given with image_ids, got None")
        if m != n:
            raise ValueError(
                f"without ids or captions_per_image there must be as many texts as images, got {n} images and {m} texts"
            )
        texts = images
        source = None
    else:
        texts = _id_tensor("text_ids", text_ids, m, device)
        if image_ids is not None:
            images = _id_tensor("image_ids", image_ids, n, device)
        source = ("image_ids" if image_ids is not None else "text_ids", "text_ids")
    matching = Matching(images, texts, unmatched == "distractor")
    if source is not None:
        _check_matched(matching, source)
    return matching


def _captions_of_each(captions: object, n: int, m: int) -> Tensor:
    """(n,) int64 on the CPU, of at least 0; their sum is m."""
    if isinstance(captions, Tensor | np.ndarray) and captions.ndim == 0:
        captions = captions.item()
    if isinstance(captions, numbers.Number):
        each = check_int("captions_per_image", captions, minimum=1)
        if m != n * each:
            repeated = f" (are images repeated? then pass every {each}th: image_embedding[::{each}])" if m == n else ""
            raise ValueError(
                f"captions_per_image={each} expects {n} * {each} = {n * each} texts for {n} images, "
                f"got {m} texts{repeated}"
            )
        return torch.full((n,), each, device="cpu")
    array = _whole_numbers("captions_per_image", captions, "an int, or a list, array or tensor of integers")
    if array.shape != (n,):
        raise ValueError(f"captions_per_image must be one number or one per image, of shape ({n},), got {said(array)}")
    if int(array.min()) < 0:
        raise ValueError(f"captions_per_image must be at least 0, got {array.min()} for image {array.argmin()}")
    total = sum(map(int, array))  # of Python's own integers: no overflow
    if total != m:
        raise ValueError(f"captions_per_image must sum to the number of texts, {m}, got a sum of {total}")
    return torch.from_numpy(array.astype(np.int64))


def _id_tensor(name: str, ids: object, count: int, device: torch.device) -> Tensor:
    wanted = f"integers of shape ({count},)"
    if isinstance(ids, Tensor) and ids.device.type != "meta" and ids.layout == torch.strided and not ids.is_nested:
        # stays on its device
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.is_quantized:
            raise TypeError(f"{name} must be {wanted}, got {describe(ids)}")
        if ids.shape != (count,):
            raise ValueError(f"{name} must have shape ({count},), got {describe(ids)}")
        if ids.dtype != torch.uint64:
            return ids.to(device, torch.int64)
    array = _whole_numbers(name, ids, wanted)
    if array.shape != (count,):
        raise ValueError(f"{name} must have shape ({count},), got {said(array)}")
    if array.dtype.kind == "u" and int(array.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must be below 2^63, got {array.max()}")
    return torch.from_numpy(array.astype(np.int64)).to(device)


def _whole_numbers(name: str, values: object, wanted: str) -> np.ndarray:
    """An array of NumPy's own integers, of any shape."""
    if isinstance(values, Tensor):
        if not holds_values(values):
            raise TypeError(f"{name} must be {wanted}, got {said(values)}")
        values = values.detach().cpu()
        values = values.float().numpy() if values.is_floating_point() else values.numpy()
    if isinstance(values, str | bytes | dict | set | frozenset):
        raise TypeError(f"{name} must be {wanted}, got {said(values)}")
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # such as lists of different lengths
        raise TypeError(f"{name} must be {wanted}, got {said(values)}") from error
    if array.dtype.kind not in "iu":
        beyond = ": an integer of more than 64 bits?" if array.dtype.kind == "O" and array.ndim == 1 else ""
        came = said(values) if array.ndim == 0 else f"{type(values).__name__} of {array.dtype}"
        raise TypeError(f"{name} must be {wanted}, got {came}{beyond}")
    return array


def _check_matched(matching: Matching, source: tuple[str, str]) -> None:
    lone_images = ~torch.isin(matching.images, matching.texts)
    lone_texts = ~torch.isin(matching.texts, matching.images)
    if matching.distractors:
        if lone_images.all():
            raise ValueError("image_ids and text_ids have no id in common: there is nothing to retrieve")
        return
    for lone, ids, name, what, other in (
        (lone_images, matching.images, source[0], "images", "text"),
        (lone_texts, matching.texts, source[1], "texts", "image"),
    ):
        if lone.any():
            some: Tensor = torch.unique(ids[lone])
            listed = ", ".join(map(str, some[:5].tolist())) + (", ..." if len(some) > 5 else "")
            raise ValueError(
                f"{name}: {int(lone.sum())} of {len(ids)} {what} have no {other} of the same id ({listed}); leave them "
                f"out, or keep them in the gallery alone with unmatched='distractor' (not with folds)"
            )


def fold_members(matching: Matching, folds: int) -> list[tuple[Tensor, Tensor]]:
    """(rows, columns) of each fold: images in runs, by the order in which their ids first occur, with their texts."""
    distinct, index = torch.unique(matching.images, return_inverse=True)
    if folds > len(distinct):
        raise ValueError(f"folds must be at most the number of images, {len(distinct)}, got {folds}")
    places = torch.arange(len(index), device=index.device)
    first = torch.full_like(distinct, len(index)).scatter_reduce(0, index, places, "amin")
    fold = first.argsort().argsort() * folds // len(distinct)
    image_fold, text_fold = fold[index], fold[torch.searchsorted(distinct, matching.texts)]
    return [((image_fold == k).nonzero()[:, 0], (text_fold == k).nonzero()[:, 0]) for k in range(folds)]


def repeated_rows(rows: Tensor) -> tuple[int, int | None]:
    """How many rows repeat an earlier one exactly, and k if all rows stand in runs of k equal ones.

    Args:
        rows: (n, D) of whole numbers or floats, without NaN.
    """
    n, width = rows.shape
    some = rows[:, torch.arange(0, width, -(-width // _COLUMNS_TO_HASH), device=rows.device)]
    if some.is_floating_point():
        some = (some.double() + 0.0).view(torch.int64)  # + 0: -0 and 0 are the same
    factors = torch.arange(1, some.shape[1] + 1, device=rows.device) * 0x9E3779B97F4A7C1 + 1
    key = (some.long() * factors).sum(dim=1)  # whole numbers, modulo 2^64
    first = _first_with(key)
    copies = (first < torch.arange(n, device=rows.device)).nonzero()[:, 0]
    at_once = max(1, 2**20 // width)
    same = [(rows[part] == rows[first[part]]).all(dim=1) for part in torch.split(copies, at_once)]
    copies = copies[torch.cat(same)]
    if not len(copies):
        return 0, None
    distinct = n - len(copies)
    first = torch.arange(n, device=rows.device).index_copy(0, copies, first[copies])
    run, rest = divmod(n, distinct)
    in_runs = rest == 0 and distinct > 1 and bool((first.view(distinct, run) == first[::run, None]).all())
    return len(copies), run if in_runs else None


def nearly_repeated(rows: Tensor, apart: float) -> int | None:
    """k if all rows stand in runs of k whose neighbours are at most ``apart``.

    In another batch an encoder gives the same image other last bits.
    """
    n, at_once = len(rows), max(1, 2**20 // rows.shape[1])
    if n < 2 or (rows[1].double() - rows[0]).norm() > apart:  # as a rule
        return None
    near = [torch.ones(0, dtype=torch.bool, device=rows.device)]
    for start in range(0, n - 1, at_once):
        part = rows[start : start + at_once + 1].double()
        near.append((part[1:] - part[:-1]).norm(dim=1) <= apart)
    ends = torch.cat([~torch.cat(near), torch.ones(1, dtype=torch.bool, device=rows.device)])
    run = int(ends.long().argmax()) + 1
    expected = (torch.arange(1, n + 1, device=rows.device) % run) == 0
    return run if 1 < run < n and torch.equal(ends, expected) else None


def _first_with(key: Tensor) -> Tensor:
    """(n,): for each element, where the first one that is equal stands."""
    distinct, index = torch.unique(key, return_inverse=True)
    places = torch.arange(len(key), device=key.device)
    return torch.full_like(distinct, len(key)).scatter_reduce(0, index, places, "amin")[index]
