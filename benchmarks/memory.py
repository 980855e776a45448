"""How much memory does a forward and backward pass take at its peak, and how does it grow?"""

from __future__ import annotations

import argparse

import torch
from _common import extra_peak_mb, in_own_process, make_batch, section, table

from hrem_layers import AssociationGraph, HREMLoss, align_fragments

SIZES = [(256, 36, 24), (512, 36, 24), (512, 72, 24), (512, 36, 48), (1024, 36, 24)]
DIM = 256


def measure(what: str, n: int, regions: int, words: int) -> float:
    torch.set_num_threads(2)
    loss = HREMLoss(DIM, graph=AssociationGraph(detach_fragments=False))

    def work(n: int, regions: int, words: int):
        batch = make_batch(n, regions, words, words, DIM)
        inputs = [x.requires_grad_() for x in batch[:4]]
        if what == "HREMLoss":
            return lambda: loss(*inputs, None, batch.text_mask).backward()
        return lambda: sum(x.square().sum() for x in align_fragments(*inputs[2:], None, batch.text_mask)).backward()

    work(16, 12, 8)()
    return extra_peak_mb(work(n, regions, words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=4, metavar=("WHAT", "N", "R", "W"), help="measure one size in this process")
    arguments = parser.parse_args()
    if arguments.one:
        what, *size = arguments.one
        print(measure(what, *map(int, size)))
        return
    rows = []
    for n, r, w in SIZES:
        peaks = [
            float(in_own_process(__file__, "--one", what, str(n), str(r), str(w))) for what in ("alignment", "HREMLoss")
        ]
        fragments = n * (r + w) * DIM * 4 / 1e6
        rows.append([
            f"N = {n}, R = {r}, W = {w}", f"{peaks[0]:.0f}", f"{peaks[1]:.0f}", f"{fragments:.0f}",
            f"{n * n * r * w * 4 / 1e6:.0f}",
        ])  # fmt: skip
    section(
        "Peak memory",
        f"Forward and backward with gradients to the fragments, D = {DIM}, float32, no padding: what the process "
        "holds at its peak beyond what it held before, in MB, each in a process of its own. *Fragments' gradients* is "
        "the size of the result itself; *similarities* is what one copy of all N²·R·W of them would take.",
        table(["", "align_fragments", "HREMLoss", "fragments' gradients", "similarities"], rows),
        "Besides its results the alignment needs the fragments' normalised copies and gradients (N·(R + W)·D), the "
        "2·(topk + 1) numbers per pair with their gradients (N²), and constants: 64 MB of kept similarities and two "
        "tiles. HREMLoss adds N² numbers: S, the relevance MLPs' hidden values, cosines. Its attention weights, 16 "
        "heads of (2N)², are held a few heads at a time (2 MB per matrix) from N = 128 on. The process holds more than "
        "is in use, by 50 to 100 MB and differently from run to run: the C library keeps what was freed.",
    )


if __name__ == "__main__":
    main()
