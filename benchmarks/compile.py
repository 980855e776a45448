"""What does torch.compile gain for HREMLoss on this machine, and does it compile once?"""

from __future__ import annotations

import functools

import torch
from _common import Batch, make_batch, options, ratio_table, section, time_in_turn
from torch._dynamo.utils import counters

from hrem_layers import HREMLoss

SIZES = {"release (N = 128, D = 1024)": (128, 36, 8, 24, 1024), "small (N = 72, D = 256)": (72, 36, 8, 24, 256)}


def step(module, batch: Batch) -> None:
    module.zero_grad()
    inputs = [x.detach().requires_grad_() for x in batch[:4]]
    module(*inputs, None, batch.text_mask).backward()


def main() -> None:
    arguments = options(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    paragraphs = []
    for name, size in SIZES.items():
        torch._dynamo.reset()
        counters.clear()
        batch, loss = make_batch(*size), HREMLoss(size[-1])
        compiled = torch.compile(loss, fullgraph=True, dynamic=True)
        variants = {"eager": functools.partial(step, loss, batch), "compiled": functools.partial(step, compiled, batch)}
        timings = time_in_turn(variants, arguments.repeats, arguments.clock)
        for n, regions, words in ((96, 30, 20), (80, 33, 28), (300, 20, 12)):
            step(compiled, make_batch(n, regions, 4, words, size[-1]))
        graphs = counters["stats"]["unique_graphs"]
        paragraphs += [
            f"{name}, {graphs} graph{'s' * (graphs != 1)} after four different N, R and W:",
            ratio_table(timings, "eager"),
        ]
    section(
        "torch.compile",
        "It is switched on by the caller: `loss = torch.compile(loss, fullgraph=True, dynamic=True)`. The alignment is "
        "one operator in the graph, and runs as it does without; what is compiled is the rest. A step is forward "
        "and backward with detached fragments. One compilation serves all N, R and W; on a CPU Inductor makes one "
        "more if N passes 64, because it sums more than 4,096 numbers in another way. An N, R or W that happens to "
        "equal D in the first call is taken for D, and compiles once more, too.",
        *paragraphs,
    )


if __name__ == "__main__":
    main()
