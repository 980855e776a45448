"""Small faults in retrieval that other tests did not notice: each test here notices one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hrem_layers import retrieval_metrics, retrieval_metrics_from_similarity
from hrem_layers.losses import triplet_loss
from hrem_layers.retrieval.matching import repeated_rows
from hrem_layers.retrieval.screening import FIXED_POINT_ONE, error_bound, float32_is_exact_enough


def test_a_negative_number_of_captions_is_named_wherever_it_stands() -> None:
    with pytest.raises(ValueError, match="captions_per_image must be at least 0, got -1 for image 1"):
        retrieval_metrics(torch.randn(3, 4), torch.randn(5, 4), captions_per_image=[3, -1, 3])


@pytest.mark.parametrize("values", [np.ones((2, 2), np.longdouble), np.ones((2, 2), int), np.ones((2, 2), complex)])
def test_numpy_arrays_of_other_types_are_refused_by_name(values: np.ndarray) -> None:
    if values.dtype == np.float64:
        pytest.skip("here a long double is a float64")
    with pytest.raises(TypeError, match="similarity must be float16, float32 or float64"):
        retrieval_metrics_from_similarity(values)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f8"])
def test_numpy_arrays_of_every_float_are_read(dtype: str) -> None:
    assert retrieval_metrics_from_similarity(np.eye(3).astype(dtype)).rsum == 600


def test_progress_must_be_callable_and_is_called() -> None:
    seen = []
    retrieval_metrics(torch.eye(4), torch.eye(4), progress=lambda done, total: seen.append((done, total)))
    assert seen and seen[-1][0] == seen[-1][1]
    with pytest.raises(TypeError, match=r"progress must be callable as progress\(done, total\), got"):
        retrieval_metrics(torch.eye(4), torch.eye(4), progress=3)  # type: ignore[arg-type]


def test_repeated_rows_are_counted_and_their_runs_found() -> None:
    rows = torch.randn(5, 7)
    assert repeated_rows(rows) == (0, None)
    assert repeated_rows(rows.repeat_interleave(3, dim=0)) == (10, 3)
    assert repeated_rows(torch.cat([rows, rows])) == (5, None)
    many = torch.randn(300, 2)  # rows of which single elements are equal are not equal
    many[:, 0] = 1.0
    assert repeated_rows(many) == (0, None)
    assert repeated_rows(torch.cat([many, many[7:8]])) == (1, None)


@pytest.mark.parametrize("width", [1, 3, 64, 1000])
def test_the_bound_holds_for_the_longest_rows_that_rounding_makes(width: int) -> None:
    longest = FIXED_POINT_ONE + width**0.5 / 2  # a unit vector, every element rounded up by half
    assert error_bound(width) > longest**2 * 2.0**-24


def test_cutoffs_of_distances_end_at_two() -> None:
    with pytest.raises(ValueError, match="nonzero_cutoff"):
        triplet_loss(torch.randn(3, 3), torch.eye(3, dtype=torch.bool), nonzero_cutoff=2.5)


@pytest.mark.parametrize("noise", [1e-7, 3e-6])
def test_copies_of_an_image_that_other_batches_gave_other_last_bits_are_warned_of(noise: float) -> None:
    images = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).repeat_interleave(5, dim=0)
    images = images + noise * torch.randn(40, 16, generator=torch.Generator().manual_seed(2))
    with pytest.warns(UserWarning, match=r"32 of 40 rows .* but for rounding.* pass image_embedding\[::5\] with"):
        retrieval_metrics(images, images)


@pytest.mark.filterwarnings("error")
def test_images_that_are_alike_are_no_copies() -> None:
    images = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).repeat_interleave(5, dim=0)
    uneven = torch.cat([images[:5], images[5:] + 1e-6 * torch.randn(35, 16)])[:-1]
    for rows in (images + 1e-2 * torch.randn(40, 16), uneven[4:], torch.ones(6, 16) + 1e-6 * torch.randn(6, 16)):
        retrieval_metrics(rows, rows)


def test_an_image_of_no_captions_is_an_error_or_a_distractor() -> None:
    images, texts = torch.eye(2), torch.eye(2)[[1, 1, 1]]
    with pytest.raises(ValueError, match="captions_per_image: 1 of 2 images have no text"):
        retrieval_metrics(images, texts, captions_per_image=[0, 3])
    assert retrieval_metrics(images, texts, captions_per_image=[0, 3], unmatched="distractor").i2t.num_queries == 1


def test_a_cpu_multiplies_float32_as_such_unless_told_otherwise() -> None:
    """Where it does not, all is multiplied in float64, with the same result and in more time."""
    assert torch.get_float32_matmul_precision() == "highest"
    assert float32_is_exact_enough(torch.randn(3, 4))
