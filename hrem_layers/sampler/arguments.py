"""What NeighborBatchSampler is given: features or labels, captions of each image, a state to go on from."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hrem_layers._core.checks import check_bool, check_int, describe, holds_values, said
from hrem_layers.sampler.arrays import Ints
from hrem_layers.sampler.epoch import State
from hrem_layers.sampler.features import check_features

_MOST = 2**62  # captions: so that sums of two numbers of them are int64


def check_source(image_features: object, cluster_ids: object) -> int:
    """The number of images; exactly one of the two must be given."""
    if (image_features is None) == (cluster_ids is None):
        raise ValueError(
            "exactly one of image_features and cluster_ids must be given, got "
            + ("neither" if image_features is None else "both")
        )
    if image_features is not None:
        return check_features(image_features)[0]
    return len(check_labels(cluster_ids))


def check_labels(cluster_ids: object) -> Ints:
    """A copy of the labels: (images,) integers of at least 0."""
    return _whole_numbers("cluster_ids", cluster_ids)


def check_counts(captions_per_image: object, images: int) -> Ints:
    """Captions of each image: (images,)."""
    if isinstance(captions_per_image, numbers.Integral | np.bool_):
        number = check_int("captions_per_image", captions_per_image, minimum=1, maximum=_MOST // images)
        return np.full(images, number, np.int64)
    counts = _whole_numbers("captions_per_image", captions_per_image)
    if len(counts) != images:
        raise ValueError(f"captions_per_image must be one number or one for each of {images} images, got {len(counts)}")
    if not counts.any():
        raise ValueError("captions_per_image must count at least one caption, got only zeros")
    if counts.sum(dtype=np.float64) > _MOST:
        raise ValueError("captions_per_image must count at most 2^62 captions in all, got more")
    return counts


def _whole_numbers(name: str, values: object) -> Ints:
    wanted = f"{name} must be a list, array or tensor of shape (images,) of integers of at least 0"
    array = _as_array(wanted, values)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{wanted}, got shape {array.shape}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{wanted}, got {array.dtype}")
    if array.min() < 0 or array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{wanted} and below 2^63, got {array.min()} .. {array.max()}")
    return array.astype(np.int64)  # a copy, always


def _as_array(wanted: str, values: object) -> npt.NDArray[np.generic]:
    if isinstance(values, Tensor):
        if not holds_values(values):
            raise TypeError(f"{wanted}, got {describe(values)}")
        if values.dtype.is_floating_point or values.dtype.is_complex:
            raise TypeError(f"{wanted}, got {values.dtype}")
        return values.detach().cpu().numpy()
    if isinstance(values, np.ma.MaskedArray) or not isinstance(values, np.ndarray | list | tuple | range):
        raise TypeError(f"{wanted}, got {type(values).__name__}")
    if isinstance(values, list | tuple):
        _check_elements(wanted, values)
    try:
        return np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise ValueError(f"{wanted}, got nested lists") from error


def _check_elements(wanted: str, values: Sequence[object]) -> None:
    """What numpy would turn into another number: True into 1, an int beyond int64 into a float or an object."""
    for index, value in enumerate(values):
        if isinstance(value, bool | np.bool_):
            raise TypeError(f"{wanted}, got bool at index {index}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{wanted} and below 2^63, got {said(value)} at index {index}")


def check_state(state: object, mine: State, steps: int) -> tuple[int, int]:
    """Epoch and batches done, of a state that fits a sampler with the state ``mine`` and so many batches per epoch."""
    if not isinstance(state, dict) or state.keys() != mine.keys():
        got = ", ".join(map(str, list(state)[:20])) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"state_dict must have the keys {', '.join(mine)}, got {got or 'none'}")
    for key, own in mine.items():
        name, value = f"state_dict[{key!r}]", state[key]
        if isinstance(own, bool):
            check_bool(name, value)
        else:
            check_int(name, value, minimum=0, maximum=2**128 - 1)
        if key not in ("epoch", "batches_done") and value != own:
            raise ValueError(f"state_dict is of another sampler: {key} is {own} here, {value} there")
    epoch = check_int("state_dict['epoch']", state["epoch"], minimum=0)
    done = check_int("state_dict['batches_done']", state["batches_done"], minimum=0, maximum=steps)
    return epoch, done
