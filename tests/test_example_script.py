"""The example script as people run it: trains, is killed, resumes, evaluates, refuses what does not fit."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from example_runs import SCRIPT, TORCHRUN, command, finish, results, start, wait_for_checkpoint
from precomputed import write_folder

for package in ("tqdm", "tensorboard", "matplotlib"):
    pytest.importorskip(package, reason='the script needs pip install "hrem-layers[examples]"')

import checkpoint  # noqa: E402
import flickr30k  # noqa: E402
from options import parse_arguments  # noqa: E402
from retrieval_model import Words, build  # noqa: E402

from hrem_layers import HREMTerms  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("precomputed"))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), marks=pytest.mark.slow),
        ("--sampler", "neighbor", "--mechanism", "standalone", "--num-workers", "1"),
    ],
)
def test_killed_in_mid_epoch_and_resumed_ends_with_the_same_numbers(
    data: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    options = (*options, "--epochs", "4", "--checkpoint-every", "2")
    whole = start(*command(data, tmp_path / "whole", *options))
    killed = start(*command(data, tmp_path / "killed", *options))
    wait_for_checkpoint(killed, tmp_path / "killed" / "last.pt", epoch=1)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "metrics.json").exists()

    output = finish(start(*command(data, tmp_path / "killed", *options, "--resume")))
    assert re.search(r"resumed in epoch \d+ after [1-9]\d* steps", output)
    finish(whole)
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    flickr30k.main(command(data, folder, "--epochs", "3"))
    return folder


def test_learns_and_leaves_everything_behind(trained: Path) -> None:
    content = json.loads((trained / "metrics.json").read_text())
    assert content["test"]["i2t_r1"] > 5 * content["chance"]["i2t_r1"]
    assert content["test"]["t2i_r1"] > 5 * content["chance"]["t2i_r1"]
    assert len(content["history"]) == 3
    assert content["best_dev_rsum"] == max(entry["dev"]["rsum"] for entry in content["history"])
    assert (trained / "report.png").stat().st_size > 10_000

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"loss/{name}" for name in HREMTerms._fields} <= tags
    assert {"learning_rate/lr", "dev/i2t_r1", "dev/t2i_r10", "dev/rsum"} <= tags


def test_eval_only_prints_what_training_printed(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flickr30k.main(["--eval-only", str(trained / "best.pt"), "--output-dir", str(tmp_path), "--device", "cpu"])
    assert "image to text" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.json").read_text())["test"] == results(trained)["test"]


def test_the_best_epoch_is_chosen_on_dev(trained: Path) -> None:
    best, last = checkpoint.load(trained / "best.pt"), checkpoint.load(trained / "last.pt")
    rsums = [entry["dev"]["rsum"] for entry in last["history"]]
    assert best["sampler"]["epoch"] == 1 + rsums.index(max(rsums))
    assert any(key.startswith("loss.graph.mlp_i2t") for key in last["model"])
    assert any(key.startswith("loss.interaction") for key in last["model"])


def test_a_folder_with_a_run_is_not_overwritten(data: Path, trained: Path) -> None:
    with pytest.raises(SystemExit, match="holds the checkpoint of another run: give --resume"):
        flickr30k.main(command(data, trained, "--epochs", "1"))


def test_resuming_with_other_options_says_which(data: Path, trained: Path) -> None:
    with pytest.raises(SystemExit, match=r"--seed was 0 and is now 7"):
        flickr30k.main(command(data, trained, "--epochs", "3", "--resume", "--seed", "7"))


def test_resume_trains_on_to_more_epochs(data: Path, trained: Path, tmp_path: Path) -> None:
    flickr30k.main(command(data, tmp_path, "--epochs", "4", "--resume", str(trained / "last.pt")))
    assert [entry["epoch"] for entry in results(tmp_path)["history"]] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "options",
    [
        ("--mechanism", "standalone"),
        ("--mechanism", "none"),
        ("--pair-loss", "infonce", "--amp", "bf16"),
        ("--negatives", "expected", "--sampler", "neighbor"),
        ("--candidates", "8"),
    ],
    ids=" ".join,
)
def test_options_train(data: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    flickr30k.main(command(data, tmp_path / "run", "--epochs", "2", *options))
    content = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert content["test"]["rsum"] > 200  # chance: 146
    assert np.isfinite([entry["loss"] for entry in content["history"]]).all()


def test_bert_from_a_local_folder(data: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    words = sorted(
        {
            w
            for line in (data / "train_caps.txt").read_text().lower().split("\n")
            for w in re.findall(r"\w+|'|\.|,", line)
        }
    )
    (tmp_path / "bert").mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    transformers.BertTokenizer(str(tmp_path / "bert" / "vocab.txt")).save_pretrained(tmp_path / "bert")
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    options = ("--epochs", "1", "--text-encoder", "bert", "--bert", str(tmp_path / "bert"))
    flickr30k.main(command(data, tmp_path / "run", *options))
    optimizer = checkpoint.load(tmp_path / "run" / "last.pt")["optimizer"]
    assert [group["name"] for group in optimizer["param_groups"]] == ["lr", "lr_bert"]
    assert optimizer["param_groups"][1]["lr"] == pytest.approx(0.1 * optimizer["param_groups"][0]["lr"])


def step_losses(folder: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars("loss/total")]


@pytest.mark.parametrize("mechanism", ["fusion", pytest.param("none", marks=pytest.mark.slow)])
def test_two_processes_equal_one(data: Path, tmp_path: Path, mechanism: str) -> None:
    """30 steps, of fusion the last 18 with all terms, up to float32's order of summation."""
    options = ("--epochs", "2", "--dropout", "0", "--negatives", "hardest", "--log-every", "1")
    options = (*options, "--mechanism", mechanism)
    alone = start(*command(data, tmp_path / "one", *options))
    both = start(*command(data, tmp_path / "two", *options), launcher=TORCHRUN)
    finish(alone), finish(both)
    losses = step_losses(tmp_path / "one")
    assert len(losses) == 30
    assert step_losses(tmp_path / "two") == pytest.approx(losses, rel=1e-5)

    one, two = (checkpoint.load(tmp_path / name / "last.pt") for name in ("one", "two"))
    for name, weight in one["model"].items():
        # biases of keys and in front of batch norm change nothing: their gradient is 0 up to rounding, of which AdamW
        # makes steps of full length
        if not re.search(r"in_proj_bias|mlp_in\.bias|running_mean", name):
            torch.testing.assert_close(two["model"][name], weight, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(one["history"], two["history"], strict=True):
        # all but the rank of one dev image (100 / 24), should two similarities be as good as equal
        assert b["dev"]["rsum"] == pytest.approx(a["dev"]["rsum"], abs=4.2)


def test_candidates_reach_the_graph(data: Path, tmp_path: Path) -> None:
    arguments = parse_arguments(command(data, tmp_path, "--candidates", "8"))
    graph = build(arguments, 24, Words(["dog"])).model.loss.graph
    assert graph.candidates == 8 and graph.alignment == "scan"


def test_help_explains_every_option() -> None:
    text = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True).stdout
    options = re.findall(r"^  (--[a-z-]+)(.*(?:\n   +.*)*)", text, flags=re.M)
    assert len(options) > 30
    for name, explanation in options:
        assert re.search(r"[a-z]{3,}", re.sub(r"\{.*?\}|[A-Z_]{2,}", "", explanation)), name


def test_a_kill_while_saving_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"arguments": {}, "x": torch.ones(3)})

    def half(state: dict, file) -> None:
        file.write(b"half of a checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"arguments": {}, "x": torch.zeros(3)})
    assert checkpoint.load(path)["x"].tolist() == [1, 1, 1]


def test_random_state_round_trip(tmp_path: Path) -> None:
    import random

    checkpoint.save(tmp_path / "state.pt", {"arguments": {}, "random": checkpoint.random_state()})
    first = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    checkpoint.restore_random_state(checkpoint.load(tmp_path / "state.pt")["random"])
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == first


@pytest.mark.parametrize("content", [None, b"no checkpoint", "other"])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save({"weights": torch.ones(1)}, path)
    with pytest.raises((FileNotFoundError, ValueError), match=rf"{re.escape(str(path))}: expected a checkpoint"):
        checkpoint.load(path)
