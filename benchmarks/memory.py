"""How much memory does a forward and backward pass take at its peak, and how does it grow?"""

from __future__ import annotations

import argparse

import torch
from _common import RELEASE, extra_peak_mb, in_own_process, make_batch, section, table

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


def measure_release(held: bool) -> tuple[float, float]:
    """Peak of a step at the release's size, fragments detached, and the size of the parameters' gradients, in MB;
    ``held``: they are there before."""
    torch.set_num_threads(2)
    loss = HREMLoss(RELEASE["dim"])

    def work(n: int):
        batch = make_batch(**{**RELEASE, "n": n})
        inputs = [batch[0].requires_grad_(), batch[1].requires_grad_(), *batch[2:4]]
        return lambda: loss(*inputs, None, batch.text_mask).backward()

    work(16)()
    loss.zero_grad(set_to_none=not held)
    peak = extra_peak_mb(work(RELEASE["n"]))
    gradients = (parameter.grad for parameter in loss.parameters() if parameter.grad is not None)
    return peak, sum(x.numel() * x.element_size() for x in gradients) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smallest size, and the release's once")
    parser.add_argument(
        "--release", choices=("held", "new"), help="measure a step of the release's size in this process"
    )
    parser.add_argument("--one", nargs=4, metavar=("WHAT", "N", "R", "W"), help="measure one size in this process")
    arguments = parser.parse_args()
    if arguments.one:
        what, *size = arguments.one
        print(measure(what, *map(int, size)))
        return
    if arguments.release:
        print(*measure_release(arguments.release == "held"))
        return
    rows = []
    for n, r, w in SIZES[:1] if arguments.quick else SIZES:
        peaks = [
            float(in_own_process(__file__, "--one", what, str(n), str(r), str(w))) for what in ("alignment", "HREMLoss")
        ]
        fragments = n * (r + w) * DIM * 4 / 1e6
        rows.append([
            f"N = {n}, R = {r}, W = {w}", f"{peaks[0]:.0f}", f"{peaks[1]:.0f}", f"{fragments:.0f}",
            f"{n * n * r * w * 4 / 1e6:.0f}",
        ])  # fmt: skip
    steps = []
    for name, held in (("there before", "held"), ("made by the step", "new")):
        found = [in_own_process(__file__, "--release", held).split() for _ in range(1 if arguments.quick else 5)]
        peaks = sorted(float(peak) for peak, _ in found)
        size = float(found[0][1]) if held == "new" else 0
        steps.append([name, f"{peaks[len(peaks) // 2]:.0f} ({peaks[0]:.0f} to {peaks[-1]:.0f})", f"{size:.0f}"])
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
        "A step of HREMLoss with detached fragments at the release's size (N = 128, R = 36, captions of 8 to 24 words, "
        "D = 1024), median and range of processes:",
        table(["gradients of the parameters", "peak, MB", "of which those gradients, MB"], steps),
    )


if __name__ == "__main__":
    main()
