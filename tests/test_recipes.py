"""The recipes run, each on data of its own in a small form, and say what they should."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from precomputed import write_folder

from hrem_layers import retrieval_metrics

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "examples" / "recipes"


def rsum(text: str) -> float:
    return float(re.findall(r"rSum ([\d.]+)", text)[-1])


def test_recipes_are_short() -> None:
    for path in [*RECIPES.glob("*.py"), ROOT / "examples" / "minimal.py"]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= (65 if path.name == "minimal.py" else 150), path


def test_minimal_learns(capsys: pytest.CaptureFixture[str]) -> None:
    found = runpy.run_path(str(ROOT / "examples" / "minimal.py"))["main"]()
    assert found > 300 and f"rSum {found:.1f}" in capsys.readouterr().out  # chance: 16


COLORS = {"red": (230, 30, 30), "green": (20, 180, 40), "blue": (30, 60, 220), "yellow": (240, 220, 30)}
PLACES = {"left": (0, 16), "right": (16, 0), "top": (0, 0), "bottom": (16, 16)}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """16 pictures of a coloured square somewhere, with two captions each but for the first, which has one."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for color, rgb in COLORS.items():
        for place, (x, y) in PLACES.items():
            pixels = np.full((32, 32, 3), 255, np.uint8)
            pixels[y : y + 16, x : x + 16] = rgb
            name = f"{color}-{place}.png"
            image.fromarray(pixels).save(folder / name)
            rows.append({"file_name": name, "text": [f"a {color} square {place}", f"{place} is {color}"]})
    rows[0]["text"] = rows[0]["text"][0]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return folder


def tiny_model(folder: Path, kind: str) -> Path:
    """A CLIP or SigLIP with random weights and a word tokenizer, saved as the hub's are."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[pad]", "[unk]", "[start]", "[end]", "a", "is", "square", *COLORS, *PLACES]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[unk]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing("[start] $A [end]", special_tokens=[
        ("[start]", 2), ("[end]", 3),
    ])  # fmt: skip
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[pad]", unk_token="[unk]", bos_token="[start]", eos_token="[end]",
        model_max_length=12,
    )  # fmt: skip
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = size | {
        "vocab_size": len(words), "max_position_embeddings": 12, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0
    }  # fmt: skip
    vision = size | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)
        model, processor = transformers.CLIPModel(config), transformers.CLIPProcessor
        images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    else:
        config = transformers.SiglipConfig(text_config=text | {"projection_size": 32}, vision_config=vision)
        model, processor = transformers.SiglipModel(config), transformers.SiglipProcessor
        torch.nn.init.constant_(model.logit_scale, 2.3)  # where SigLIP starts, for batches of 8
        torch.nn.init.constant_(model.logit_bias, -2.0)
        images = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    model.save_pretrained(folder)
    processor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recipe", ["clip_trainer", "clip_accelerate"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_clip(recipe: str, kind: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    model = tiny_model(tmp_path / "model", kind)
    monkeypatch.syspath_prepend(RECIPES)
    main = runpy.run_path(str(RECIPES / f"{recipe}.py"))["main"]
    found = main([
        "--model", str(model), "--train", str(pictures), "--test", str(pictures), "--output-dir", str(tmp_path / "out"),
        "--batch-size", "8", "--epochs", "15" if kind == "clip" else "40", "--lr", "3e-3", "--relation-lr", "1e-3",
        "--warmup-steps", "10",
    ])  # fmt: skip
    assert rsum(found) > 300, found  # chance: 119 for the pictures, 104 for the captions
    transformers = pytest.importorskip("transformers")
    again = transformers.AutoModel.from_pretrained(tmp_path / "out")  # an ordinary model, with nothing of ours
    assert not any("loss" in name or "graph" in name for name in again.state_dict())


@pytest.mark.parametrize(
    ("recipe", "options"), [("clip_trainer", ["--train", "x", "--test", "x"]), ("lightning_ddp", ["x"])]
)
def test_a_batch_is_made_of_whole_neighbourhoods(
    recipe: str, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate" if recipe == "clip_trainer" else "lightning")
    monkeypatch.syspath_prepend(RECIPES)
    with pytest.raises(SystemExit):
        runpy.run_path(str(RECIPES / f"{recipe}.py"))["main"]([*options, "--batch-size", "6"])
    assert "--batch-size must be a multiple of 4" in capsys.readouterr().err


@pytest.mark.parametrize("vectors", [False, True], ids=["regions", "one vector per image"])
def test_vse_infinity(vectors: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "data", train=96, test=24, regions=4, repeat=())
    if vectors:
        for split in ("train", "test"):
            np.save(folder / f"{split}_ims.npy", np.load(folder / f"{split}_ims.npy").reshape(-1, 96))
    monkeypatch.syspath_prepend(RECIPES)
    main = runpy.run_path(str(RECIPES / "vse_infinity.py"))["main"]
    found = main([str(folder), "--dim", "64", "--batch-size", "48", "--epochs", "8", "--lr", "5e-3"])
    assert found > 300  # chance: 133


def test_gpo_ignores_padding_and_holds_mean_and_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(RECIPES)
    gpo = runpy.run_path(str(RECIPES / "vse_infinity.py"))["GPO"]()
    x, mask = torch.randn(3, 6, 5), torch.arange(6) < torch.tensor([[6], [3], [1]])
    torch.testing.assert_close(gpo(x, mask)[1], gpo(x[1:2, :3], mask[1:2, :3])[0])
    torch.testing.assert_close(gpo(x, mask)[2], x[2, 0])
    torch.nn.init.zeros_(gpo.weight.weight)
    torch.testing.assert_close(gpo(x, mask)[1], x[1, :3].mean(0))


def run_lightning(folder: Path, output: Path, *more: str) -> str:
    pytest.importorskip("lightning")
    done = subprocess.run(
        [
            sys.executable, str(RECIPES / "lightning_ddp.py"), str(folder), "--accelerator", "cpu", "--dim", "32",
            "--batch-size", "32", "--epochs", "8", "--lr", "5e-3", "--warmup-steps", "5", "--output-dir", str(output),
            *more,
        ],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_lightning(devices: int, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", train=96, test=25, regions=4, repeat=())  # 125 captions: odd
    found = run_lightning(folder, tmp_path / "out", "--devices", str(devices))
    assert rsum(found) > 300, found  # chance: 128


@pytest.mark.parametrize(("recipe", "reader"), [("pair_folder", "Pairs"), ("clip_relations", "Captions")])
def test_a_folder_that_is_not_there_is_named(
    recipe: str, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if recipe == "clip_relations":
        pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(RECIPES)
    read = runpy.run_path(str(RECIPES / f"{recipe}.py"))[reader]
    with pytest.raises(SystemExit, match=rf"error: {tmp_path}/mistyped has no file"):
        read(tmp_path / "mistyped", *(["train"] if reader == "Pairs" else []))


def test_retrieval_metric_counts_each_image_and_caption_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchmetrics")
    monkeypatch.syspath_prepend(RECIPES)
    metric = runpy.run_path(str(RECIPES / "retrieval_metric.py"))["RetrievalMetric"]()
    torch.manual_seed(0)
    images = torch.randn(20, 8)
    texts = images.repeat_interleave(3, 0) + torch.randn(60, 8)
    right = retrieval_metrics(images, texts, captions_per_image=3)
    captions = torch.cat([torch.randperm(60), torch.tensor([5, 6, 59])])  # in any order, three of them twice
    for some in captions.split(7):
        metric.update(images[some // 3], texts[some], some // 3, some)
    assert {name: pytest.approx(float(value)) for name, value in metric.compute().items()} == right.as_dict()
    metric.reset()
    assert not metric.images
