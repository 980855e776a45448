"""What must stand in a checkpoint before anything of it is used. Errors name the file and the key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import options
import torch
from checkpoint import Damaged
from torch import Tensor

FORMAT = 2


def fault(path: Path, key: str, expected: str, found: str) -> Damaged:
    return Damaged(f"{path}: key {key!r}: expected {expected}, found {found}")


def match(path: Path, key: str, saved: Any, wanted: Any) -> None:
    """Raises Damaged unless ``saved`` is built as ``wanted``: keys, lengths, shapes, types; numbers must be finite."""
    if isinstance(wanted, Tensor):
        _check_tensor(path, key, saved)
        if saved.shape != wanted.shape or saved.dtype != wanted.dtype:
            raise fault(path, key, _describe(wanted), _describe(saved))
        _check_finite(path, key, saved)
    elif isinstance(wanted, Mapping):
        if not isinstance(saved, Mapping):
            raise fault(path, key, "a dictionary", _describe(saved))
        for name in wanted.keys() ^ saved.keys():
            expected, found = ("no such key", "it") if name in saved else ("a value", "none")
            raise fault(path, f"{key}.{name}", expected, found)
        for name, value in wanted.items():
            match(path, f"{key}.{name}", saved[name], value)
    elif isinstance(wanted, (list, tuple)):
        if not isinstance(saved, (list, tuple)) or len(saved) != len(wanted):
            raise fault(path, key, f"{len(wanted)} values", _describe(saved))
        for place, value in enumerate(wanted):
            match(path, f"{key}[{place}]", saved[place], value)
    elif isinstance(wanted, float):
        _number(path, key, saved, -math.inf, math.inf)
    elif type(saved) is not type(wanted):
        raise fault(path, key, f"{type(wanted).__name__}", _describe(saved))


def _check_tensor(path: Path, key: str, value: Any) -> None:
    """A plain one: of sparse, nested, quantized and meta tensors not even the shape can always be asked for."""
    _kind(path, key, value, Tensor, "a tensor")
    if value.layout != torch.strided or value.is_nested or value.is_quantized or value.is_meta:
        raise fault(path, key, "a dense tensor with values", "another kind of tensor")


def _check_finite(path: Path, key: str, value: Tensor) -> None:
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise fault(path, key, "finite numbers", "NaN or inf")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}".replace("torch.", "")
    if isinstance(value, (list, tuple, dict)):
        return f"{type(value).__name__} of {len(value)}"
    return f"{type(value).__name__} {str(value)[:40]}" if value is not None else "None"


def _whole(path: Path, key: str, value: Any, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise fault(path, key, f"a whole number from {least} to {most}", _describe(value))
    return value


def _number(path: Path, key: str, value: Any, least: float, most: float) -> float:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or not least <= value <= most:
        wanted = "a finite number" if math.isinf(most) else f"a number from {least:g} to {most:g}"
        raise fault(path, key, wanted, _describe(value))
    return value


def _kind(path: Path, key: str, value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise fault(path, key, what, _describe(value))
    return value


EVERYWHERE = (
    "format",
    "run_id",
    "arguments",
    "vocabulary",
    "data",
    "model",
    "sampler",
    "total_steps",
    "history",
    "rsum",
)
TO_GO_ON = ("optimizer", "scheduler", "scaler", "loss_sums", "best", "random")


def check(path: Path, state: dict[str, Any], *, to_go_on: bool) -> None:
    """Raises Damaged unless ``state`` holds what evaluation needs, or (``to_go_on``) what training goes on from."""
    if to_go_on and not state.keys() & {*TO_GO_ON} and state.get("format") == FORMAT:
        raise Damaged(f"{path}: expected a checkpoint to go on from, found encoders for evaluation: give last.pt")
    if "format" not in state and "sampler" in state and "run_id" not in state:
        raise fault(path, "format", str(FORMAT), "none: an earlier version wrote it, or another program")
    for key in EVERYWHERE + (TO_GO_ON if to_go_on else ()):
        if key not in state:
            raise fault(path, key, "a value", "none")
    if type(state["format"]) is not int or state["format"] != FORMAT:
        raise fault(path, "format", str(FORMAT), _describe(state["format"]))
    check_encoders(path, state)
    _kind(path, "run_id", state["run_id"], str, "text")
    data = _kind(path, "data", state["data"], dict, "a dictionary")
    for name, content in data.items():
        _kind(path, f"data.{name}", content, str, "text")
    _progress(path, state)
    if to_go_on:
        _kind(path, "random", state["random"], list, "the random states of all processes")
    if to_go_on and state["best"] is not None:
        best = _kind(path, "best", state["best"], dict, "a dictionary")
        for key in ("epoch", "rsum", "model"):
            if key not in best:
                raise fault(path, f"best.{key}", "a value", "none")
        _whole(path, "best.epoch", best["epoch"], 1, state["sampler"]["epoch"])
        rsum = _number(path, "best.rsum", best["rsum"], 0, 600)
        if rsum != state["history"][best["epoch"] - 1]["dev"].get("rsum"):
            raise fault(path, "best.rsum", "what the history says of that epoch", f"{rsum}")
        _weights(path, "best.model", best["model"])
        match(path, "best.model", best["model"], state["model"])
    elif to_go_on and state["history"]:
        raise fault(path, "best", "the best epoch so far", "None")


def check_encoders(path: Path, state: dict[str, Any], names: Iterable[str] | None = None) -> None:
    """Raises Damaged unless ``state`` holds weights, a vocabulary, and the options ``names`` (None: all)."""
    for key in ("arguments", "vocabulary", "model"):
        if key not in state:
            raise fault(path, key, "a value", "none")
    try:
        options.check_saved(state["arguments"], names)
    except ValueError as error:
        raise Damaged(f"{path}: key 'arguments': {error}") from error
    words = _kind(path, "vocabulary", state["vocabulary"], list, "a list of words")
    if not all(isinstance(word, str) for word in words) or len(set(words)) != len(words):
        raise fault(path, "vocabulary", "different words", "others")
    _weights(path, "model", state["model"])


def _weights(path: Path, key: str, weights: Any) -> None:
    for name, value in _kind(path, key, weights, dict, "weights by name").items():
        _kind(path, key, name, str, "names that are text")
        _check_tensor(path, f"{key}.{name}", value)
        _check_finite(path, f"{key}.{name}", value)
    if not weights:
        raise fault(path, key, "weights by name", "none")


def _progress(path: Path, state: dict[str, Any]) -> None:
    """Where in which epoch the run stood; the figures of all epochs before."""
    sampler = _kind(path, "sampler", state["sampler"], dict, "a dictionary")
    for key in ("epoch", "batches_done"):
        if key not in sampler:
            raise fault(path, f"sampler.{key}", "a value", "none")
    epoch = _whole(path, "sampler.epoch", sampler["epoch"], 0, state["arguments"]["epochs"])
    _whole(path, "sampler.batches_done", sampler["batches_done"], 0, 2**53)
    _whole(path, "total_steps", state["total_steps"], 0, 2**53)
    history = _kind(path, "history", state["history"], list, "a list")
    if len(history) != epoch:
        raise fault(path, "history", f"{epoch} epochs, as many as 'sampler.epoch' says", f"{len(history)}")
    for number, entry in enumerate(history, start=1):
        where = f"history[{number - 1}]"
        _kind(path, where, entry, dict, "a dictionary")
        for key in ("epoch", "loss", "base_loss", "relational_loss", "steps", "dev"):
            if key not in entry:
                raise fault(path, f"{where}.{key}", "a value", "none")
        _whole(path, f"{where}.epoch", entry["epoch"], number, number)
        _whole(path, f"{where}.steps", entry["steps"], 1, 2**53)
        for key in ("loss", "base_loss", "relational_loss"):
            _number(path, f"{where}.{key}", entry[key], -math.inf, math.inf)
        for key, value in _kind(path, f"{where}.dev", entry["dev"], dict, "a dictionary").items():
            _number(path, f"{where}.dev.{key}", value, -math.inf, math.inf)
        missing = {"rsum", *(f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10))} - entry["dev"].keys()
        for key in sorted(missing):
            raise fault(path, f"{where}.dev.{key}", "a value", "none")
    best = max((entry["dev"]["rsum"] for entry in history), default=-1.0)
    if _number(path, "rsum", state["rsum"], -1, 600) != best:
        raise fault(path, "rsum", f"{best}, the best of the history", f"{state['rsum']}")
    steps = sum(entry["steps"] for entry in history) + sampler["batches_done"]
    if state["total_steps"] != steps:
        expected = f"{steps}, by the history and 'batches_done'"
        raise fault(path, "total_steps", expected, str(state["total_steps"]))


def size_of(path: Path, weights: Mapping[str, Tensor], key: str) -> torch.Size:
    """The shape of a weight that must be a matrix."""
    value = weights.get(key)
    if value is None or value.dim() != 2:
        raise fault(path, f"model.{key}", "a matrix", "none" if value is None else _describe(value))
    return value.shape


def check_optimizer(path: Path, saved: Any, optimizer: torch.optim.Optimizer) -> None:
    """Of ``optimizer`` as new: its groups, and for each parameter, where it has been stepped, the moments."""
    wanted = optimizer.state_dict()
    match(path, "optimizer.param_groups", saved["param_groups"] if _has(saved, "param_groups") else None,
          wanted["param_groups"])  # fmt: skip
    for place, (group, ours) in enumerate(zip(saved["param_groups"], wanted["param_groups"], strict=True)):
        for key in group.keys() - {"lr"}:  # which is the scheduler's
            if group[key] != ours[key]:
                raise fault(path, f"optimizer.param_groups[{place}].{key}", str(ours[key])[:60], str(group[key])[:60])
    states = _kind(path, "optimizer.state", saved.get("state"), dict, "a dictionary")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, state in states.items():
        where = f"optimizer.state.{index}"
        _whole(path, where, index, 0, len(parameters) - 1)
        moments = torch.zeros_like(parameters[index], device="cpu")
        match(path, where, state, {"step": torch.zeros(()), "exp_avg": moments, "exp_avg_sq": moments})


def _has(value: Any, key: str) -> bool:
    return isinstance(value, Mapping) and key in value
