"""All of it in one file, without options or data to fetch: copy this first and put your own encoders in.

Images are sets of region vectors, texts are word ids that name some of what the image shows.
"""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hrem_layers import FragmentRelation, HREMLoss, InfoNCELoss, NeighborBatchSampler, retrieval_metrics

IMAGES, REGIONS, WORDS, CONCEPTS, SIZE, DIM, EPOCHS = 1200, 12, 6, 60, 48, 64, 12


def make_data() -> tuple[Tensor, Tensor]:
    """Regions (IMAGES, REGIONS, SIZE), each a concept's vector and noise; words (IMAGES, WORDS), 0 = padding."""
    shown = torch.stack([torch.randperm(CONCEPTS)[:REGIONS] for _ in range(IMAGES)])
    regions = torch.randn(CONCEPTS, SIZE)[shown] + 0.3 * torch.randn(IMAGES, REGIONS, SIZE)
    length = torch.randint(3, WORDS + 1, (IMAGES, 1))
    return regions, torch.where(torch.arange(WORDS) < length, shown[:, :WORDS] + 1, 0)


class Encoder(nn.Module):
    """Yours: anything that returns one embedding per sample and the fragments that it pooled."""

    def __init__(self, fragments: nn.Module) -> None:
        super().__init__()
        self.fragments, self.pool = fragments, FragmentRelation(DIM, num_heads=4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        fragments = self.fragments(x)  # (N, R, DIM)
        return self.pool(fragments, mask), fragments


def main() -> float:
    torch.manual_seed(0)
    regions, words = make_data()
    training, test = TensorDataset(regions[:1000], words[:1000]), (regions[1000:], words[1000:])
    encoders = nn.ModuleList([Encoder(nn.Linear(SIZE, DIM)), Encoder(nn.Embedding(CONCEPTS + 1, DIM))])
    # The relation modules live in the loss: train them along, and leave them out when you deploy
    loss = HREMLoss(DIM, pair_loss=InfoNCELoss(), warmup_steps=20)
    optimizer = torch.optim.AdamW([*encoders.parameters(), *loss.parameters()], lr=1e-2)
    # Images that resemble each other meet in a batch: negatives that teach something
    sampler = NeighborBatchSampler(regions[:1000].mean(1), num_clusters=25, clusters_per_batch=5, images_per_cluster=20)
    loader = DataLoader(training, batch_sampler=sampler)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for image, text in loader:
            (v, image_fragments), (u, text_fragments) = encoders[0](image), encoders[1](text, text != 0)
            terms = loss.terms(v, u, image_fragments, text_fragments, text_mask=text != 0)
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
        print(f"epoch {epoch}: " + ", ".join(f"{name} {value:.2f}" for name, value in terms._asdict().items()))
    with torch.no_grad():
        encoders.eval()
        metrics = retrieval_metrics(encoders[0](test[0])[0], encoders[1](test[1], test[1] != 0)[0])
    print(metrics)
    return metrics.rsum


if __name__ == "__main__":
    main()
