"""Topics made in code: what an image's regions show and what a text's words name are concepts of one topic."""

from __future__ import annotations

from pathlib import Path

import numpy as np

TOPICS, CONCEPTS, PER_TOPIC = 40, 200, 20


def write(
    folder: Path, *, sizes: tuple[int, int, int] = (2000, 500, 1000), regions: int = 8, dim: int = 128, seed: int = 0
) -> None:
    """Writes the precomputed form. An image shows four of the caption's concepts among clutter, each as the
    concept's vector plus noise of the same size; a word ``w17`` is concept 17. Word vectors lie beside."""
    random = np.random.default_rng(seed)
    topics = np.stack([random.permutation(CONCEPTS)[:PER_TOPIC] for _ in range(TOPICS)])
    shapes, meanings = random.standard_normal((2, CONCEPTS, dim)).astype(np.float32)
    for name, size in zip(("train", "dev", "test"), sizes, strict=True):
        captions, images = [], np.empty((size, regions, dim), np.float32)
        for i in range(size):
            said = random.permutation(topics[random.integers(TOPICS)])[:6]
            shown = np.concatenate([said[:4], random.integers(CONCEPTS, size=regions - 4)])
            images[i] = shapes[shown] + random.standard_normal((regions, dim))
            captions.append(" ".join(f"w{c}" for c in said[: random.integers(3, 7)]))
        np.save(folder / f"{name}_ims.npy", images)
        (folder / f"{name}_caps.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    np.savez(folder / "word_vectors.npz", words=np.array([f"w{c}" for c in range(CONCEPTS)]), vectors=meanings)
