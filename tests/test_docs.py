"""What the pages say can be run runs, what they name exists, and where their links lead is something."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from readme_loop import python_blocks

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
# Whole programs that tests of their own run, with the data and the processes that those need
ELSEWHERE = {
    "README.md": "test_readme.py",
    "sampler.md": "test_sampler_docs.py",
    "tutorial.md": "test_tutorial.py",
}
EXTRAS = {"accelerate", "PIL", "datasets", "faiss", "gradio", "lightning", "matplotlib", "torchmetrics", "transformers"}


BLOCK = r"^```python\n(.*?)^```(?:\n+(?:[^\n`]+\n\n)?```text\n(.*?)^```)?"


class Block(NamedTuple):
    page: Path
    line: int
    code: str
    printed: str
    """What the page shows of its output: a block ``text`` right after it; ``...`` stands for lines left out."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        if page.name in ELSEWHERE or "recipes" in page.parts:
            continue
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(BLOCK, text, flags=re.DOTALL | re.MULTILINE):
            yield Block(page, text[: match.start()].count("\n") + 1, match[1], match[2] or "")


@pytest.mark.parametrize("block", list(blocks()), ids=str)
def test_every_block_runs_by_itself(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = compile("\n" * block.line + block.code, str(block.page), "exec")
    try:
        exec(code, {"__name__": "__main__"})
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] in EXTRAS:
            pytest.skip(f"needs {error.name}")
        raise
    printed = capsys.readouterr().out
    for part in block.printed.split("...\n"):
        assert part in printed, part


def test_pages_that_are_run_elsewhere_are() -> None:
    for page, test in ELSEWHERE.items():
        (found,) = (path for path in PAGES if path.name == page)
        assert python_blocks(found), page
        assert page in (ROOT / "tests" / test).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"\[[\w/.-]+\.md\]\(", text), "a link says what is there, not in which file"
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        other = (page.parent / target).resolve() if target else page
        assert other.exists(), target
        if anchor:
            there = other.read_text(encoding="utf-8")
            titles = re.findall(r"^#+ (.*)$", there, flags=re.MULTILINE)
            named = re.findall(r"^\(([\w-]+)\)=$", there, flags=re.MULTILINE)
            assert anchor in {*map(slug, titles), *named}, f"{target}#{anchor}"


def slug(title: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_of_the_library_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"\bhrem_layers(?:\.\w+)+", text)):
        resolve(name)
    for path in set(re.findall(r"`((?:hrem_layers|tests|benchmarks|examples|docs)/[\w./-]*)`", text)):
        assert (ROOT / path).exists(), path
    import hrem_layers

    for name, options in re.findall(r"\b([A-Z]\w+)\(([^()]*)\)", text):
        known = getattr(hrem_layers, name, None)
        if known is None:
            continue
        accepted = inspect.signature(known).parameters
        for option in re.findall(r"(\w+)=", options):
            assert option in accepted, f"{name}({option}=...)"


def test_each_file_of_the_script_is_on_its_page() -> None:
    page = (ROOT / "docs" / "script.md").read_text(encoding="utf-8")
    files = {path.name for path in (ROOT / "examples").glob("*.py")} - {"minimal.py"}  # which has a page of its own
    assert not [name for name in sorted(files) if f"`{name}`" not in page]


def resolve(name: str) -> object:
    """``hrem_layers.a.B.c``, a module or what one holds; raises if there is none."""
    if name.endswith(".py"):
        assert (ROOT / name).exists(), name
        return None
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)
