"""Search with trained encoders: pictures and features in, the right ones out, in words, by picture, on the page."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_runs import command
from precomputed import write_folder

ROOT = Path(__file__).parents[1]
SEARCH = ROOT / "examples" / "search"
for package in ("tqdm", "tensorboard", "matplotlib", "faiss", "PIL", "efficientnet_lite_pytorch"):
    pytest.importorskip(package, reason='needs pip install "hrem-layers[examples,search]"')
sys.path.append(str(SEARCH))

import checkpoint  # noqa: E402
import flickr30k  # noqa: E402
import search  # noqa: E402
from collection import Collection, thumbnail  # noqa: E402
from pictures import feature_maps, open_picture  # noqa: E402
from PIL import Image  # noqa: E402
from saved_encoders import load_encoders, save_encoders  # noqa: E402
from searcher import Searcher, make_index  # noqa: E402

COLORS = {"red": (230, 30, 30), "green": (20, 180, 40), "blue": (30, 60, 220), "yellow": (240, 220, 30)}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares of four colours in four corners, some in a folder below, one upright by its EXIF only, one broken."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "below").mkdir()
    for place, (color, rgb) in enumerate(COLORS.items()):
        for corner in range(4):
            pixels = np.full((96, 96, 3), 255, np.uint8)
            y, x = 48 * (corner // 2), 48 * (corner % 2)
            pixels[y : y + 48, x : x + 48] = rgb
            name = f"{color}-{corner}.{'jpg' if corner % 2 else 'png'}"
            Image.fromarray(pixels).save((folder / "below" if place == 0 else folder) / name)
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / ".hidden.png").write_bytes(b"hidden")
    (folder / "note.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the script on the pictures' feature maps; its captions name the colours."""
    data = tmp_path_factory.mktemp("data")
    collection = Collection(pictures)
    features = np.stack(list(collection))
    captions = [
        text.format(item.file.rsplit("/")[-1].split("-")[0])
        for item in collection.items
        for text in ("a {} square", "{}", "the square is {}", "a {} thing", "something {} and square")
    ]
    for split in ("train", "dev", "test"):
        np.save(data / f"{split}_ims.npy", features)
        (data / f"{split}_caps.txt").write_text("\n".join(captions) + "\n")
    run = tmp_path_factory.mktemp("trained") / "run"
    options = ["--mechanism", "none", "--pair-loss", "infonce", "--epochs", "8", "--batch-size", "16", "--lr", "3e-3"]
    flickr30k.main(command(data, run, *options))
    return run


@pytest.fixture(scope="module")
def index(trained: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    left = make_index(folder, pictures, trained / "best.pt")
    assert len(left) == 1 and "broken.jpg: expected a picture" in left[0]
    return folder


@pytest.fixture(scope="module")
def searcher(index: Path) -> Searcher:
    return Searcher(index)


def test_files_are_short() -> None:
    assert all(len(path.read_text(encoding="utf-8").splitlines()) < 150 for path in SEARCH.glob("*.py"))


# ---------------------------------------------------------------------------------------- encoders


def test_encoders_without_the_loss(trained: Path, tmp_path: Path) -> None:
    best = load_encoders(trained / "best.pt")
    save_encoders(tmp_path / "encoders.pt", best)
    state = torch.load(tmp_path / "encoders.pt", weights_only=True)
    assert {key.split(".")[0] for key in state["model"]} == {"image_encoder", "text_encoder"}
    again = load_encoders(tmp_path / "encoders.pt")
    texts, features = ["a red square", "blue"], [np.ones((3, 1280), np.float32), np.zeros((5, 1280), np.float32)]
    assert torch.equal(again.texts(texts), best.texts(texts))
    assert torch.equal(again.images(features), best.images(features))
    torch.testing.assert_close(best.texts(texts).norm(dim=1), torch.ones(2))
    assert best.texts([]).shape == (0, 32)


def test_they_are_what_the_script_evaluates(trained: Path) -> None:
    state = checkpoint.load(trained / "best.pt")
    encoders = load_encoders(trained / "best.pt")
    for key, x in state["model"].items():
        if key.startswith("image_encoder."):
            assert torch.equal(encoders.image_encoder.state_dict()[key.removeprefix("image_encoder.")], x)
    assert not encoders.image_encoder.training and not encoders.text_encoder.training


def test_padding_of_a_batch_changes_no_embedding(trained: Path) -> None:
    encoders = load_encoders(trained / "best.pt")
    features = [np.random.default_rng(i).normal(size=(i + 1, 1280)).astype(np.float32) for i in range(5)]
    alone = torch.cat([encoders.images([x]) for x in features])
    torch.testing.assert_close(encoders.images(features), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.ones((3, 24)), r"take \(regions, 1280\) features per image, got \(3, 24\)"),
        (np.ones(1280), r"got \(1280,\)"),
        (np.ones((0, 1280)), r"got \(0, 1280\)"),
        (np.ones((3, 1280), complex), r"expected features that are numbers, got complex128 \(3, 1280\)"),
        (np.full((3, 1280), np.nan), "item 1: expected finite features"),
    ],
)
def test_features_that_do_not_fit(trained: Path, features: np.ndarray, message: str) -> None:
    encoders = load_encoders(trained / "best.pt")
    with pytest.raises(ValueError, match=message):
        encoders.images([np.ones((3, 1280)), features])


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint"])
def test_no_encoders(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=r"x\.pt: expected a checkpoint"):
        load_encoders(tmp_path / "x.pt")


@pytest.mark.parametrize(("key", "value"), [("vocabulary", None), ("model", []), ("arguments", {}), ("encoders", 2)])
def test_encoders_that_lack_something(trained: Path, tmp_path: Path, key: str, value: object) -> None:
    save_encoders(tmp_path / "x.pt", load_encoders(trained / "best.pt"))
    checkpoint.save(tmp_path / "x.pt", {**checkpoint.load(tmp_path / "x.pt"), key: value})
    with pytest.raises(checkpoint.Damaged, match=rf"x\.pt: key '{key}': "):
        load_encoders(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("index.faiss", lambda x: b""),
        ("index.faiss", lambda x: x[:-4] + b"\0\0\xc0\x7f"),  # NaN
        ("items.json", lambda x: x.replace(b".png", b".gif", 1)),
        ("items.json", lambda x: b"null"),
        ("items.json", lambda x: b"[" * 10**5),
    ],
)
def test_a_damaged_index(index: Path, tmp_path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    folder = shutil.copytree(index, tmp_path / "index")
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(ValueError, match=r"index: expected a whole index \(.*make it again with --of"):
        Searcher(folder)


# ---------------------------------------------------------------------------------------- questions


@pytest.mark.parametrize("color", COLORS)
def test_words_find_the_pictures(searcher: Searcher, color: str) -> None:
    found = searcher.words(f"a {color} square", top=4)
    assert sum(color in item.file for item in found.items) >= 3, found
    assert found.scores == sorted(found.scores, reverse=True) and -1 <= found.scores[-1] <= found.scores[0] <= 1.00001
    assert not found.unknown


@pytest.mark.parametrize("form", ["path", "bytes"])
def test_a_picture_finds_itself(searcher: Searcher, pictures: Path, form: str) -> None:
    path = pictures / "blue-2.png"
    found = searcher.picture(path if form == "path" else path.read_bytes(), top=3)
    assert found.items[0].file == str(path) and found.scores[0] == pytest.approx(1, abs=1e-4)


def test_unknown_words_are_said(searcher: Searcher) -> None:
    found = searcher.words("a red flibber, mostly Quux flibber")
    assert found.unknown == ["flibber", "mostly", "quux"]
    assert repr(found).startswith("not known: flibber, mostly, quux\n")
    with pytest.raises(ValueError, match="none of these words is known: flibber, quux"):
        searcher.words("flibber quux")
    with pytest.raises(ValueError, match="expected words"):
        searcher.words("  ")
    with pytest.raises(ValueError, match=r"none of these words|expected words"):
        searcher.words("?!")


def test_more_than_there_are(searcher: Searcher) -> None:
    assert len(searcher.words("red", top=1000).items) == 16


def test_thumbnails(searcher: Searcher, pictures: Path) -> None:
    found = searcher.words("a yellow square", top=5)
    page = Image.open(io.BytesIO(found._repr_png_()))
    assert page.width > 4 * 160 and page.height > 2 * 160
    for place in range(2):  # the tile shows the picture: its mean colour
        x, y = 8 + 168 * place, 36
        tile = np.asarray(page.convert("RGB").crop((x, y, x + 160, y + 160)), dtype=float).mean(axis=(0, 1))
        picture = np.asarray(open_picture(Path(found.items[place].file)), dtype=float).mean(axis=(0, 1))
        assert np.abs(tile - picture).max() < 6


def test_pictures_of_any_kind_stand_upright_on_white(tmp_path: Path) -> None:
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, :40] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    Image.fromarray(wide).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    turned = np.asarray(open_picture(tmp_path / "turned.jpg", 64)).astype(int)
    assert turned[4, 32, 0] > 200 and turned[60, 32].max() < 60 and turned[32, 2].min() > 240
    Image.new("LA", (10, 10), (0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(open_picture(tmp_path / "clear.png", 32)).min() == 255
    Image.new("CMYK", (9, 7), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    (maps,) = feature_maps([open_picture(tmp_path / "print.jpg", 64)])
    assert maps.shape == (4, 1280) and np.isfinite(maps).all()


# ---------------------------------------------------------------------------------------- features


@pytest.fixture(scope="module")
def on_features(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data folder whose dev rows are repeated five times, and encoders for it."""
    data = write_folder(tmp_path_factory.mktemp("precomputed"), train=16, dev=6, test=6)
    run = tmp_path_factory.mktemp("small") / "run"
    flickr30k.main(command(data, run, "--epochs", "1"))
    return data, run / "best.pt"


def test_the_relation_modules_stay_behind(on_features: tuple[Path, Path], tmp_path: Path) -> None:
    assert any(key.startswith("loss.graph.") for key in checkpoint.load(on_features[1])["model"])
    save_encoders(tmp_path / "encoders.pt", load_encoders(on_features[1]))
    kept = torch.load(tmp_path / "encoders.pt", weights_only=True)["model"]
    assert {key.split(".")[0] for key in kept} == {"image_encoder", "text_encoder"}


def test_a_file_of_features(on_features: tuple[Path, Path], tmp_path: Path) -> None:
    data, encoders = on_features
    left = make_index(tmp_path / "index", data / "dev_ims.npy", encoders)
    searcher = Searcher(tmp_path / "index")
    assert len(left) == 24 and [item.row for item in searcher.items] == [0, 5, 10, 15, 20, 25]
    assert thumbnail(searcher.items[0]) is None
    np.save(data / "dev_pictures.npy", np.full((30, 8, 8, 3), 7, np.uint8))
    assert np.asarray(thumbnail(searcher.items[1])).max() == 7
    assert len(searcher.words("dog", top=3).sheet().getcolors(1 << 20)) > 2


def test_of_a_row_the_padding_is_no_region(on_features: tuple[Path, Path], tmp_path: Path) -> None:
    regions = np.load(on_features[0] / "test_ims.npy")[::5]
    regions[1, 2:] = 0
    np.save(tmp_path / "test_ims.npy", regions)
    np.save(tmp_path / "test_lengths.npy", np.array([2 if i == 1 else regions.shape[1] for i in range(len(regions))]))
    assert [len(x) for x in Collection(tmp_path / "test_ims.npy")][:2] == [regions.shape[1], 2]
    np.save(tmp_path / "test_lengths.npy", np.zeros(len(regions), np.int64))
    with pytest.raises(ValueError, match=r"test_lengths\.npy"):
        list(Collection(tmp_path / "test_ims.npy"))


def test_the_script_takes_encoders_alone(on_features: tuple[Path, Path], tmp_path: Path) -> None:
    data, trained = on_features
    save_encoders(tmp_path / "encoders.pt", load_encoders(trained))
    for name, path in (("kept", tmp_path / "encoders.pt"), ("best", trained)):
        options = ["--data-dir", str(data), "--output-dir", str(tmp_path / name), "--device", "cpu"]
        flickr30k.main(["--eval-only", str(path), *options])
    kept, best = (json.loads((tmp_path / name / "metrics.json").read_text())["test"] for name in ("kept", "best"))
    assert kept == best
    with pytest.raises(SystemExit, match=r"encoders\.pt holds encoders without the loss: give the --data-dir"):
        flickr30k.main(["--eval-only", str(tmp_path / "encoders.pt"), "--device", "cpu"])


def test_encoders_for_pictures_are_trained_like_those_of_the_default_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train as for_pictures
    from options import DEMO, parse_arguments

    pytest.importorskip("emoji_pairs")
    given: list[list[str]] = []
    monkeypatch.setattr(flickr30k, "main", given.append)
    monkeypatch.setattr("emoji_pairs.prepare_emoji_pairs", lambda cache: tmp_path)
    (tmp_path / "word_vectors.npz").touch()
    for_pictures.main(["--lr", "1"])
    arguments = parse_arguments(given[0])
    assert {key: getattr(arguments, key) for key in DEMO} == {**DEMO, "lr": 1.0} and arguments.data_dir == tmp_path


def test_a_folder_of_features(on_features: tuple[Path, Path], tmp_path: Path) -> None:
    data, encoders = on_features
    (tmp_path / "regions").mkdir()
    for i, row in enumerate(np.load(data / "test_ims.npy")):
        np.save(tmp_path / "regions" / f"{i}.npy", row[: i + 1])  # ragged
    Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "3.png")
    make_index(tmp_path / "index", tmp_path / "regions", encoders)
    shutil.move(tmp_path / "3.png", tmp_path / "regions" / "3.png")
    searcher = Searcher(tmp_path / "index")
    found = searcher.picture(tmp_path / "regions" / "3.npy", top=2)
    assert found.items[0].file.endswith("3.npy") and found.scores[0] == pytest.approx(1, abs=1e-5)
    assert thumbnail(found.items[0]).getpixel((80, 80)) == (1, 2, 3)  # type: ignore[union-attr]


def test_pictures_for_encoders_of_other_features(
    on_features: tuple[Path, Path], pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"take \(regions, 24\) features per image, got \(16, 1280\)"):
        make_index(tmp_path / "index", pictures, on_features[1])


# ---------------------------------------------------------------------------------------- command line, pages


def test_command_line(trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "index")
    search.main([folder, "--of", str(pictures), "--encoders", str(trained / "best.pt"), "a", "red", "square"])
    printed = capsys.readouterr()
    assert "16 images" in printed.out and printed.out.count(".jpg") + printed.out.count(".png") == 12
    assert "left out:" in printed.err and "broken.jpg" in printed.err
    search.main([folder, "--picture", str(pictures / "blue-2.png"), "--top", "2", "--sheet", str(tmp_path / "s.png")])
    assert "blue-2.png" in capsys.readouterr().out.splitlines()[0]
    assert Image.open(tmp_path / "s.png").format == "PNG"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["INDEX"], "expected --of SOURCE, words, --picture or --serve"),
        (["INDEX", "red", "--serve"], "of the last three one"),
        (["INDEX", "red", "--top", "0"], "--top: expected a whole number from 1, got 0"),
        (["INDEX", "--of", "x"], "--of and --encoders"),
        (["NOWHERE", "red"], "expected an index, found no items.json"),
        (["NEW", "--of", "NOWHERE", "--encoders", "BEST"], "expected a folder of pictures"),
        (["NEW", "--of", "EMPTY", "--encoders", "BEST"], "expected pictures"),
        (["NEW", "--of", "BROKEN", "--encoders", "BEST"], "nothing could be read"),
        (["INDEX", "--picture", "NOWHERE"], "expected a picture, got a file that does not open"),
    ],
)
def test_errors_are_one_line(
    index: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    for name in ("EMPTY", "BROKEN"):
        (tmp_path / name).mkdir()
    (tmp_path / "BROKEN" / "x.png").write_bytes(b"x")
    places = {"INDEX": index, "BEST": trained / "best.pt"}
    options = [str(places.get(x, tmp_path / x)) if x.isupper() else x for x in options]
    with pytest.raises(SystemExit) as error:
        search.main(options)
    said = capsys.readouterr().err if error.value.code == 2 else str(error.value.code)
    assert message in said and "\n" not in said.strip().split("error:")[-1]


@pytest.mark.parametrize("page", ["search.md", "authors_checkpoint.md"])
def test_the_page_s_blocks_run(
    page: str, index: Path, trained: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").symlink_to(pictures)
    prepare(tmp_path, index, trained, monkeypatch)
    text = (ROOT / "docs" / "recipes" / page).read_text(encoding="utf-8")
    found = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert found
    for code in found:
        exec(compile(code, page, "exec"), {"__name__": "__main__"})
    for name in set(re.findall(r"(--[a-z][\w-]+)", text)):
        from options import make_parser

        known = {x for p in (make_parser(), search.make_parser()) for a in p._actions for x in a.option_strings}
        assert name in known, name


def test_the_notebook_runs(index: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, index, trained, monkeypatch)
    cells = json.loads((SEARCH / "search.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec("".join(cell["source"]), names)
    assert names["found"]._repr_png_().startswith(b"\x89PNG") and (tmp_path / "found.png").is_file()


def prepare(folder: Path, index: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``folder`` is where the pages' commands are given: with ``examples/``, ``index`` and ``best.pt``."""
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "index").symlink_to(index)
    shutil.copy(trained / "best.pt", folder / "best.pt")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])


# ---------------------------------------------------------------------------------------- in a browser


@pytest.fixture
def served(searcher: Searcher) -> Any:
    gradio = pytest.importorskip("gradio", reason='the page needs pip install "hrem-layers[search]"')
    from page import serve

    yield serve(searcher, wait=False, browser=False)
    gradio.close_all()


def test_only_this_machine_reaches_the_page(served: str) -> None:
    port = int(served.rstrip("/").rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing: asks for this machine's address
        probe.connect(("192.0.2.1", 9))
        other = probe.getsockname()[0]
    if other.startswith("127."):
        pytest.skip("this machine has no other address")
    with pytest.raises(OSError):
        socket.create_connection((other, port), timeout=5)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_real_browser(served: str, pictures: Path, tmp_path: Path) -> None:
    driver = pytest.importorskip("playwright.sync_api", reason="drives the browser: pip install playwright")
    with driver.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        elsewhere: list[str] = []
        page.on("request", lambda r: None if r.url.startswith((served, "data:", "blob:")) else elsewhere.append(r.url))
        page.goto(served)
        page.fill("#words textarea, #words input", "a red flibber")
        page.press("#words textarea, #words input", "Enter")
        page.wait_for_selector("#found img")
        assert "not known: flibber" in page.inner_text("#note")
        first = page.inner_text("#found .caption-label >> nth=0")
        assert re.match(r"0\.\d{3} +red-\d", first), first
        page.fill("#words textarea, #words input", "flibber")
        page.press("#words textarea, #words input", "Enter")
        page.wait_for_function("document.querySelector('#note').innerText.includes('none of these words')")
        page.set_input_files("#picture input[type=file]", str(pictures / "blue-2.png"))
        page.wait_for_function(
            "document.querySelector('#found .caption-label')?.innerText.includes('blue-2.png')", timeout=10_000
        )
        page.screenshot(path=os.environ.get("SCREENSHOT", str(tmp_path / "page.png")))
        browser.close()
    assert not elsewhere
