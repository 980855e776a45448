"""The state of a run: all that a checkpoint holds, taken down and put back."""

from __future__ import annotations

import argparse
import math
import uuid
from pathlib import Path
from typing import Any

import checkpoint
import checkpoint_checks
import processes
import torch
from retrieval_model import Built, make_optimizer
from run_folder import plain
from torch import Tensor


class NotFinite(FloatingPointError):
    """NaN or inf in a term of the loss, the gradient, or the weights. Nothing of it has been saved."""


class Run:
    """Everything that changes while training, and therefore everything that a checkpoint holds."""

    def __init__(self, built: Built, arguments: argparse.Namespace, device: torch.device, data: dict[str, str]) -> None:
        self.id = processes.from_main(uuid.uuid4().hex[:12])
        self.model = built.model.to(device)
        self.vocabulary, self.data = built.vocabulary, data
        self.arguments = plain(arguments)
        self.optimizer = make_optimizer(self.model, arguments)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, arguments.lr_steps, gamma=0.1)
        self.scaler = torch.amp.GradScaler(device.type, enabled=arguments.amp == "fp16")
        self.epoch, self.step = 0, 0  # step: within the epoch
        self.total_steps = 0
        self.loss_sums = {"total": 0.0, "base": 0.0}  # within the epoch
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None  # epoch, rsum and weights of the model; they travel with the run
        self.saved = "no checkpoint was written yet"
        self.resumed: Path | None = None  # the file that it goes on from

    def _common(self) -> dict[str, Any]:
        return {
            "format": checkpoint_checks.FORMAT,
            "run_id": self.id,
            "arguments": self.arguments,
            "vocabulary": self.vocabulary,
            "data": self.data,
        }

    def state(self) -> dict[str, Any]:
        return {
            **self._common(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sampler": {"epoch": self.epoch, "batches_done": self.step},
            "total_steps": self.total_steps,
            "loss_sums": self.loss_sums,
            "rsum": -1.0 if self.best is None else self.best["rsum"],
            "history": self.history,
            "best": self.best,
            "random": processes.gather_objects(checkpoint.random_state()),
        }

    def best_state(self) -> dict[str, Any]:
        """The encoders and relation modules of the best epoch, for evaluation."""
        assert self.best is not None
        return {
            **self._common(),
            "model": self.best["model"],
            "sampler": {"epoch": self.best["epoch"], "batches_done": 0},
            "total_steps": sum(entry["steps"] for entry in self.history[: self.best["epoch"]]),
            "rsum": self.best["rsum"],
            "history": self.history[: self.best["epoch"]],
        }

    def restore(self, path: Path, state: dict[str, Any]) -> None:
        """Goes on from ``state``, of which everything is compared with this run as it is new.

        Raises:
            checkpoint.Damaged: something does not fit; the message names ``path`` and the key.
        """
        match = checkpoint_checks.match
        if state["vocabulary"] != self.vocabulary:
            raise checkpoint_checks.fault(path, "vocabulary", "the words of this run", "others")
        match(path, "model", state["model"], self.model.state_dict())
        checkpoint_checks.check_optimizer(path, state["optimizer"], self.optimizer)
        match(path, "scaler", state["scaler"], self.scaler.state_dict())
        match(path, "loss_sums", state["loss_sums"], self.loss_sums)
        key = "model"
        try:
            self.model.load_state_dict(state["model"])
            key = "optimizer"
            self.optimizer.load_state_dict(state["optimizer"])
            key = "scheduler"
            self._check_scheduler(path, state)
            self.scheduler.load_state_dict(state["scheduler"])
            key = "scaler"
            self.scaler.load_state_dict(state["scaler"])
            key = "random"
            checkpoint.restore_random_state(state["random"][processes.rank()])
        except checkpoint.Damaged:
            raise
        except Exception as error:  # whatever PyTorch, NumPy and Python raise for a state that is none
            raise checkpoint_checks.fault(
                path, key, "a state that can be gone on from", f"another ({error!r})"
            ) from error
        self.id, self.resumed = state["run_id"], path
        self.epoch, self.step = state["sampler"]["epoch"], state["sampler"]["batches_done"]
        self.total_steps, self.loss_sums = state["total_steps"], state["loss_sums"]
        self.best, self.history = state["best"], state["history"]
        self.saved = f"the last good checkpoint is {path} ({self.place()})"

    def _check_scheduler(self, path: Path, state: dict[str, Any]) -> None:
        saved, wanted = state["scheduler"], self.scheduler.state_dict()
        checkpoint_checks.match(path, "scheduler", saved, {**wanted, "milestones": saved["milestones"]})
        fixed = {
            **{key: wanted[key] for key in ("milestones", "gamma", "base_lrs")},
            "last_epoch": state["sampler"]["epoch"],
        }
        for key, value in fixed.items():
            if saved[key] != value:
                raise checkpoint_checks.fault(path, f"scheduler.{key}", str(value), str(saved[key]))
        divided = sum(count for epoch, count in wanted["milestones"].items() if epoch <= saved["last_epoch"])
        for place, group in enumerate(state["optimizer"]["param_groups"]):
            lr = group["initial_lr"] * wanted["gamma"] ** divided
            if not math.isclose(group["lr"], lr):
                raise checkpoint_checks.fault(path, f"optimizer.param_groups[{place}].lr", f"{lr:g}", f"{group['lr']}")

    def place(self) -> str:
        return f"epoch {self.epoch + 1}, after {self.step} steps" if self.step else f"after {self.epoch} epoch(s)"

    def save(self, folder: Path, *, best: bool = False) -> None:
        """``last.pt``, and with ``best`` then ``best.pt``. Every process contributes; the main one writes.

        Raises:
            NotFinite: a weight or a moment of the optimizer is NaN or inf.
            OSError: the file cannot be written; the one of before is whole.
        """
        self._check_weights()
        state = self.state()
        if processes.is_main():
            checkpoint.save(folder / "last.pt", state)
            self.saved = f"the last good checkpoint is {folder / 'last.pt'} ({self.place()})"
            if best:
                checkpoint.save(folder / "best.pt", self.best_state())
        processes.wait()

    def _check_weights(self) -> None:
        names = {id(p): name for name, p in self.model.named_parameters()}
        tensors = dict(self.model.state_dict())
        for parameter, moments in self.optimizer.state.items():
            tensors |= {f"{names[id(parameter)]} ({key} of AdamW)": x for key, x in moments.items()}
        floats = {name: x for name, x in tensors.items() if isinstance(x, Tensor) and x.is_floating_point()}
        finite = torch.stack([x.isfinite().all().cpu() for x in floats.values()])
        if not finite.all():
            bad = [name for name, good in zip(floats, finite.tolist(), strict=True) if not good]
            raise NotFinite(f"not finite {self.now()}: the weights {', '.join(bad[:3])}; {self.saved}")

    def now(self) -> str:
        return f"in epoch {self.epoch + 1}, step {self.step + 1} (step {self.total_steps + 1} of the run)"
