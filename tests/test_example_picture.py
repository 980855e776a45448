"""What a run leaves behind: its picture, saved embeddings, TensorBoard's last entries; several lists of captions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import flickr30k
import picture
from example_runs import command, results
from pair_data import DataError, load_pairs
from precomputed import write_folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ragged regions in float16, pictures with an owner, and a second list of captions of training images."""
    folder = write_folder(tmp_path_factory.mktemp("precomputed"), train=32, dev=8, test=8, repeat=())
    for split, n in (("train", 32), ("dev", 8), ("test", 8)):
        path = folder / f"{split}_ims.npy"
        np.save(path, np.load(path).astype(np.float16))
        np.save(folder / f"{split}_lengths.npy", np.arange(n) % 4 + 3)
    np.save(folder / "test_pictures.npy", np.zeros((8, 4, 4, 3), np.uint8))
    (folder / "metadata.json").write_text(json.dumps({"attribution": "Art: by somebody"}))
    (folder / "train_long.txt").write_text("".join(f"long {i} a\nlong {i} b\n" for i in range(32)))
    return folder


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    flickr30k.main(command(data, folder, "--epochs", "1", "--captions", "caps", "long", "--save-embeddings"))
    return folder


def test_saved_embeddings_give_the_printed_recalls(data: Path, trained: Path) -> None:
    images, texts = (np.load(trained / f"test_{side}_embeddings.npy") for side in ("image", "text"))
    assert images.dtype == texts.dtype == np.float32 and images.shape == (8, 32) and texts.shape == (40, 32)
    for x in (images, texts):
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)
    first = (images @ texts.T).argmax(axis=1) // 5
    assert results(trained)["test"]["i2t_r1"] == pytest.approx(100 * np.mean(first == np.arange(8)))


def test_embeddings_of_several_checkpoints_multiply_to_the_mean_similarity(trained: Path, tmp_path: Path) -> None:
    best, last = str(trained / "best.pt"), str(trained / "last.pt")
    flickr30k.main(["--eval-only", best, last, "--output-dir", str(tmp_path), "--device", "cpu", "--save-embeddings"])
    both, one = ([np.load(f / f"test_{s}_embeddings.npy") for s in ("image", "text")] for f in (tmp_path, trained))
    assert both[0].shape == (8, 64)
    np.testing.assert_allclose(both[0] @ both[1].T, one[0] @ one[1].T, atol=1e-5)  # of the same weights twice


def test_tensorboard_has_the_picture_and_the_final_figures(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert "test/picture" in tags["images"] and "test/rsum" in tags["scalars"]
    assert any("hparams" in plugin for plugin in events.summary_metadata) or "_hparams_/experiment" in str(
        events.summary_metadata
    )
    final = events.Scalars("test/i2t_r1")[-1].value
    assert final == pytest.approx(results(trained)["test"]["i2t_r1"])


# ---------------------------------------------------------------------------------------- lists of captions
def test_captions_of_all_lists_stand_together_image_by_image(data: Path) -> None:
    pairs, alone = load_pairs(data, "train", 5, ("caps", "long")), load_pairs(data, "train")
    assert pairs.captions_per_image == 7 and pairs.num_images == 32
    assert pairs.captions[7:12] == alone.captions[5:10] and pairs.captions[12:14] == ["long 1 a", "long 1 b"]
    assert load_pairs(data, "test", 5, ("caps", "long")).captions == load_pairs(data, "test").captions


def test_a_list_of_another_length_or_of_no_split_is_named(data: Path, tmp_path: Path) -> None:
    (data / "dev_odd.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match=r"dev_odd\.txt: expected as many captions for each of 8 images, found 2 lines"):
        load_pairs(data, "dev", 5, ("caps", "odd"))
    with pytest.raises(SystemExit, match=r"--captions none: expected train_none\.txt"):
        flickr30k.main(command(data, tmp_path / "run", "--captions", "caps", "none"))
    with pytest.raises(SystemExit, match=r"train_gone\.txt: expected a file, found none"):
        flickr30k.main(command(data, tmp_path / "run", "--captions", "gone"))


# ---------------------------------------------------------------------------------------- the picture
def test_positions_are_those_of_a_sort_and_equal_ids_are_right() -> None:
    torch.manual_seed(0)
    queries, answers = torch.randn(300, 5), torch.randn(40, 5)
    query_ids, answer_ids = torch.arange(300) % 20, torch.arange(40) % 20
    found = picture.find(queries, answers, query_ids, answer_ids, 3)
    order = (torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(answers).t()).argsort(1, True)
    right = answer_ids[order] == query_ids.unsqueeze(1)
    assert found.positions.tolist() == (1 + right.float().argmax(dim=1)).tolist()
    assert found.best.tolist() == order[:, :3].tolist()


@pytest.mark.parametrize("count", [1, 3, 6, 50])
def test_best_typical_and_worst_are_what_they_say(count: int) -> None:
    positions = np.random.default_rng(1).integers(1, 30, count)
    chosen = picture.choose(positions)
    by_kind = {kind: [positions[q] for k, q in chosen if k == kind] for kind in ("best", "typical", "worst")}
    assert positions.min() in by_kind["best"] and positions.max() in by_kind["worst"]
    assert min(abs(p - np.median(positions)) for p in by_kind["typical"]) <= 1 or count < 10
    assert max(by_kind["best"]) <= min(by_kind["worst"]) or count < 4


def test_relations_are_drawn_from_the_end_of_the_warmup() -> None:
    from matplotlib.figure import Figure

    history = [{"epoch": i + 1, "steps": 3, "base_loss": 2.0, "relational_loss": x} for i, x in enumerate((0.0, 4.0))]
    axes = Figure().subplots()
    picture.draw_losses(axes, history, warmup_steps=3)
    relations = axes.lines[1].get_ydata()
    assert np.isnan(relations[0]) and relations[1] == 4


def test_the_picture_says_whose_the_art_is_and_what_chance_is(data: Path, tmp_path: Path, monkeypatch) -> None:
    import matplotlib.pyplot as plt

    kept: list[str] = []
    close = plt.close

    def look(figure) -> None:  # type: ignore[no-untyped-def]
        kept.extend(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))
        close(figure)

    monkeypatch.setattr(plt, "close", look)
    pairs = load_pairs(data, "test")
    torch.manual_seed(0)
    images, texts = torch.randn(8, 4), torch.randn(40, 4)
    from hrem_layers.retrieval import retrieval_metrics

    metrics = retrieval_metrics(images, texts, captions_per_image=5)
    dev = {f"{d}_r{k}": 10.0 for d in ("i2t", "t2i") for k in (1, 5, 10)}
    history = [{"epoch": 1, "steps": 3, "loss": 2.0, "base_loss": 1.5, "relational_loss": 0.5, "dev": dev}]
    history[0]["dev_images"] = 8
    pictures = np.zeros((8, 4, 4, 3), np.uint8)
    picture.draw(
        tmp_path / "p.png", history, pairs, images, texts, metrics, pictures, warmup_steps=2, attribution="Art: X"
    )
    said = "\n".join(kept)
    for expected in ("Art: X", "at random: 12.5%", "R@1 at random", "warm-up", "plain embeddings", "relations",
                     "best:", "typical:", "worst:", "true:", "✓", "✗"):  # fmt: skip
        assert expected in said, expected
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_seeds_are_summed_up_by_mean_and_range(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import seeds

    for mechanism, rise in (("fusion", 10.0), ("none", 0.0)):
        for seed, value in enumerate((20.0, 23.0)):
            folder = tmp_path / f"{mechanism}-{seed}"
            folder.mkdir()
            test = {"i2t_r1": value + rise, "t2i_r1": value, "rsum": 200.0}
            (folder / "metrics.json").write_text(json.dumps({"test": test}))
    seeds.main(["--seeds", "0", "1", "--output-dir", str(tmp_path)])
    said = capsys.readouterr().out
    assert "| `fusion` | 31.5 (30.0 to 33.0) | 21.5 (20.0 to 23.0) | 200.0 (200.0 to 200.0) | 2 |" in said
    assert "| `none` | 21.5 (20.0 to 23.0) |" in said
    with pytest.raises(SystemExit) as ended:
        seeds.main(["--seeds", "7", "--output-dir", str(tmp_path), "--epochs", "0"])
    assert ended.value.code == 2
    for content in ("", "[]", '{"test": {}}'):
        (tmp_path / "none-0" / "metrics.json").write_text(content)
        with pytest.raises(SystemExit, match=r"error: \S+metrics\.json: expected the figures of a run"):
            seeds.main(["--seeds", "0", "--output-dir", str(tmp_path)])
