"""Checkpoints of the authors' release (``model_best.pth``), read without executing anything in them.

Such a file is a pickle of a dictionary: ``model`` holds two state dicts, of the image and of the text encoder, ``opt``
the ``argparse.Namespace`` of the run, ``epoch``, ``best_rsum`` and ``Eiters`` (steps) where it stood. A pickle is a
program; here it is read by PyTorch's restricted unpickler, which knows tensors, plain values and, for this one file,
``argparse.Namespace``, whose attributes are then taken as a dictionary.

Weights come under the names of the parts that they belong to here: ``linear``, ``mlp_in``, ``norm``, ``mlp_out``
(regions to the joint space, ``linear(x) + mlp_out(relu(norm(mlp_in(x))))``), ``bert`` and ``linear`` (words), and
``relation``, which is a :class:`hrem_layers.FragmentRelation`. The relation modules of training are not in the
release's files.
"""

from __future__ import annotations

import argparse
import contextlib
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.serialization import get_safe_globals, safe_globals

from hrem_layers._core.checks import holds_values
from hrem_layers.fragments import FragmentRelation
from hrem_layers.tools import release

TOP = ("model", "opt", "epoch", "best_rsum", "Eiters")
# The release's part -> ours; "" leaves a part out, which no output depends on: the second batch norm of the MLP has
# no place in its forward pass, and a count of batches matters only to batch norms without momentum.
IMAGE = {
    "fc.fc.": "linear.",
    "fc.mlp.layers.0.": "mlp_in.",
    "fc.mlp.layers.1.": "mlp_out.",
    "fc.mlp.bns.0.num_batches_tracked": "",
    "fc.mlp.bns.0.": "norm.",
    "fc.mlp.bns.1.": "",
    "aggr.": "relation.",
}
TEXT = {
    "bert.embeddings.position_ids": "",  # a buffer 0, 1, 2, ... of older versions of transformers
    "bert.": "bert.",
    "linear.": "linear.",
    "aggr.": "relation.",
}


class ReleaseCheckpoint(NamedTuple):
    """What a checkpoint of the release holds, in our names."""

    image_encoder: dict[str, Tensor]
    text_encoder: dict[str, Tensor]
    options: dict[str, Any]
    """Of the run, by the release's names; plain values only."""
    epoch: int
    """How many epochs of training are behind it."""
    best_rsum: float
    """As the release counted it: on the split that it was selected on."""

    @property
    def embed_dim(self) -> int:
        return self.image_encoder["linear.weight"].shape[0]

    @property
    def feature_dim(self) -> int:
        """F, features per region."""
        return self.image_encoder["linear.weight"].shape[1]

    @property
    def num_heads(self) -> int:
        """Weights do not tell it: the option ``nhead`` of the run, or else the release's 16."""
        return int(self.options.get("nhead", release.SETTINGS["fragments"]["num_heads"]))

    def relation(self, encoder: str) -> FragmentRelation:
        """The pooling of ``"image_encoder"`` or ``"text_encoder"`` with its weights, in eval mode."""
        module = release.fragment_relation(self.embed_dim, num_heads=self.num_heads)
        weights: dict[str, Tensor] = getattr(self, encoder)
        module.load_state_dict(
            {key.removeprefix("relation."): x for key, x in weights.items() if key.startswith("relation.")}
        )
        return module.eval()


def is_release_checkpoint(path: str | Path) -> bool:
    """Whether ``path`` looks as one, by the names in its pickle; nothing is loaded."""
    try:
        return ("argparse", "Namespace") in set(_globals(Path(path)))
    except Exception:  # what reading a file of another kind as a pickle leads to is open
        return False


def read_release_checkpoint(path: str | Path) -> ReleaseCheckpoint:
    """Reads ``model_best.pth`` onto the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another kind of file, asks for anything but tensors, plain values and an argparse.Namespace,
            or holds a key, a shape or an option that is not known here. The message names it.
    """
    path = Path(path)
    state = _load(path)
    _expect(path, "a dictionary", state, dict)
    _check_keys(path, "", state, {*TOP}, {"model", "opt"})
    options = vars(_expect(path, "opt: an argparse.Namespace", state["opt"], argparse.Namespace))
    _check_options(path, options)
    encoders = _expect(path, "model: two state dicts, of the image and the text encoder", state["model"], (list, tuple))
    if len(encoders) != 2:
        raise _fault(path, f"model: expected two state dicts, of the image and the text encoder, found {len(encoders)}")
    image = _rename(path, "model[0]", encoders[0], IMAGE)
    text = _rename(path, "model[1]", encoders[1], TEXT)
    epoch, rsum = state.get("epoch", 0), state.get("best_rsum", 0.0)
    if isinstance(rsum, Tensor) and rsum.numel() == 1:
        rsum = float(rsum)
    if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
        raise _fault(path, f"epoch: expected a whole number from 0, found {type(epoch).__name__} {str(epoch)[:40]}")
    _expect(path, "best_rsum: a number", rsum, (int, float))
    read = ReleaseCheckpoint(image, text, options, epoch, float(rsum))
    _check_shapes(path, read)
    return read


# ---------------------------------------------------------------------------------------- the file


def _load(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a checkpoint of the authors' release, found no file")
    try:
        allowed = argparse.Namespace in get_safe_globals()  # by the caller, and then so it stays
        if broken := _broken_part(path):
            raise ValueError(f"the checksum of {broken} does not fit")
        with contextlib.nullcontext() if allowed else safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind, by what the file holds
        asked = _strangers(path)
        reason = f"it asks for {', '.join(asked)}" if asked else (str(error).strip() or repr(error)).splitlines()[0]
        raise _fault(
            path, f"expected tensors, plain values and an argparse.Namespace; not loaded: {reason[:300]}"
        ) from error


def _broken_part(path: Path) -> str | None:
    """Of a zip archive the first part that is not what was written; PyTorch does not look. Older files cannot tell."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def _strangers(path: Path) -> list[str]:
    """What the pickle asks for that has no place in a checkpoint, for the message."""
    known = {("argparse", "Namespace"), ("collections", "OrderedDict")}
    try:
        asked = dict.fromkeys(_globals(path))
    except Exception:  # as above
        return []
    return [".".join(name) for name in asked if name not in known and name[0].split(".")[0] != "torch"]


def _globals(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that the pickle in ``path`` asks for, read as data. Files of torch.save are zip
    archives, those of PyTorch before 1.6 several pickles in a row."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.rsplit("/")[-1] == "data.pkl")
            yield from _named(pickletools.genops(archive.read(name)))
        return
    with path.open("rb") as file:
        for _ in range(3):  # a magic number, a version, sizes; then the object itself
            for _ in pickletools.genops(file):
                pass
        yield from _named(pickletools.genops(file))


def _named(operations: Iterator[tuple[Any, Any, Any]]) -> Iterator[tuple[str, str]]:
    texts: list[str] = []
    for operation, argument, _ in operations:
        if operation.name in ("GLOBAL", "INST"):
            module, _, name = argument.partition(" ")
            yield module, name
        elif operation.name == "STACK_GLOBAL" and len(texts) > 1:
            yield texts[-2], texts[-1]
        elif isinstance(argument, str):
            texts.append(argument)


# ---------------------------------------------------------------------------------------- what is in it


def _fault(path: Path, message: str) -> ValueError:
    return ValueError(f"{path}: {message}")


def _expect(path: Path, what: str, value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _fault(path, f"expected {what}, found {type(value).__name__}")
    return value


def _check_keys(path: Path, where: str, found: Mapping[Any, Any], known: set[str], needed: set[str]) -> None:
    if unknown := [str(key) for key in found if key not in known]:
        raise _fault(path, f"{where}unknown: {', '.join(unknown[:8])}; known are {', '.join(sorted(known))}")
    if missing := sorted(needed - found.keys()):
        raise _fault(path, f"{where}missing: {', '.join(missing)}")


def _check_options(path: Path, options: Mapping[str, Any]) -> None:
    """Plain values all of them; refuses those that make the embeddings others than those computed here."""
    for name, value in options.items():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if one is not None and not isinstance(one, (bool, int, float, str)):
                raise _fault(path, f"opt.{name}: expected a plain value, found {type(one).__name__}")
    for name in ("no_imgnorm", "no_txtnorm"):
        if options.get(name):
            raise _fault(path, f"opt.{name}: expected False, found True: similarities are cosines here")
    heads = options.get("nhead", 1)
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        raise _fault(path, f"opt.nhead: expected a whole number from 1, found {heads!r}")


def _rename(path: Path, where: str, weights: Any, parts: Mapping[str, str]) -> dict[str, Tensor]:
    """Every key in our names; ``module.`` of DataParallel in front of all of them is taken off."""
    _expect(path, f"{where}: a state dict", weights, Mapping)
    wrapped = bool(weights) and all(isinstance(key, str) and key.startswith("module.") for key in weights)
    renamed: dict[str, Tensor] = {}
    unknown = []
    for key, value in weights.items():
        name = str(key)[len("module.") :] if wrapped else str(key)
        theirs = next((part for part in parts if name.startswith(part)), None)
        if theirs is None:
            unknown.append(str(key))
        elif not isinstance(value, Tensor):
            raise _fault(path, f"{where}: {key}: expected a tensor, found {type(value).__name__}")
        elif not holds_values(value):
            raise _fault(path, f"{where}: {key}: expected a dense tensor with values, found another kind of tensor")
        elif parts[theirs] and not value.is_floating_point():
            raise _fault(path, f"{where}: {key}: expected floating point numbers, found {value.dtype}")
        elif value.is_floating_point() and not value.isfinite().all():
            raise _fault(path, f"{where}: {key}: expected finite numbers, found NaN or inf")
        elif parts[theirs]:
            renamed[parts[theirs] + name[len(theirs) :]] = value
    if unknown:
        raise _fault(path, f"{where}: unknown: {', '.join(unknown[:8])}; known parts are {', '.join(parts)}")
    return renamed


def _check_shapes(path: Path, read: ReleaseCheckpoint) -> None:
    """All weights of the parts that are of known form: there, of the right shape, and no others."""
    for where, weights in (("model[0]", read.image_encoder), ("model[1]", read.text_encoder)):
        first = weights.get("linear.weight")
        if first is None or first.dim() != 2:
            raise _fault(path, f"{where}: missing: the matrix {'fc.fc' if where == 'model[0]' else 'linear'}.weight")
    dim, features = read.embed_dim, read.feature_dim
    if dim % read.num_heads:
        raise _fault(path, f"opt.nhead: expected a divisor of the embedding size {dim}, found {read.num_heads}")
    with torch.device("meta"):
        relation = release.fragment_relation(dim, num_heads=read.num_heads)
    pooling = {f"relation.{key}": tuple(x.shape) for key, x in relation.state_dict().items()}
    mlp = read.image_encoder.get("mlp_in.bias")
    hidden = dim // 2 if mlp is None else mlp.numel()
    image = {
        "linear.weight": (dim, features), "linear.bias": (dim,), "mlp_in.weight": (hidden, features),
        "mlp_in.bias": (hidden,), "mlp_out.weight": (dim, hidden), "mlp_out.bias": (dim,),
        **{f"norm.{name}": (hidden,) for name in ("weight", "bias", "running_mean", "running_var")},
    }  # fmt: skip
    width = read.text_encoder["linear.weight"].shape[1]
    bert = {key: tuple(x.shape) for key, x in read.text_encoder.items() if key.startswith("bert.")}
    if not bert:
        raise _fault(path, "model[1]: missing: bert, the language model")
    text = {"linear.weight": (dim, width), "linear.bias": (dim,), **bert}
    for where, weights, wanted in (
        ("model[0], in our names: ", read.image_encoder, {**image, **pooling}),
        ("model[1], in our names: ", read.text_encoder, {**text, **pooling}),
    ):
        _check_keys(path, where, weights, {*wanted}, {*wanted})
        for key, shape in wanted.items():
            if tuple(weights[key].shape) != shape:
                raise _fault(path, f"{where}{key}: expected shape {shape}, found {tuple(weights[key].shape)}")
