"""A step under autocast to bfloat16 against float32 on this processor, and which instructions it has for it."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from _common import RELEASE, make_batch, options, ratio_table, section, time_in_turn

from hrem_layers import AssociationGraph, HREMLoss, align_fragments

INSTRUCTIONS = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16", "bf16": "Arm BF16"}


def bfloat16_instructions() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            words = set(file.read().split())
    except OSError:
        return []
    return [name for flag, name in INSTRUCTIONS.items() if flag in words]


def main() -> None:
    parser = options(__doc__)
    parser.set_defaults(threads=1, clock="cpu", repeats=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batch = make_batch(**RELEASE)
    dim = RELEASE["dim"]
    losses = {
        "HREMLoss step, fragments detached": HREMLoss(dim),
        "HREMLoss step, detach_fragments=False": HREMLoss(dim, graph=AssociationGraph(detach_fragments=False)),
    }

    def cast(on: bool):
        return torch.autocast("cpu", dtype=torch.bfloat16) if on else nullcontext()

    words, regions = batch.text_fragments[batch.text_mask], batch.image_fragments.flatten(0, 1)

    def product(on: bool) -> None:
        with torch.no_grad(), cast(on):
            words @ regions.t()

    def align(on: bool) -> None:
        with torch.no_grad(), cast(on):
            align_fragments(*batch[2:4], None, batch.text_mask)

    def step(loss: HREMLoss, on: bool) -> None:
        loss.zero_grad()
        with cast(on):
            value = loss(*(x.detach().requires_grad_() for x in batch[:4]), None, batch.text_mask)
        value.backward()

    works = {
        "the bare product of real words and regions": product,
        "alignment, forward": align,
        **{name: lambda on, loss=loss: step(loss, on) for name, loss in losses.items()},
    }
    tables = []
    for name, work in works.items():
        timings = time_in_turn(
            {"float32": lambda work=work: work(False), "autocast": lambda work=work: work(True)},
            arguments.repeats,
            arguments.clock,
        )
        tables += [f"{name}:", ratio_table(timings, "float32")]
    found = bfloat16_instructions()
    has = f"This one has {' and '.join(found)}." if found else "This one has none of them."
    section(
        "bfloat16 under autocast on a CPU",
        'With `torch.autocast("cpu", dtype=torch.bfloat16)` around the loss the products are made in bfloat16, which '
        "may pay on processors with instructions for it, AVX512-BF16, AMX-BF16 or Arm's BF16: the first table says "
        "whether PyTorch's product does on this one. " + has + " The "
        "similarities are then rounded to bfloat16, so that values 0.4% apart tie (see the errors per dtype); "
        f"normalisation, maxima's means, softmax and losses stay in float32. The release's size, D = {dim}:",
        *tables,
    )


if __name__ == "__main__":
    main()
