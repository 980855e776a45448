"""Checkpoints of the authors' release as the script's own, and a start from the weights of either."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import checkpoint
import processes
from checkpoint_checks import FORMAT, check, fault, match
from options import RELEASE, make_parser
from retrieval_model import Built
from run_folder import plain

from hrem_layers.tools.compat import ReleaseCheckpoint, is_release_checkpoint, read_release_checkpoint

ENCODERS = ("image_encoder", "text_encoder")


def load_any(path: Path, data: Path | None) -> dict[str, Any]:
    """A checkpoint of the script, or one of the authors' release in the same form, for evaluation.

    Raises:
        FileNotFoundError, ValueError: there is none, it is damaged, or of the release and ``data`` is None.
    """
    if not is_release_checkpoint(path):
        return checkpoint.load(path)
    read = read_release_checkpoint(path)
    if data is None:
        raise ValueError(f"{path} is of the authors' release: give the --data-dir that it is for")
    return as_state(read)


def as_state(read: ReleaseCheckpoint) -> dict[str, Any]:
    """In the form of ``best.pt``, as ``--mechanism none``: the relation modules are not in the release's files."""
    arguments = make_parser().parse_args([])
    for key, value in RELEASE.items():
        setattr(arguments, key, value)
    arguments.mechanism, arguments.embed_dim, arguments.num_heads = "none", read.embed_dim, read.num_heads
    weights = {f"{name}.{key}": x for name in ENCODERS for key, x in getattr(read, name).items()}
    return {
        "format": FORMAT, "run_id": "the authors' release", "arguments": plain(arguments), "vocabulary": [], "data": {},
        "model": weights, "sampler": {"epoch": 0, "batches_done": 0}, "total_steps": 0, "history": [], "rsum": -1.0,
        "whose": f"encoders of the authors' release, epoch {read.epoch}, rSum {read.best_rsum:.1f} as recorded there",
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
