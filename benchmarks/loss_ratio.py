"""What does a training step of HREMLoss cost over the graph's forward pass, and over a bare matrix product?"""

from __future__ import annotations

import torch
from _common import RELEASE, bare_matmul, make_batch, options, ratio_table, section, time_in_turn
from torch.utils.flop_counter import FlopCounterMode

from hrem_layers import AssociationGraph, HREMLoss


def main() -> None:
    arguments = options(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    batch = make_batch(**RELEASE)
    loss = HREMLoss(RELEASE["dim"])
    full = HREMLoss(RELEASE["dim"], graph=AssociationGraph(detach_fragments=False))

    def forward() -> None:
        with torch.no_grad():
            loss.graph(*batch[:4], None, batch.text_mask)

    def step(module: HREMLoss) -> None:
        module.zero_grad()
        inputs = [x.detach().requires_grad_() for x in batch[:4]]
        module(*inputs, None, batch.text_mask).backward()

    timings = time_in_turn(
        {
            "matmul": bare_matmul(batch),
            "graph forward": forward,
            "HREMLoss step, fragments detached": lambda: step(loss),
            "HREMLoss step, detach_fragments=False": lambda: step(full),
        },
        arguments.repeats,
        arguments.clock,
    )
    product = 2 * int(batch.text_mask.sum()) * RELEASE["n"] * RELEASE["regions"] * RELEASE["dim"]
    with FlopCounterMode(display=False) as counter:  # the alignment is opaque to it: these are all the others
        step(loss)
    rest = counter.get_total_flops()
    graph, detached = timings["graph forward"], timings["HREMLoss step, fragments detached"]
    section(
        "A training step of HREMLoss",
        f"The same sizes. The step is forward and backward, with the gradients of inputs and parameters. Beside the "
        f"alignment's product ({product / 1e9:.1f} GFLOP) the products of the relation transformer over 2N nodes, "
        f"the relevance MLPs and the cosines, forward and backward, are {rest / 1e9:.1f} GFLOP, "
        f"{rest / product:.2f} of it: a step with detached fragments multiplies {1 + rest / product:.2f} times, and "
        f"one with gradients to the fragments {3 + rest / product:.2f} times as much as the bare product.",
        ratio_table(timings, "matmul"),
        f"A step with detached fragments takes {detached.median / graph.median:.2f} times the graph's forward "
        f"(ratio of medians; of best times {detached.best / graph.best:.2f}).",
    )


if __name__ == "__main__":
    main()
