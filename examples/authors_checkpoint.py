"""Checkpoints of the authors' release as the script's own, and a start from the weights of either."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import checkpoint
import processes
from checkpoint_checks import FORMAT, check, check_encoders, fault, match
from options import RELEASE, make_parser
from retrieval_model import Built
from run_folder import plain

from hrem_layers.tools.compat import ReleaseCheckpoint, is_release_checkpoint, read_release_checkpoint

ENCODERS = ("image_encoder", "text_encoder")
KEPT = ("text_encoder", "embed_dim", "num_heads", "bert")  # of the options: what the encoders are made from


def load_any(path: Path, data: Path | None) -> dict[str, Any]:
    """A checkpoint of the script; or, in the same form for evaluation, one of the authors' release or the encoders
    alone that examples/search keeps.

    Raises:
        FileNotFoundError, ValueError: there is none, it is damaged, or it does not say which data it is for and
            ``data`` is None.
    """
    if is_release_checkpoint(path):
        state = as_state(read_release_checkpoint(path))
    else:
        state = checkpoint.load(path)
        if "encoders" not in state:
            return state
        state = of_encoders(path, state)
    if data is None:
        raise ValueError(f"{path} holds {state['whose']}: give the --data-dir that it is for")
    return state


def as_state(read: ReleaseCheckpoint) -> dict[str, Any]:
    """In the form of ``best.pt``, as ``--mechanism none``: the relation modules are not in the release's files."""
    weights = {f"{name}.{key}": x for name in ENCODERS for key, x in getattr(read, name).items()}
    whose = f"encoders of the authors' release, epoch {read.epoch}, rSum {read.best_rsum:.1f} as recorded there"
    return _state({"embed_dim": read.embed_dim, "num_heads": read.num_heads}, [], weights, whose)


def of_encoders(path: Path, kept: dict[str, Any]) -> dict[str, Any]:
    """The same of what ``save_encoders`` of examples/search writes."""
    if kept["encoders"] != 1:
        raise fault(path, "encoders", "1", str(kept["encoders"])[:40])
    check_encoders(path, kept, KEPT)
    return _state(kept["arguments"], kept["vocabulary"], kept["model"], "encoders without the loss")


def _state(options: dict[str, Any], vocabulary: list[str], weights: dict[str, Any], whose: str) -> dict[str, Any]:
    arguments = make_parser().parse_args([])
    for key, value in (RELEASE | {"mechanism": "none"} | options).items():
        setattr(arguments, key, value)
    return {
        "format": FORMAT, "run_id": whose, "arguments": plain(arguments), "vocabulary": vocabulary, "data": {},
        "model": weights, "sampler": {"epoch": 0, "batches_done": 0}, "total_steps": 0, "history": [], "rsum": -1.0,
        "whose": whose,
    }  # fmt: skip


def start_from(path: Path, built: Built, arguments: argparse.Namespace) -> None:
    """Gives the encoders in ``built`` the weights of the checkpoint ``path``; all else of it stays aside.

    Raises:
        FileNotFoundError, ValueError: it does not load, or does not fit; the message names file and key.
    """
    state = load_any(path, arguments.data_dir)
    check(path, state, to_go_on=False)
    for key in ("text_encoder", "embed_dim", "num_heads"):
        theirs, ours = state["arguments"][key], getattr(arguments, key)
        if theirs != ours:
            raise ValueError(f"--init-from {path}: --{key.replace('_', '-')} is {theirs} there and {ours} here")
    if state["vocabulary"] != built.vocabulary:
        raise fault(path, "vocabulary", f"the {len(built.vocabulary)} words of this run", "others")
    model = built.model
    wanted = {key: x for key, x in model.state_dict().items() if key.startswith(ENCODERS)}
    found = {key: x for key, x in state["model"].items() if key.startswith(ENCODERS)}
    match(path, "model", found, wanted)
    model.load_state_dict(found, strict=False)
    processes.say(f"--init-from {path}: {state.get('whose', 'encoders')}")
