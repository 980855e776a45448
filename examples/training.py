"""The training loop: steps that are checked before they count, checkpoints, and the choice of the epoch on dev."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import processes
import torch
from batches import Rest, make_sampler
from checkpoint_checks import fault
from curves import Curves
from evaluation import amp_dtype, evaluate
from pair_data import Pairs, TrainingPairs, collate, loader_options
from retrieval_model import Built
from run_state import NotFinite, Run
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from hrem_layers import HREMTerms

SMALLEST_SCALE = 2.0**-14  # of fp16's GradScaler, which halves it at each overflow; from here on it is no overflow


def train(
    run: Run, train_pairs: Pairs, dev_pairs: Pairs, built: Built, arguments: argparse.Namespace, folder: Path,
    device: torch.device,
) -> None:  # fmt: skip
    """Trains from where ``run`` is to the last epoch; leaves ``best.pt`` and ``last.pt`` in ``folder``."""
    pairs = TrainingPairs(train_pairs, built.encode, region_drop=arguments.region_drop, seed=arguments.seed)
    sampler = make_sampler(train_pairs, arguments)
    check_place(run, len(sampler))
    if arguments.mechanism != "none" and arguments.warmup_steps >= arguments.epochs * len(sampler):
        processes.warn(
            f"--warmup-steps {arguments.warmup_steps}: the run has {arguments.epochs * len(sampler)} steps, so the "
            "relational terms never count"
        )
    model: nn.Module = run.model
    processes.wait()  # reading and clustering the features may take one much longer than another
    if processes.count() > 1:
        model = DistributedDataParallel(run.model, device_ids=[device] if device.type == "cuda" else None)
    with Curves(folder / "tensorboard", run, arguments.log_every) as curves:
        while run.epoch < arguments.epochs:
            start = time.perf_counter()
            pairs.set_epoch(run.epoch)
            sampler.set_epoch(run.epoch)
            loader = DataLoader(
                pairs, batch_sampler=Rest(sampler, run.step), collate_fn=collate, **loader_options(arguments, device)
            )
            model.train()
            for batch in processes.progress(loader, f"epoch {run.epoch + 1}", initial=run.step, total=len(sampler)):
                train_step(run, model, batch.to(device), arguments, curves)
                if (
                    arguments.checkpoint_every
                    and run.step % arguments.checkpoint_every == 0
                    and run.step < len(sampler)
                ):
                    run.save(folder)
            end_epoch(run, dev_pairs, built, arguments, folder, device, curves, start)


def train_step(run: Run, model: nn.Module, batch: Any, arguments: argparse.Namespace, curves: Curves) -> None:
    """One step of the optimizer, unless something is not finite: then NotFinite, and nothing has changed."""
    curves.expect(run.total_steps + 1)
    with torch.autocast(batch.images.device.type, amp_dtype(arguments), enabled=arguments.amp != "none"):
        terms = model(batch)
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(terms.total).backward()
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), arguments.grad_clip or math.inf)
    values = dict(zip((*HREMTerms._fields, "gradient norm"), _numbers([*terms, norm]), strict=True))
    check_step(run, values)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.step, run.total_steps = run.step + 1, run.total_steps + 1
    for name in run.loss_sums:
        run.loss_sums[name] += values[name]
    curves.step(run, values)


def _numbers(scalars: list[Tensor]) -> list[float]:
    """In one transfer from the device."""
    return torch.stack([x.detach().float() for x in scalars]).tolist()


def check_step(run: Run, values: dict[str, float]) -> None:
    """Raises NotFinite if a term or the gradient's norm is NaN or inf. In fp16 a norm that overflows is usual."""
    overflow = run.scaler.is_enabled() and run.scaler.get_scale() > SMALLEST_SCALE
    bad = {
        name: value
        for name, value in values.items()
        if not math.isfinite(value) and not (overflow and name == "gradient norm")
    }
    if bad:
        what = ", ".join(f"{name} = {value}" for name, value in bad.items())
        raise NotFinite(f"not finite {run.now()}: {what}; the step was not made; {run.saved}")


def check_place(run: Run, steps: int) -> None:
    """Raises ValueError if a resumed run stands where this one never can."""
    if not steps:
        raise ValueError("--batch-size: the training captions do not fill one batch")
    if run.step >= steps or run.total_steps != run.epoch * steps + run.step:
        assert run.resumed is not None
        key = "sampler.batches_done" if run.step >= steps else "total_steps"
        expected = (
            f"less than {steps}, the steps of an epoch" if run.step >= steps else f"{run.epoch * steps + run.step}"
        )
        raise fault(run.resumed, key, expected, f"{run.step if run.step >= steps else run.total_steps}")


def end_epoch(
    run: Run, dev_pairs: Pairs, built: Built, arguments: argparse.Namespace, folder: Path, device: torch.device,
    curves: Curves, start: float,
) -> None:  # fmt: skip
    """Evaluates on dev, and saves: the last first, as it holds the best too."""
    metrics = evaluate(run.model, dev_pairs, built, arguments, device, "dev")[0]
    loss, base_loss = (run.loss_sums[name] / run.step for name in ("total", "base"))
    run.history.append({
        "epoch": run.epoch + 1, "steps": run.step, "loss": loss, "base_loss": base_loss,
        "relational_loss": loss - base_loss, "dev": metrics.as_dict(), "dev_images": dev_pairs.num_images,
    })  # fmt: skip
    is_best = run.best is None or metrics.rsum > run.best["rsum"]
    if is_best:
        weights = {name: x.detach().cpu().clone() for name, x in run.model.state_dict().items()}
        run.best = {"epoch": run.epoch + 1, "rsum": metrics.rsum, "model": weights}
    run.scheduler.step()
    run.epoch, run.step, run.loss_sums = run.epoch + 1, 0, dict.fromkeys(run.loss_sums, 0.0)
    run.save(folder, best=is_best)
    curves.epoch(run, metrics)
    said = f"loss of pairs {base_loss:.3f}"  # the sum would seem to explode where the warm-up ends
    if arguments.mechanism != "none":
        said += f", of relations {loss - base_loss:.3f}" if loss != base_loss else ", no relations yet (warm-up)"
    processes.say(
        f"epoch {run.epoch}/{arguments.epochs}  {said}  dev R@1 image to text "
        f"{metrics.i2t.r1:.1f}, text to image {metrics.t2i.r1:.1f}, rSum {metrics.rsum:.1f}"
        f"{' (best)' if is_best else ''}  {time.perf_counter() - start:.0f} s"
    )
