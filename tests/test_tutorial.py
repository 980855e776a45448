"""The tutorial runs from the first cell to the last, and page and notebook say the same."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

DOCS = Path(__file__).parents[1] / "docs"


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tutorial", DOCS / "make_tutorial.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notebook_is_made_of_the_page() -> None:
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    kept = (DOCS / "tutorial.ipynb").read_text(encoding="utf-8")
    assert kept == maker().notebook(page), "run python docs/make_tutorial.py"


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(DOCS)
    notebook = json.loads((DOCS / "tutorial.ipynb").read_text(encoding="utf-8"))
    namespace, figures = {"__name__": "__main__"}, 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            figures += hasattr(maker().run_cell("".join(cell["source"]), namespace), "savefig")
    printed = capsys.readouterr().out
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    for shown in re.findall(r"^```text\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE):
        assert shown.removesuffix("...\n") in printed, shown
    assert figures == 4
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    assert namespace["history"][-1]["base"] < 0.4 * namespace["history"][0]["base"]
    healthy, _, broken = printed.partition("Nothing found.")
    assert "inverted mask" not in healthy and broken.strip().startswith("inverted mask")
    metrics = namespace["metrics"]
    assert metrics.i2t.r1 > 80 and metrics.t2i.r1 > 80
    # what the page says of the pictures
    block = namespace["relations"].graph.block("i2t")
    own = namespace["image_index"].unsqueeze(0) == namespace["torch"].arange(32).unsqueeze(1)
    assert block.relevance[own].mean() > block.relevance[~own].mean()
    regions, words = namespace["regions"][0], namespace["words"][0]
    cosine = namespace["nn"].functional.cosine_similarity(words[:, None], regions[None], dim=2)
    red, green, middle, top = 1, 5, 21, 3
    assert cosine[red, middle] > 0.3 > cosine[green, middle]
    assert cosine[green, top] > cosine[red, top]


def test_the_data_are_32_pairs_and_small() -> None:
    captions = (DOCS / "tutorial_data" / "captions.txt").read_text(encoding="utf-8").splitlines()
    assert len(captions) == len(set(captions)) == 64
    assert (DOCS / "tutorial_data" / "pictures.png").stat().st_size < 150_000
    assert all(path.stat().st_size < 150_000 for path in (DOCS / "images").iterdir())
