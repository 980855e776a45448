"""How close are the alignment and the graph to a bare matrix product of real words by real regions?"""

from __future__ import annotations

import torch
from _baselines import dense, per_caption
from _common import RELEASE, bare_matmul, make_batch, options, ratio_table, section, time_in_turn

from hrem_layers import AssociationGraph, align_fragments


def main() -> None:
    arguments = options(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    batch = make_batch(**RELEASE)
    images, texts, mask = batch.image_fragments, batch.text_fragments, batch.text_mask
    lengths = mask.sum(dim=1).tolist()
    graph = AssociationGraph()
    ours, theirs = align_fragments(images, texts, None, mask), dense(images, texts, mask)
    loop = per_caption(images, texts, lengths)
    for x, y, z in zip(ours, theirs, loop, strict=True):
        assert torch.allclose(x, y, atol=1e-5) and torch.allclose(x, z, atol=1e-5), "the baselines compute the same"

    def step(align, *more):
        r, c = images.clone().requires_grad_(), texts.clone().requires_grad_()
        sum(x.square().sum() for x in align(r, c, *more)).backward()

    with torch.no_grad():
        forward = time_in_turn(
            {
                "matmul": bare_matmul(batch),
                "align_fragments": lambda: align_fragments(images, texts, None, mask),
                "AssociationGraph": lambda: graph(*batch[:4], None, mask),
                "dense PyTorch": lambda: dense(images, texts, mask),
                "loop over captions": lambda: per_caption(images, texts, lengths),
            },
            arguments.repeats,
            arguments.clock,
        )
    both = time_in_turn(
        {
            "matmul": bare_matmul(batch),
            "align_fragments": lambda: step(lambda r, c: align_fragments(r, c, None, mask)),
            "dense PyTorch": lambda: step(dense, mask),
            "loop over captions": lambda: step(per_caption, lengths),
        },
        max(3, arguments.repeats // 2),
        arguments.clock,
    )
    section(
        "Alignment and graph against the bare matrix product",
        f"{RELEASE['n']} images of {RELEASE['regions']} regions, {RELEASE['n']} captions of {RELEASE['shortest']} to "
        f"{RELEASE['longest']} words, D = {RELEASE['dim']}, float32. *matmul* multiplies the {sum(lengths)} real "
        "words by the regions and does nothing else. Forward:",
        ratio_table(forward, "matmul"),
        "Forward and backward to both fragments (three products at the least):",
        ratio_table(both, "matmul"),
    )


if __name__ == "__main__":
    main()
