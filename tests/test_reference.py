"""The formulas written out as loops, on numbers that can be checked by hand."""

from __future__ import annotations

import pytest
import torch

from hrem_layers.alignment.reference import align_by_loops

X, Y = [1.0, 0.0], [0.0, 1.0]
DIAGONAL = [3.0, 4.0]


def pair(regions, words, **options):
    tensors = (torch.tensor([x], dtype=torch.float64).requires_grad_() for x in (regions, words))
    return align_by_loops(*tensors, **options)


def test_cosine_by_hand():
    out = pair([X, Y], [DIAGONAL], topk=3)
    assert out.mean_t2i.tolist() == [[pytest.approx(0.8)]]  # the word's best region
    assert out.top_t2i.tolist() == [[[pytest.approx(0.8), 0, 0]]]
    assert out.mean_i2t.tolist() == [[pytest.approx(0.7)]]
    assert out.top_i2t[0, 0].tolist() == pytest.approx([0.8, 0.6, 0])


def test_dot_by_hand():
    out = pair([X, Y], [DIAGONAL], topk=1, mode="dot")
    assert out.mean_i2t.tolist() == [[3.5]]
    assert out.top_t2i.tolist() == [[[4.0]]]


def test_scan_by_hand():
    # one region, words at cosines 0.6 and -0.8, after the LeakyReLU 0.6 and -0.08
    out = pair([X], [DIAGONAL, [-4.0, 3.0]], topk=2, mode="scan")
    norm = (0.6**2 + 0.08**2) ** 0.5
    assert out.top_t2i[0, 0].tolist() == pytest.approx([0.6 / norm, -0.08 / norm])  # over the words
    assert out.mean_i2t.item() == pytest.approx(1)  # 0.6 / |0.6|: over the one region


def test_masks_leave_out():
    masks = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    out = pair([X, DIAGONAL], [X, Y], image_mask=masks[0], text_mask=masks[1], topk=2, mode="dot")
    assert out.mean_i2t.item() == out.mean_t2i.item() == 0  # X · Y
    empty = pair([X], [Y], text_mask=torch.tensor([[False]]))
    assert not any(x.any() for x in empty)


def test_ties_share_evenly():
    images = torch.tensor([[X, X, Y]], dtype=torch.float64).requires_grad_()
    texts = torch.tensor([[X]], dtype=torch.float64).requires_grad_()
    out = align_by_loops(images, texts, topk=1, mode="dot")
    (grad,) = torch.autograd.grad(out.mean_t2i.sum(), images, retain_graph=True)
    assert grad[0].tolist() == [[0.5, 0], [0.5, 0], [0, 0]]
    (grad,) = torch.autograd.grad(out.top_i2t.sum(), images)
    assert grad[0].tolist() == [[0.5, 0], [0.5, 0], [0, 0]]
