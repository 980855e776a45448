"""What a run leaves behind besides its picture: metrics.json, embeddings, and TensorBoard's last entries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoint import replacing
from pair_data import Pairs
from torch import Tensor


def chance(pairs: Pairs) -> dict[str, float]:
    """R@1 in percent of a ranking at random: image to text, text to image."""
    n, k = pairs.num_images, pairs.captions_per_image
    return {"i2t_r1": 100 * k / (n * k), "t2i_r1": 100 / n}


def write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def attribution(data: Path) -> str:
    """Whose the pictures of a data folder are, as its metadata.json says; empty if nothing does."""
    try:
        said = json.loads((data / "metadata.json").read_text(encoding="utf-8")).get("attribution", "")
    except (OSError, ValueError, AttributeError):
        return ""
    return said if isinstance(said, str) else ""


def save_embeddings(folder: Path, split: str, images: Tensor, texts: Tensor) -> list[str]:
    """Writes ``{split}_image_embeddings.npy`` (n, d) and ``{split}_text_embeddings.npy`` (m, d), float32 of length 1:
    their products are the similarities that the recalls were counted from. Returns the names."""
    names = []
    for side, embeddings in (("image", images), ("text", texts)):
        names.append(f"{split}_{side}_embeddings.npy")
        with replacing(folder / names[-1]) as partial, partial.open("wb") as file:
            np.save(file, torch.nn.functional.normalize(embeddings.float(), dim=1).numpy())
    return names


def add_to_tensorboard(folder: Path, picture: Path, options: dict[str, Any], final: dict[str, float]) -> None:
    """The picture, and the options with the final figures (the tab "HParams"). ``folder`` is that of the curves.

    Raises:
        OSError: the files cannot be written; names the folder.
    """
    import matplotlib.image
    from torch.utils.tensorboard import SummaryWriter

    shown = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in options.items()}
    try:
        with SummaryWriter(folder) as board:
            board.add_image("test/picture", matplotlib.image.imread(picture)[..., :3], dataformats="HWC")
            board.add_hparams(shown, {f"test/{name}": value for name, value in final.items()}, run_name=".")
    except OSError as error:
        raise OSError(f"{folder}: the final figures could not be written ({error.strerror or error})") from error
