"""Resuming: a checkpoint carries its best along, goes on with its own data only, and overwrites no other run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from example_runs import command, finish, results, start
from precomputed import write_folder

for package in ("tqdm", "tensorboard", "matplotlib"):
    pytest.importorskip(package, reason='the script needs pip install "hrem-layers[examples]"')

import checkpoint  # noqa: E402
import flickr30k  # noqa: E402
import run_folder  # noqa: E402
from pair_data import load_pairs  # noqa: E402

TINY = ("--embed-dim", "8", "--warmup-steps", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("precomputed"), train=16, dev=6, test=6)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    flickr30k.main(command(data, folder, "--epochs", "2", *TINY))
    return folder


def refused(arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as error:
        flickr30k.main(arguments)
    message = str(error.value.code)
    assert message.startswith("error: ") and "\n" not in message, message
    return message


# ---------------------------------------------------------------------------------------- the best


def test_into_a_new_folder_the_best_comes_along(data: Path, trained: Path, tmp_path: Path) -> None:
    """Also if no later epoch is as good, and if nothing but last.pt is left of the old folder."""
    state = checkpoint.load(trained / "last.pt")
    dev = {**state["history"][0]["dev"], "rsum": 600.0}
    state["history"][0] = {**state["history"][0], "dev": dev}
    state["best"] = {"epoch": 1, "rsum": 600.0, "model": {**state["best"]["model"]}}
    state["best"]["model"]["image_encoder.linear.bias"] = torch.full((8,), 0.125)
    state["rsum"] = 600.0
    checkpoint.save(tmp_path / "old" / "last.pt", state)
    new = tmp_path / "new"
    flickr30k.main(command(data, new, "--epochs", "3", *TINY, "--resume", str(tmp_path / "old" / "last.pt")))
    content = json.loads((new / "metrics.json").read_text())
    assert content["best_epoch"] == 1 and content["best_dev_rsum"] == 600.0
    assert [entry["epoch"] for entry in content["history"]] == [1, 2, 3]
    assert checkpoint.load(new / "best.pt")["model"]["image_encoder.linear.bias"].tolist() == [0.125] * 8
    assert content["run_id"] == state["run_id"] == checkpoint.load(new / "last.pt")["run_id"]


def test_the_same_numbers_in_a_new_folder(data: Path, trained: Path, tmp_path: Path) -> None:
    flickr30k.main(command(data, tmp_path / "whole", "--epochs", "3", *TINY))
    flickr30k.main(command(data, tmp_path / "new", "--epochs", "3", *TINY, "--resume", str(trained / "last.pt")))
    assert results(tmp_path / "new") == results(tmp_path / "whole")


def test_a_finished_run_is_evaluated_again(data: Path, trained: Path, tmp_path: Path) -> None:
    flickr30k.main(command(data, tmp_path / "new", "--epochs", "2", *TINY, "--resume", str(trained / "last.pt")))
    assert results(tmp_path / "new") == results(trained)


def test_encoders_for_evaluation_cannot_be_gone_on_from(data: Path, trained: Path, tmp_path: Path) -> None:
    arguments = command(data, tmp_path, "--epochs", "3", *TINY, "--resume", str(trained / "best.pt"))
    assert "best.pt: expected a checkpoint to go on from, found encoders for evaluation: give last.pt" in refused(
        arguments
    )


# ---------------------------------------------------------------------------------------- other runs


@pytest.mark.parametrize("left", ["last.pt", "best.pt", "metrics.json"])
def test_what_another_run_left_is_not_overwritten(data: Path, trained: Path, tmp_path: Path, left: str) -> None:
    shutil.copy(trained / left, tmp_path)
    before = (tmp_path / left).read_bytes()
    for more in ((), ("--resume", str(trained / "last.pt"))):
        assert re.search("holds (the checkpoint of )?another run", refused(command(data, tmp_path, *TINY, *more)))
    assert (tmp_path / left).read_bytes() == before


def test_curves_of_another_run_are_not_gone_on_with(data: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "tensorboard", tmp_path / "tensorboard")
    message = refused(command(data, tmp_path, "--epochs", "3", *TINY, "--resume", str(trained / "last.pt")))
    assert f"--output-dir {tmp_path} holds another run (tensorboard)" in message


def test_a_link_to_a_checkpoint_that_is_gone_is_no_new_start(data: Path, tmp_path: Path) -> None:
    (tmp_path / "last.pt").symlink_to(tmp_path / "gone")
    assert "last.pt: expected a checkpoint of this script, found no file" in refused(
        command(data, tmp_path, *TINY, "--resume")
    )


def test_metrics_that_do_not_load_are_written_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (b"", b"[]", b"\xff\xfe", b"[" * 10**5):
        (tmp_path / "metrics.json").write_bytes(content)
        assert run_folder._run_of(tmp_path / "metrics.json") is None
        assert "does not load, and will be overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("left", ["best.pt", "metrics.json"])
def test_what_is_of_another_run_in_the_own_folder_is_named(
    data: Path, trained: Path, tmp_path: Path, left: str
) -> None:
    state = {**checkpoint.load(trained / "last.pt"), "run_id": "another"}
    checkpoint.save(tmp_path / "last.pt", state)
    shutil.copy(trained / left, tmp_path)
    message = refused(command(data, tmp_path, "--epochs", "3", *TINY, "--resume"))
    assert re.search(rf"{left} is of another run \(\w+\) than \S+last\.pt \(another\)", message)


def test_a_folder_without_its_last_checkpoint(data: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "best.pt", tmp_path)
    assert "but no last.pt to go on from" in refused(command(data, tmp_path, *TINY, "--resume"))


def test_fewer_epochs_than_are_done(data: Path, trained: Path) -> None:
    message = refused(command(data, trained, "--epochs", "1", *TINY, "--resume"))
    assert re.search(r"--epochs 1: .*last\.pt has 2 epochs behind it already", message)


def test_two_runs_in_one_folder(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    script = "import sys, time, run_folder; from pathlib import Path\nwith run_folder.locked(Path(sys.argv[1])):\n"
    script += "    print('locked', flush=True); time.sleep(600)\n"
    (tmp_path / "holder.py").write_text(script)
    holder = start(str(tmp_path), script=tmp_path / "holder.py")
    try:
        assert holder.stdout.readline() == "locked\n"
        assert f"is in use by another run (process {holder.pid})" in refused(command(data, tmp_path, *TINY))
    finally:
        holder.kill()
        holder.communicate()
    with run_folder.locked(tmp_path):  # its end, by SIGKILL, has given the folder back
        pass


def test_folders_are_chosen_so_that_no_two_runs_share_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = [run_folder._next_free(Path("runs") / "emoji") for _ in range(3)]
    assert [str(folder) for folder in chosen] == ["runs/emoji", "runs/emoji-2", "runs/emoji-3"]


# ---------------------------------------------------------------------------------------- other data


def _captions(change: Callable[[list[str]], list[str]], split: str = "train") -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / f"{split}_caps.txt"
        path.write_text("\n".join(change(path.read_text().rstrip("\n").split("\n"))) + "\n")

    return apply


def _features(change: Callable[[np.ndarray], np.ndarray], *splits: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for split in splits:
            np.save(folder / f"{split}_ims.npy", change(np.load(folder / f"{split}_ims.npy")))

    return apply


def _twice(folder: Path) -> None:
    _features(lambda x: np.concatenate([x, x]), "train")(folder)
    _captions(lambda x: x + x)(folder)


SWAP = str.maketrans("dg", "gd")
CHANGES = {
    "captions reversed": (_captions(lambda x: x[::-1]), "train_caps.txt"),
    "other words, as many": (_captions(lambda x: [line.translate(SWAP) for line in x]), "train_caps.txt"),
    "one caption": (_captions(lambda x: [*x[:7], "A dog.", *x[8:]]), "train_caps.txt"),
    "captions of dev": (_captions(lambda x: x[::-1], "dev"), "dev_caps.txt"),
    "twice the images": (_twice, "train_ims.npy"),
    "images reversed": (_features(lambda x: x[::-1], "train"), "train_ims.npy"),
    "fewer regions": (_features(lambda x: x[:, :5], "train"), "train_ims.npy"),
    "narrower features": (_features(lambda x: x[..., :20], "train", "dev", "test"), "train_ims.npy"),
    "ids added": (lambda f: np.save(f / "train_ids.npy", np.arange(16) // 2), "train_ids.npy"),
    "lengths added": (lambda f: np.save(f / "train_lengths.npy", np.full(16, 4)), "train_lengths.npy"),
    "captions of test": (_captions(lambda x: x[::-1], "test"), "test_caps.txt"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_data_are_noticed_and_the_file_is_named(data: Path, trained: Path, tmp_path: Path, name: str) -> None:
    change, file = CHANGES[name]
    other = shutil.copytree(data, tmp_path / "data")
    change(other)
    message = refused(command(other, trained, "--epochs", "3", *TINY, "--resume"))
    assert "the data are not those that the run began with" in message
    assert f"{other / file} was " in message
    assert "state_dict" not in message


def test_one_number_of_one_image_is_noticed(tmp_path: Path) -> None:
    data = write_folder(tmp_path, train=100, dev=4, test=4)
    before = load_pairs(data, "train").fingerprint()
    features = np.load(data / "train_ims.npy")
    features[1, 2, 3] += 1
    np.save(data / "train_ims.npy", features)
    assert load_pairs(data, "train").fingerprint() != before


def test_the_same_data_elsewhere_are_the_same(data: Path, trained: Path, tmp_path: Path) -> None:
    other = shutil.copytree(data, tmp_path / "data")
    features = np.load(other / "train_ims.npy")
    np.save(other / "train_ims.npy", np.repeat(features, 5, axis=0))  # each image once per caption: the same images
    arguments = command(other, tmp_path / "new", "--epochs", "2", *TINY, "--resume", str(trained / "last.pt"))
    flickr30k.main(arguments)
    assert results(tmp_path / "new") == results(trained)


def test_other_word_vectors_are_noticed(data: Path, tmp_path: Path) -> None:
    vectors, more = tmp_path / "v.txt", ("--open-vocabulary", "--word-vectors", str(tmp_path / "v.txt"))
    vectors.write_text("dog 1 2 3\nzebra 4 5 6\n")
    flickr30k.main(command(data, tmp_path / "run", "--epochs", "1", *TINY, *more))
    for content in ("dog 1 2 3\ngnu 4 5 6\n", "dog 1 2\nzebra 4 5\n"):
        vectors.write_text(content)
        message = refused(command(data, tmp_path / "run", "--epochs", "2", *TINY, *more, "--resume"))
        assert re.search(r"the vocabulary was \d+ words with vectors of 3", message)


# ---------------------------------------------------------------------------------------- evaluation only


def test_eval_only_of_several_is_the_mean_of_their_similarities(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flickr30k.main(command(data, tmp_path / "other", "--epochs", "1", *TINY, "--seed", "1"))
    checkpoints = [str(trained / "best.pt"), str(tmp_path / "other" / "last.pt")]
    capsys.readouterr()
    flickr30k.main(["--eval-only", *checkpoints, "--output-dir", str(tmp_path / "both"), "--device", "cpu"])
    output = capsys.readouterr().out
    assert output.count("\nimage to text") == 3 and "mean similarity of 2 checkpoints" in output
    content = json.loads((tmp_path / "both" / "metrics.json").read_text())
    assert [member["checkpoint"] for member in content["members"]] == checkpoints
    assert content["members"][0]["test"] == results(trained)["test"]


def test_together_ranks_by_the_mean_cosine(data: Path) -> None:
    from evaluation import Evaluated, together

    pairs = load_pairs(data, "test")
    members = [Evaluated(None, 3.0 * torch.randn(6, d), torch.randn(30, d)) for d in (4, 7)]  # type: ignore[arg-type]
    both = together(members, pairs)
    cosine = torch.nn.functional.cosine_similarity
    mean = sum(cosine(m.images[:, None], m.texts[None], dim=2) for m in members) / 2
    torch.testing.assert_close(cosine(both.images[:, None], both.texts[None], dim=2), mean)


def test_eval_only_with_word_vectors_of_another_size_than_300(data: Path, tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("dog 1 2 3\ncat 4 5 6\n")
    flickr30k.main(command(data, tmp_path / "run", "--epochs", "1", *TINY, "--word-vectors", str(tmp_path / "v.txt")))
    (tmp_path / "v.txt").unlink()  # the checkpoint has them
    flickr30k.main(["--eval-only", str(tmp_path / "run" / "best.pt"), "--device", "cpu"])
    content = json.loads((tmp_path / "run" / "eval-test" / "metrics.json").read_text())
    assert content["test"] == results(tmp_path / "run")["test"]


def test_eval_only_lists_what_is_there_and_refuses_training_options(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flickr30k.main(["--eval-only", str(trained / "best.pt"), "--output-dir", str(tmp_path), "--device", "cpu"])
    assert f"written to {tmp_path}: metrics.json, report.png\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        flickr30k.main(["--eval-only", str(trained / "best.pt"), "--embed-dim", "64"])
    assert "these come from the checkpoint: --embed-dim" in capsys.readouterr().err


def test_eval_only_on_features_of_another_width(trained: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", train=8, dev=4, test=4, size=10)
    message = refused(["--eval-only", str(trained / "best.pt"), "--data-dir", str(other), "--device", "cpu"])
    assert re.search(r"test_ims\.npy: expected 24 features per region as \S*best\.pt takes, found 10", message)


@pytest.mark.slow
def test_eval_only_of_the_first_command_of_the_readme(tmp_path: Path) -> None:
    pytest.importorskip("emoji")
    common = ("--cache-dir", str(Path("~/.cache/hrem-layers").expanduser()), "--device", "cpu")
    finish(start("--epochs", "1", "--output-dir", str(tmp_path), *common))
    output = finish(start("--eval-only", str(tmp_path / "best.pt"), *common))
    assert "encoders of epoch 1" in output
    assert json.loads((tmp_path / "eval-test" / "metrics.json").read_text())["test"] == results(tmp_path)["test"]
