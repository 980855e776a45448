"""Checkpoints of the example script: what differs by a bit, lacks a key or holds a wrong value is refused by name."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_runs import command
from precomputed import write_folder

for package in ("tqdm", "tensorboard", "matplotlib"):
    pytest.importorskip(package, reason='the script needs pip install "hrem-layers[examples]"')

import checkpoint  # noqa: E402
import flickr30k  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("precomputed"), train=16, dev=6, test=6)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    flickr30k.main(command(data, folder, "--epochs", "2", "--embed-dim", "8", "--warmup-steps", "1"))
    return folder


def options(trained: Path, data: Path, *more: str) -> list[str]:
    return command(data, trained, "--epochs", "3", "--embed-dim", "8", "--warmup-steps", "1", "--resume", *more)


# ---------------------------------------------------------------------------------------- the file


def test_it_is_a_zip_that_torch_loads(trained: Path) -> None:
    assert torch.load(trained / "last.pt", weights_only=True).keys() == checkpoint.load(trained / "last.pt").keys()


def positions(size: int) -> list[int]:
    """Of bits, in the seal and the last record, in the first header, in the directory and anywhere; always the same."""
    random = np.random.default_rng(0)
    end = 8 * (checkpoint.SEAL + checkpoint.END)
    directory = range(8 * size - end - 8 * 2000, 8 * size - end, 61)
    return [*range(8 * size - end, 8 * size, 3), *range(0, 8 * 64, 7), *directory, *random.integers(8 * size, size=200)]


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_every_flipped_bit_is_noticed(trained: Path, tmp_path: Path, name: str) -> None:
    whole = (trained / name).read_bytes()
    path = tmp_path / name
    for position in positions(len(whole)):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(checkpoint.Damaged, match=rf"^{re.escape(str(path))}: expected a checkpoint") as error:
            checkpoint.load(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[: len(x) // 2],
        lambda x: x[:-1],
        lambda x: x + b"\0",
        lambda x: x[: -checkpoint.SEAL],
        lambda _: b"",
        lambda x: bytes(len(x)),
    ],
)
def test_what_is_cut_or_lengthened_is_refused(trained: Path, tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(change((trained / "last.pt").read_bytes()))
    with pytest.raises(checkpoint.Damaged, match=r"last\.pt: expected a checkpoint"):
        checkpoint.load(path)


def test_without_a_seal_the_archives_checksums_are_checked(trained: Path, tmp_path: Path) -> None:
    state = checkpoint.load(trained / "best.pt")
    torch.save(state, tmp_path / "plain.pt")
    assert checkpoint.load(tmp_path / "plain.pt")["run_id"] == state["run_id"]
    damaged = bytearray((tmp_path / "plain.pt").read_bytes())
    weight = next(x for x in state["model"].values() if x.numel() > 20).numpy().tobytes()
    damaged[bytes(damaged).index(weight) + 3] ^= 0x40
    (tmp_path / "plain.pt").write_bytes(damaged)
    with pytest.raises(checkpoint.Damaged, match=r"plain\.pt: .*the checksum of .* does not fit"):
        checkpoint.load(tmp_path / "plain.pt")


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (Path.touch, (tmp_path / "touched",))  # type: ignore[return-value]

    torch.save({"arguments": {}, "model": Bomb()}, tmp_path / "last.pt")
    with pytest.raises(checkpoint.Damaged, match="does not load"):
        checkpoint.load(tmp_path / "last.pt")
    assert not (tmp_path / "touched").exists()


# ---------------------------------------------------------------------------------------- its contents


def set_at(state: dict[str, Any], key: str, value: Any) -> None:
    """``key`` with dots between the levels; a callable value is given what was there."""
    *outer, last = key.split(".")
    for name in outer:
        state = state[int(name) if name.isdecimal() else name]  # type: ignore[index]
    place: Any = int(last) if last.isdecimal() else last
    if value is DELETED:
        del state[place]
    else:
        state[place] = value(state[place]) if callable(value) else value


DELETED = object()
WEIGHT = "image_encoder.linear.weight"
KEYS = [
    "format", "run_id", "vocabulary", "data", "model", "optimizer", "scheduler", "scaler", "sampler", "sampler.epoch",
    "sampler.batches_done", "total_steps", "loss_sums", "loss_sums.base", "history", "history.0.dev", "history.1.loss",
    "best", "best.model", "best.epoch", "best.rsum", "random", "rsum", "arguments.embed_dim", "arguments.lr",
    "optimizer.param_groups", "optimizer.state", "scheduler.last_epoch",
]  # fmt: skip


def resume_is_refused(data: Path, trained: Path, folder: Path, state: dict[str, Any], key: str) -> None:
    """With one line that names the file and the key."""
    folder.mkdir()
    checkpoint.save(folder / "last.pt", state)
    with pytest.raises(SystemExit) as error:
        flickr30k.main(options(folder, data))
    message = str(error.value.code)
    assert message.startswith("error: ") and "\n" not in message, message
    assert "last.pt" in message and key in message, message


@pytest.mark.parametrize("how", ["missing", "none"])
@pytest.mark.parametrize("key", KEYS)
def test_missing_keys_and_none(data: Path, trained: Path, tmp_path: Path, key: str, how: str) -> None:
    state = copy.deepcopy(checkpoint.load(trained / "last.pt"))
    set_at(state, key, DELETED if how == "missing" else None)
    named = key.split(".")[-1] if key.startswith("arguments") else re.split(r"\.\d", key)[0]
    resume_is_refused(data, trained, tmp_path / "run", state, named.replace("embed_dim", "embed-dim"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", lambda x: {**x, WEIGHT: x[WEIGHT][:-1]}),
        ("model", lambda x: {**x, WEIGHT: x[WEIGHT].double()}),
        ("model", lambda x: {**x, WEIGHT: x[WEIGHT] * float("nan")}),
        ("model", lambda x: {**x, WEIGHT: None}),
        ("model", lambda x: {**x, WEIGHT: x[WEIGHT].to_sparse()}),
        ("model", lambda x: {**x, WEIGHT: x[WEIGHT].to("meta")}),
        ("optimizer.state.0.exp_avg", lambda x: x.to_sparse()),
        ("format", torch.zeros(2)),
        ("model", lambda x: {**x, "another.weight": torch.ones(3)}),
        ("model", lambda x: {name: w for name, w in x.items() if name != WEIGHT}),
        ("best.model", lambda x: {**x, WEIGHT: x[WEIGHT] + float("inf")}),
        ("optimizer.state.0.exp_avg", lambda x: x[:-1]),
        ("optimizer.state.0.exp_avg_sq", lambda x: x * float("inf")),
        ("optimizer.state.0.step", None),
        ("optimizer.param_groups.0.lr", float("nan")),
        ("optimizer.param_groups.0.lr", -1.0),
        ("optimizer.param_groups.0.lr", 0.1),
        ("optimizer.param_groups.1.maximize", True),
        ("optimizer.param_groups.1.eps", 1.0),
        ("optimizer.param_groups.0.params", lambda x: x[::-1]),
        ("scheduler.gamma", 3.0),
        ("scheduler.last_epoch", 7),
        ("sampler.epoch", 9),
        ("sampler.epoch", -1),
        ("sampler.epoch", 1.0),
        ("sampler.batches_done", 50),
        ("sampler.batches_done", -1),
        ("total_steps", 1),
        ("total_steps", 10**6),
        ("loss_sums.total", float("nan")),
        ("history.1.epoch", 1),
        ("history.0.dev.rsum", "high"),
        ("best.epoch", 3),
        ("best.rsum", 599.0),
        ("vocabulary", ["a", "a"]),
        ("vocabulary", lambda x: x[::-1]),
        ("rsum", 1.0),
        ("arguments.threads", {}),
        ("arguments.dropout", 1.5),
        ("arguments.mechanism", "magic"),
        ("arguments.lr", "fast"),
        ("data", {"train_caps.txt": 7}),
        ("random.0.torch", torch.zeros(3, dtype=torch.uint8)),
        ("random.0.numpy", ["MT19937", [1], 0, 0, 0.0]),
        ("random.0.python", None),
    ],
)  # fmt: skip
def test_wrong_values(data: Path, trained: Path, tmp_path: Path, key: str, value: Any) -> None:
    state = copy.deepcopy(checkpoint.load(trained / "last.pt"))
    set_at(state, key, value)
    named = re.split(r"\.\d", key)[0].removeprefix("arguments.").replace("sampler.", "")
    resume_is_refused(data, trained, tmp_path / "run", state, named)


@pytest.mark.parametrize(
    "key", ["model", "arguments.embed_dim", "arguments.bert", "vocabulary", "history", "sampler.epoch"]
)
def test_evaluation_refuses_them_too(trained: Path, tmp_path: Path, key: str) -> None:
    state = copy.deepcopy(checkpoint.load(trained / "best.pt"))
    set_at(state, key, 7 if key == "arguments.bert" else None)
    checkpoint.save(tmp_path / "best.pt", state)
    with pytest.raises(SystemExit, match=rf"^error: {tmp_path}/best\.pt: key '{key.split('.')[0]}"):
        flickr30k.main(["--eval-only", str(tmp_path / "best.pt"), "--device", "cpu"])


def test_weights_that_are_not_finite_are_not_evaluated(trained: Path, tmp_path: Path) -> None:
    state = checkpoint.load(trained / "best.pt")
    state["model"]["loss.interaction.layer"] = torch.tensor([float("nan")])
    checkpoint.save(tmp_path / "best.pt", state)
    with pytest.raises(SystemExit, match=r"best\.pt: key 'model\.loss\.interaction\.layer': expected finite numbers"):
        flickr30k.main(["--eval-only", str(tmp_path / "best.pt"), "--device", "cpu"])
