"""How far are HREMLoss and its gradients in each dtype from float64, step by step with the alignment as loops?

    python benchmarks/reliability/loss_dtypes.py --seeds 5

The reference is the same loss on the same (rounded) inputs and weights in float64, with the alignment of
``hrem_layers.alignment.reference``, which loops over pairs. Per dtype: ‖error‖ / ‖exact‖ of the total and of the
gradients of embeddings and weights, the median and the largest over the seeds, and in how many batches the graph has
other edges than in float64: where values are closer than the rounding of a half type, another neighbour is taken, and
the gradient is then another one and not an inexact one. Writes loss_dtypes.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from hrem_layers import AssociationGraph, HREMLoss, RelationInteraction, Scores, TripletLoss
from hrem_layers.alignment.reference import align_by_loops

RESULTS = Path(__file__).resolve().parent / "loss_dtypes.json"
N, R, W, D = 6, 8, 10, 64
# name: dtype of the inputs, of the weights, autocast's
CASES = {
    "float64": (torch.float64, torch.float64, None),
    "float32": (torch.float32, torch.float32, None),
    "bfloat16 inputs, float32 weights": (torch.bfloat16, torch.float32, None),
    "float16 inputs, float32 weights": (torch.float16, torch.float32, None),
    "bfloat16": (torch.bfloat16, torch.bfloat16, None),
    "float32, autocast to bfloat16": (torch.float32, torch.float32, torch.bfloat16),
}


def loops(images: Tensor, texts: Tensor, image_mask: Tensor | None, text_mask: Tensor | None, topk: int) -> Scores:
    return Scores(*align_by_loops(images, texts, image_mask, text_mask, topk=topk, mode="cosine"))


def loss(alignment: object, mechanism: str) -> HREMLoss:
    return HREMLoss(
        D, graph=AssociationGraph(topk=4, alignment=alignment),  # type: ignore[arg-type]
        interaction=RelationInteraction(D, num_heads=4, dropout=0.0, mechanism=mechanism),
        pair_loss=TripletLoss(negative_sampling="hardest"),
    )  # fmt: skip


def inputs(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    floats = [torch.randn(*shape, generator=g) for shape in ((N, D), (N, D), (N, R, D), (N, W, D))]
    counts = [torch.randint(2, k + 1, (N, 1), generator=g) for k in (R, W)]
    return floats, [torch.arange(k) < count for k, count in zip((R, W), counts, strict=True)]


def measure(module: HREMLoss, floats: list[Tensor], masks: list[Tensor], cast: torch.dtype | None):
    leaves = [x.detach().clone().requires_grad_() for x in floats[:2]]
    with torch.autocast("cpu", dtype=cast) if cast else nullcontext():
        total = module(*leaves, *floats[2:], *masks)
        graph = module.relate(*leaves, *floats[2:], *masks).graph
    sources = {"embeddings": leaves, "weights": list(module.relation_parameters())}
    found = {}
    for name, tensors in sources.items():
        grads = torch.autograd.grad(total, tensors, retain_graph=True, allow_unused=True, materialize_grads=True)
        found[name] = torch.cat([x.double().flatten() for x in grads])
    return total.detach().double().reshape(1), found, graph.connection


def relative(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm().clamp(min=1e-300))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for mechanism in ("fusion", "standalone"):
        for name, (of_inputs, of_weights, cast) in CASES.items():
            errors: dict[str, list[float]] = {"total": [], "embeddings": [], "weights": []}
            other_edges = 0
            for seed in range(arguments.seeds):
                torch.manual_seed(seed)
                module = loss("cosine", mechanism).to(of_weights)
                floats, masks = inputs(seed)
                floats = [x.to(of_inputs) for x in floats]
                exact = loss(loops, mechanism).double()
                exact.load_state_dict(copy.deepcopy(module.state_dict()))
                ours, ours_grad, edges = measure(module, floats, masks, cast)
                theirs, theirs_grad, exact_edges = measure(exact, [x.double() for x in floats], masks, None)
                errors["total"].append(relative(ours, theirs))
                for key in ours_grad:
                    errors[key].append(relative(ours_grad[key], theirs_grad[key]))
                other_edges += int(not torch.equal(edges, exact_edges))
            rows.append({
                "mechanism": mechanism, "dtype": name, "seeds": arguments.seeds, "other_edges": other_edges,
                **{f"{key}_median": statistics.median(x) for key, x in errors.items()},
                **{f"{key}_largest": max(x) for key, x in errors.items()},
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
