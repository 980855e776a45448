"""The instrument's encoders that train from scratch, and its soft targets."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.evidence import encoders, folders, soft_targets, synthetic
from benchmarks.evidence.__main__ import draw_settings, label
from benchmarks.evidence.loaded import load
from benchmarks.evidence.rows import ROWS
from benchmarks.evidence.training import evaluate, train
from hrem_layers import InfoNCELoss
from hrem_layers._core.numerics import l2_normalize

SIZES = (40, 20, 20)
SETTINGS = {**draw_settings(0), "batch": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs")
    synthetic.write(path, sizes=SIZES, regions=5, dim=16)
    random = np.random.default_rng(0)
    for name, size in zip(("train", "dev", "test"), SIZES, strict=True):
        np.save(path / f"{name}_pixels.npy", random.integers(256, size=(size, 32, 32, 3), dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def data(folder):
    return load(folder, 1, pixels=True)


@pytest.mark.parametrize("row", ["base", "relations_gated_infonce"])
def test_encoders_train_and_their_text_side_learns_the_word_vectors_too(data, row):
    t = train(data, ROWS[row], SETTINGS, seed=0, epochs=2, encoders="trainable")
    m = evaluate(*t.model.embed(data.dev), data.dev.owner)
    assert 0 < m["rsum"] <= 600
    assert not torch.equal(t.model.words.weight[1:], data.vectors[1:]) and not t.model.words.weight[0].any()
    again = train(data, ROWS[row], SETTINGS, seed=0, epochs=2, encoders="trainable")
    others = again.model.state_dict()
    assert all(torch.equal(x, others[name]) for name, x in t.model.state_dict().items())


def test_regions_are_sixteen_and_padding_of_captions_changes_nothing(data):
    torch.manual_seed(0)
    model = encoders.make_pair("trainable", data, 0.1).eval()
    tokens = data.dev.tokens
    v, u, regions, words = model(model.pictures(data.dev), tokens)
    assert regions.shape == (20, 16, encoders.DIM) and words.shape == (*tokens.shape, encoders.DIM)
    wider = torch.nn.functional.pad(tokens, (0, 3))
    torch.testing.assert_close(model.encode_texts(wider)[0], u, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.encode_images(data.dev.pixels)[0], v)  # nothing is moved outside of training


def test_pictures_move_in_training_and_stay_within_white():
    torch.manual_seed(0)
    x = torch.rand(64, 3, 32, 32) - 2  # below white, which is 1
    moved = [encoders._moved(x) for _ in range(8)]
    assert all(m.shape == x.shape for m in moved) and not torch.equal(moved[0], moved[1])
    assert any((m == 1).any() for m in moved)
    for m in moved:  # every picture keeps its pixels but for what left at the border
        assert torch.isin(m[m != 1], x).all()


def test_pixels_that_are_not_there_are_named(folder, data, tmp_path):
    with pytest.raises(ValueError, match="data: expected pixels, got none"):
        encoders.make_pair("trainable", load(folder, 1), 0.1)
    with pytest.raises(ValueError, match="encoders: expected one of heads, trainable, got 'big'"):
        encoders.make_pair("big", data, 0.1)
    synthetic.write(tmp_path, sizes=SIZES, regions=5, dim=16)
    with pytest.raises(ValueError, match=r"train_pixels\.npy of shape \(40, s, s, 3\)"):
        load(tmp_path, 1, pixels=True)
    np.save(tmp_path / "train_pixels.npy", np.zeros((40, 32, 31, 3), np.uint8))
    with pytest.raises(ValueError, match=r"got \(40, 32, 31, 3\)"):
        load(tmp_path, 1, pixels=True)


def test_pictures_without_a_source_are_refused(tmp_path):
    (tmp_path / "synthetic-pairs").mkdir()
    (tmp_path / "synthetic-pairs" / "whole").touch()
    with pytest.raises(
        ValueError, match="--encoders trainable: expected one of icons, openclipart, stamps or a folder"
    ):
        folders.prepare_pixels("synthetic", tmp_path)


def test_a_share_of_the_images_takes_their_pixels_along(folder, data):
    few = load(folder, 1, pixels=True, share=0.5)
    # in synthetic data a caption tells its image
    places = [(data.train.tokens == x).all(dim=1).nonzero().flatten().tolist() for x in few.train.tokens]
    assert len(few.train.pixels) == 20
    for pixels, found in zip(few.train.pixels, places, strict=True):
        assert any(torch.equal(pixels, data.train.pixels[i]) for i in found)


def test_regions_that_are_not_there_change_nothing(folder, tmp_path):
    """A folder whose images are padded to one more region gives the same model and the same embeddings."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in ("train", "dev", "test"):
        images = np.load(folder / f"{name}_ims.npy")
        np.save(tmp_path / f"{name}_ims.npy", np.concatenate([images, images[:, :1]], axis=1))
        np.save(tmp_path / f"{name}_lengths.npy", np.full(len(images), images.shape[1]))
    for row in ("relations_gated", "soft_relations_infonce", "neighbors_all"):
        even, padded = (load(path, 1) for path in (folder, tmp_path))
        assert padded.train.region_mask.sum() == padded.train.region_mask.numel() * 5 / 6
        a, b = (
            train(d, ROWS[row], {**SETTINGS, "dropout": 0.0, "images_per_cluster": 2}, seed=0, epochs=1).model.embed(
                d.dev
            )
            for d in (even, padded)
        )
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_label_names_the_encoders():
    assert label("icons", noise=0.4, share=1, encoders="trainable") == "icons+trainable+noise40"


# ---------------------------------------------------------------- soft targets
@pytest.mark.parametrize("teacher", soft_targets.TEACHERS)
def test_soft_targets_train(data, teacher):
    t = train(data, ROWS[f"soft_{teacher}_infonce"], SETTINGS, seed=0, epochs=1)
    assert all(p.isfinite().all() for p in t.model.parameters())


@pytest.mark.parametrize("teacher", ["words", "within", "across"])
def test_soft_targets_of_share_zero_are_infonce(teacher, monkeypatch):
    v, u, words = torch.randn(6, 8), torch.randn(6, 8), torch.randn(6, 3, 5)
    owner, mask = torch.tensor([0, 1, 2, 2, 3, 4]), torch.ones(6, 3, dtype=torch.bool)
    loss = soft_targets.SoftTargetLoss(teacher, 0.1)
    softened = loss(v, u, words, words, None, mask, owner, words)
    monkeypatch.setattr(soft_targets, "SHARE", 0.0)
    hard = loss(v, u, words, words, None, mask, owner, words)
    expected = InfoNCELoss(0.1)(l2_normalize(v) @ l2_normalize(u).t(), owner.unsqueeze(1) == owner)
    torch.testing.assert_close(hard, expected)
    assert not torch.isclose(softened, expected)


def test_teacher_of_relations_sends_no_gradient_to_the_encoders(monkeypatch):
    monkeypatch.setattr(soft_targets, "SHARE", 0.0)  # what is left of the encoders' gradient is that of InfoNCE
    torch.manual_seed(0)
    from benchmarks.evidence.training import make_loss

    loss = make_loss(ROWS["soft_relations_infonce"], SETTINGS)
    assert loss.hrem.graph.exclude_positives
    v, u = torch.randn(6, encoders.DIM, requires_grad=True), torch.randn(6, encoders.DIM, requires_grad=True)
    fragments = torch.randn(6, 3, encoders.DIM, requires_grad=True)
    owner, mask = torch.arange(6), torch.ones(6, 3, dtype=torch.bool)
    loss(v, u, fragments, fragments, None, mask, owner, fragments).backward()
    got, v.grad = v.grad, None
    InfoNCELoss(SETTINGS["temperature"])(
        l2_normalize(v) @ l2_normalize(u).t(), torch.eye(6, dtype=torch.bool)
    ).backward()
    torch.testing.assert_close(got, v.grad)
    assert fragments.grad is None and any(p.grad is not None and p.grad.any() for p in loss.hrem.parameters())


def test_teachers_are_checked():
    with pytest.raises(ValueError, match=r"teacher: expected one of words, within, across, relations, .* got 'x'"):
        soft_targets.SoftTargetLoss("x", 0.1)
    with pytest.raises(ValueError, match="relations with hrem"):
        soft_targets.SoftTargetLoss("relations", 0.1)
