"""A VSE++ / VSE∞ code base with relations: GPO stays the pooling, ``max_violation`` is switched on as there.

python examples/recipes/vse_infinity.py FOLDER     # {train,test}_ims.npy (n, R, F) or (n, F), and _caps.txt
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from pair_folder import Pairs, collate
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hrem_layers import HREMLoss, TripletLoss, retrieval_metrics


class GPO(nn.Module):
    """The generalised pooling of VSE∞: sorted fragments, weighted by their position alone (Chen et al., CVPR 2021)."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.size = size
        self.recurrent = nn.GRU(size, size, batch_first=True, bidirectional=True)
        self.weight = nn.Linear(size, 1, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (N, R, D), mask (N, R) bool, True = real -> (N, D)."""
        position = torch.arange(x.shape[1], device=x.device).unsqueeze(1)
        rate = torch.exp(torch.arange(0, self.size, 2, device=x.device) * (-math.log(10000.0) / self.size))
        waves = torch.stack([torch.sin(position * rate), torch.cos(position * rate)], dim=2).flatten(1)  # (R, size)
        packed = nn.utils.rnn.pack_padded_sequence(
            waves.expand(len(x), -1, -1), mask.sum(1).cpu(), batch_first=True, enforce_sorted=False
        )
        hidden = nn.utils.rnn.pad_packed_sequence(self.recurrent(packed)[0], True, total_length=x.shape[1])[0]
        score = self.weight(hidden[..., : self.size] + hidden[..., self.size :])  # (N, R, 1)
        share = (score / 0.1).masked_fill(~mask.unsqueeze(2), -torch.inf).softmax(dim=1)
        ordered = (
            x.masked_fill(~mask.unsqueeze(2), -torch.inf).sort(dim=1, descending=True).values
        )  # padding at the end
        return (share * ordered.masked_fill(~mask.unsqueeze(2), 0)).sum(dim=1)


class ImageEncoder(nn.Module):
    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(size, dim)
        self.residual = nn.Sequential(nn.Linear(size, dim // 2), nn.ReLU(), nn.Linear(dim // 2, dim))
        self.pool = GPO()

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (N, D), and what the loss asks for besides: fragments (N, R, D) and their mask."""
        fragments = self.project(regions) + self.residual(regions)
        mask = regions.abs().sum(dim=2) > 0  # padded regions are zero rows
        return self.pool(fragments, mask), fragments, mask


class TextEncoder(nn.Module):
    def __init__(self, words: int, dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, 300, padding_idx=0)
        self.recurrent = nn.GRU(300, dim, batch_first=True, bidirectional=True)
        self.pool = GPO()

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(tokens), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        hidden = nn.utils.rnn.pad_packed_sequence(self.recurrent(packed)[0], True, total_length=tokens.shape[1])[0]
        forth, back = hidden.chunk(2, dim=2)
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(1)  # lengths -> mask
        return self.pool((forth + back) / 2, mask), (forth + back) / 2, mask


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dim", type=int, default=1024, help="a multiple of 16")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--vse-mean-warmup-epochs", type=int, default=1, help="then max_violation, and relations")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    train = Pairs(options.folder, "train")
    test = Pairs(options.folder, "test", train.words)
    image_encoder = ImageEncoder(train.images.shape[-1], options.dim)
    text_encoder = TextEncoder(len(train.words), options.dim)
    batches = DataLoader(train, options.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    # VSE++'s ContrastiveLoss is TripletLoss with "all" negatives, with max_violation "hardest"
    loss = HREMLoss(
        options.dim, pair_loss=TripletLoss(negative_sampling="all"),
        warmup_steps=options.vse_mean_warmup_epochs * len(batches),
    )  # fmt: skip
    parameters = [*image_encoder.parameters(), *text_encoder.parameters(), *loss.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(options.epochs * 0.6)])
    for epoch in range(options.epochs):
        if epoch == options.vse_mean_warmup_epochs:
            loss.pair_loss = TripletLoss(negative_sampling="hardest")  # no parameters: it may simply be replaced
        image_encoder.train(), text_encoder.train(), loss.train()
        for numbers, regions, tokens, lengths in batches:
            v, image_fragments, region_mask = image_encoder(regions)
            u, text_fragments, word_mask = text_encoder(tokens, lengths)
            total = loss(v, u, image_fragments, text_fragments, region_mask, word_mask, image_ids=numbers)
            optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(parameters, 2.0)
            optimizer.step()
        schedule.step()
        print(f"epoch {epoch}: {total.item():.2f}")
    image_encoder.eval(), text_encoder.eval()
    images, texts = [], []
    with torch.no_grad():
        for numbers, regions, tokens, lengths in DataLoader(test, 5 * test.per_image, collate_fn=collate):
            first = torch.diff(numbers, prepend=numbers[:1] - 1) > 0
            images.append(image_encoder(regions[first])[0])
            texts.append(text_encoder(tokens, lengths)[0])
    metrics = retrieval_metrics(torch.cat(images), torch.cat(texts), captions_per_image=test.per_image)
    print(metrics)
    return metrics.rsum


if __name__ == "__main__":
    main()
