"""Ten thousand steps of training on a small model whose inputs drift: does anything become NaN, does memory grow?

    python benchmarks/reliability/drift.py --steps 10000

Two linear encoders and the whole of HREMLoss, warm-up included, are trained by AdamW. The inputs are random walks, so
that the loss never comes to rest and embeddings grow, and some of the steps are extreme: images that are all equal,
items with one real fragment, inputs a million times as large or as small, one id for all. Every step the
loss, every term, the gradients' norm and the parameters must be finite. Every ``--every`` steps the resident memory,
the number of living objects and of tensors, and the blocks that Python has allocated are noted; after the first
fifth of the steps
they must not grow by more than a few percent. Writes drift.json; the exit status is 1 if something of this fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path

import torch

from hrem_layers import AssociationGraph, HREMLoss, InfoNCELoss, RelationInteraction, TripletLoss

RESULTS = Path(__file__).resolve().parent / "drift.json"
N, R, W, INPUT, DIM = 6, 4, 5, 12, 16
EXTREMES = ("none", "equal images", "one real fragment", "large", "small", "one id for all")


def resident_mb() -> float:
    text = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmRSS:"))) / 1024


def living() -> tuple[int, int]:
    gc.collect()
    objects = gc.get_objects()
    return len(objects), sum(type(x) in (torch.Tensor, torch.nn.Parameter) for x in objects)


def losses(seed: int) -> list[HREMLoss]:
    """Two kinds of loss in turn: what differs between them shares no code."""
    torch.manual_seed(seed)
    return [
        HREMLoss(DIM, graph=AssociationGraph(topk=3), interaction=RelationInteraction(DIM, num_heads=2),
                 pair_loss=TripletLoss(), warmup_steps=20),
        HREMLoss(DIM, graph=AssociationGraph(topk=3, alignment="scan", candidates=2, detach_fragments=False),
                 interaction=RelationInteraction(DIM, num_heads=2, mechanism="standalone"),
                 pair_loss=InfoNCELoss(learnable=True), warmup_steps=20),
    ]  # fmt: skip


def run(steps: int, every: int, seed: int) -> dict[str, object]:
    modules = losses(seed)
    encoders = [torch.nn.Linear(INPUT, DIM), torch.nn.Linear(INPUT, DIM)]
    parameters = [p for module in [*modules, *encoders] for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    walk = [torch.randn(N, R, INPUT), torch.randn(N, W, INPUT)]
    started, record, failures = time.process_time(), [], []
    for step in range(1, steps + 1):
        walk = [x + 0.05 * torch.randn_like(x) for x in walk]
        extreme = EXTREMES[step // 7 % len(EXTREMES)] if step % 7 == 0 else "none"
        images, texts = (x.clone() for x in walk)
        masks = [torch.rand(N, x.shape[1]) < 0.7 for x in walk]
        for mask in masks:
            mask[:, 0] = True
        ids = torch.randint(0, N, (N,))
        if extreme == "equal images":
            images = images[:1].expand_as(images)
        elif extreme == "one real fragment":
            for mask in masks:
                mask[:, 1:] = False
        elif extreme in ("large", "small"):
            images, texts = (x * (1e6 if extreme == "large" else 1e-6) for x in (images, texts))
        elif extreme == "one id for all":
            ids = torch.zeros_like(ids)
        regions, words = encoders[0](images), encoders[1](texts)
        terms = modules[step % 2].terms(regions.mean(1), words.mean(1), regions, words, *masks, ids)
        optimizer.zero_grad()
        terms.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        values = {**terms._asdict(), "gradient": norm, "parameters": sum(p.detach().abs().sum() for p in parameters)}
        bad = [name for name, x in values.items() if not torch.isfinite(x)]
        if bad:
            failures.append({"step": step, "extreme": extreme, "not finite": bad})
            if len(failures) > 10:
                break
        if step % every == 0:
            objects, tensors = living()
            record.append({
                "step": step, "resident_mb": round(resident_mb(), 1), "objects": objects, "tensors": tensors,
                "python_blocks": sys.getallocatedblocks(), "total": float(terms.total.detach()),
            })  # fmt: skip
    growth = {}
    settled = record[max(0, len(record) // 5 - 1) :] if record else []
    for name in ("resident_mb", "objects", "tensors", "python_blocks"):
        growth[name] = round(settled[-1][name] / settled[0][name] - 1, 4) if settled else None
    return {
        "steps": step, "seed": seed, "cpu_seconds": round(time.process_time() - started), "not_finite": failures,
        "growth_after_the_first_fifth": growth, "record": record,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=500, help="steps between two looks at the memory")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    result = run(arguments.steps, arguments.every, arguments.seed)
    if arguments.steps >= 10_000:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: x for k, x in result.items() if k != "record"}))
    grown = any(x is not None and x > 0.05 for x in result["growth_after_the_first_fifth"].values())  # type: ignore[attr-defined]
    return int(bool(result["not_finite"]) or grown)


if __name__ == "__main__":
    sys.exit(main())
