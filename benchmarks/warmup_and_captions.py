"""What does a warm-up step cost over the one term that it needs, and what do several captions per image save?"""

from __future__ import annotations

import torch
from _common import RELEASE, make_batch, options, ratio_table, section, time_in_turn

from hrem_layers import HREMLoss, TripletLoss

CAPTIONS = 5


def main() -> None:
    arguments = options(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    batch = make_batch(**RELEASE)
    n, positives = RELEASE["n"], torch.eye(RELEASE["n"], dtype=torch.bool)
    pair_loss, warming, loss = TripletLoss(), HREMLoss(RELEASE["dim"], warmup_steps=10**9), HREMLoss(RELEASE["dim"])

    def leaves() -> list[torch.Tensor]:
        return [x.detach().requires_grad_() for x in batch[:4]]

    def base_term() -> None:
        v, u = (torch.nn.functional.normalize(x, dim=1) for x in leaves()[:2])
        pair_loss(v @ u.t(), positives).backward()

    def warmup_step() -> None:
        warming(*leaves(), None, batch.text_mask).backward()

    warmup = time_in_turn({"base term": base_term, "warm-up step": warmup_step}, 5 * arguments.repeats, arguments.clock)

    def five_steps() -> None:
        loss.zero_grad()
        for _ in range(CAPTIONS):
            loss(*leaves(), None, batch.text_mask).backward()

    index = torch.arange(n).repeat_interleave(CAPTIONS)

    def one_step() -> None:
        loss.zero_grad()
        v, u, r, c = leaves()
        texts, words, mask = (x.repeat_interleave(CAPTIONS, dim=0) for x in (u, c, batch.text_mask))
        loss(v, texts, r, words, None, mask, image_index=index).backward()

    captions = time_in_turn(
        {f"{CAPTIONS} steps of {n} pairs": five_steps, f"{n} images with {CAPTIONS} captions each": one_step},
        max(3, arguments.repeats // 3), arguments.clock,
    )  # fmt: skip
    section(
        "Warm-up, and several captions per image",
        "At the release's size. The base term is normalisation, one product and TripletLoss, forward and backward. "
        f"The {CAPTIONS} captions are in one batch with `image_index`; the encoders, which then run once per image, "
        "are not counted.",
        ratio_table(warmup, "base term"),
        ratio_table(captions, f"{CAPTIONS} steps of {n} pairs"),
    )


if __name__ == "__main__":
    main()
