"""The alignment's forward pass against a bare matrix product over a grid of batch sizes, widths, regions and words."""

from __future__ import annotations

import itertools

import torch
from _common import Batch, bare_matmul, make_batch, options, section, table, time_in_turn

from hrem_layers import align_fragments

# Beyond this many similarities (1 GB) the bare product is made image block by image block into the same memory:
# to ask the system for several gigabytes takes longer than to multiply.
LARGEST_PRODUCT = 2**28


def yardstick(batch: Batch):
    words, regions = batch.text_fragments[batch.text_mask], batch.image_fragments.flatten(0, 1)
    if len(words) * len(regions) <= LARGEST_PRODUCT:
        return bare_matmul(batch)
    parts = regions.split(LARGEST_PRODUCT // len(words))
    room = words.new_empty(len(words), len(parts[0]))

    def product() -> None:
        for part in parts:
            torch.mm(words, part.t(), out=room[:, : len(part)] if len(part) < len(parts[0]) else room)

    return product


def main() -> None:
    parser = options(__doc__)
    parser.set_defaults(threads=1, clock="cpu", repeats=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 512, 1024], help="N")
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 512, 1024], help="D")
    parser.add_argument("--regions", type=int, nargs="+", default=[36, 49], help="R")
    parser.add_argument("--words", nargs="+", default=["8-24", "32"], help="W, or a range of it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, worst = [], 0.0
    for words, r, dim in itertools.product(arguments.words, arguments.regions, arguments.dims):
        cells = []
        for n in arguments.sizes:
            shortest, _, longest = words.partition("-")
            batch = make_batch(n, r, int(shortest), int(longest or shortest), dim)
            large = n >= 512  # seconds to minutes each: the better of two, the first of which warms up
            rounds = 2 if large else arguments.repeats * max(1, 512 // n)  # the shorter, the more a disturbance weighs
            timings = time_in_turn(
                {
                    "matmul": yardstick(batch),
                    "align": lambda batch=batch: align_fragments(*batch[2:4], None, batch.text_mask),
                },
                rounds,
                arguments.clock,
                warm_up=not large,
            )
            ratio = timings["align"].best / timings["matmul"].best
            worst = max(worst, ratio)
            cells.append(f"{ratio:.2f}")
        rows.append([words, str(r), str(dim), *cells])
        print(rows[-1], file=__import__("sys").stderr, flush=True)
    section(
        "Alignment over a grid of sizes",
        f"Forward, time over that of the bare product of real words by real regions, best of "
        f"{arguments.repeats} each (eight times as many at N = 64, four times at N = 128, twice at N = 256, two from "
        "N = 512 on):",
        table(["W", "R", "D", *(f"N = {n}" for n in arguments.sizes)], rows),
        f"The largest is {worst:.2f}.",
    )


if __name__ == "__main__":
    main()
