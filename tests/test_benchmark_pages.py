"""benchmarks/run_all.py: every script's figures have a place in a page, and are written there and nowhere else."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
_spec = importlib.util.spec_from_file_location("run_all", BENCHMARKS / "run_all.py")
run_all = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run_all)


def test_every_script_makes_figures_of_a_page() -> None:
    separate = " ".join(command for _, command, _ in run_all.SEPARATE)
    for script in BENCHMARKS.glob("[a-z]*.py"):
        known = script.name in {x.script for x in run_all.FIGURES} | {*run_all.PARTS, "run_all.py"}
        assert known or script.name in separate, script.name


def test_every_place_for_figures_has_its_command() -> None:
    places = {
        (page.name, command)
        for page in (ROOT / "docs").glob("*.md")
        for command in re.findall(r"<!-- figures: (.*?)(?:, code \w+)? -->", page.read_text("utf-8"))
    }
    assert places == {(x.page, x.command) for x in run_all.FIGURES}
    for figures in run_all.FIGURES:
        assert run_all.written(figures, ROOT / "docs")[2].strip(), figures.command


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_rows_of_tables_are_as_wide_as_their_heads(page: Path) -> None:
    head = None
    for line in page.read_text("utf-8").splitlines():
        if not line.startswith("|"):
            head = None
            continue
        width = len(re.split(r"(?<!\\)\|", line.replace("\\|", ""))) - 2
        head = head or width
        assert width == head, line


def test_commands_are_listed_with_their_pages() -> None:
    listing = run_all.listing()
    assert all(x.command in listing and f"docs/{x.page}" in listing for x in run_all.FIGURES)
    assert sum(x.minutes for x in run_all.FIGURES) < 60


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of the pages, and a library and scripts of nothing."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*data*", "images", "recipes"))
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "hrem_layers").mkdir()
    for figures in run_all.FIGURES:
        (tmp_path / "benchmarks" / figures.script).write_text("import sys\nprint('figures of', *sys.argv[1:])\n")
    monkeypatch.setattr(run_all, "ROOT", tmp_path)
    monkeypatch.setattr(run_all, "HERE", tmp_path / "benchmarks")
    return tmp_path / "docs"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run_all.py", *arguments])
    with pytest.raises(SystemExit) as end:
        run_all.main()
    return end.value.code


def test_figures_are_written_once_for_the_same_code(
    docs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = (docs / "sampler.md").read_text("utf-8")
    assert run(monkeypatch, "sampler.md") == 0
    page = (docs / "sampler.md").read_text("utf-8")
    assert "-->\n\nfigures of clusters\n\n<!-- end -->" in page and "figures of order\n" in page
    assert page.partition("<!-- figures")[0] == before.partition("<!-- figures")[0], "prose stays"
    capsys.readouterr()
    (docs.parent / "benchmarks" / "sampler_scale.py").write_text("import _common\nprint('other')")
    (docs.parent / "benchmarks" / "_common.py").write_text("")
    assert run(monkeypatch, "sampler_scale.py") == 0
    assert "already" not in capsys.readouterr().err and "\nother\n" in (docs / "sampler.md").read_text("utf-8")
    assert run(monkeypatch, "sampler_scale.py") == 0
    assert capsys.readouterr().err.count("already") == 2
    for changed in ("benchmarks/_common.py", "hrem_layers/graph.py"):  # what it imports, and what it measures
        (docs.parent / changed).write_text("x = 1")
        assert run(monkeypatch, "sampler_scale.py") == 0
        assert "already" not in capsys.readouterr().err, changed
    assert run(monkeypatch, "sampler_scale.py", "--again") == 0
    assert "already" not in capsys.readouterr().err


def test_a_script_that_fails_leaves_the_page_alone(docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (docs / "sampler.md").read_text("utf-8")
    (docs.parent / "benchmarks" / "sampler_scale.py").write_text("print('half')\nraise RuntimeError")
    assert run(monkeypatch, "sampler.md") == 1
    assert (docs / "sampler.md").read_text("utf-8") == before


def test_what_is_not_there_to_be_measured_leaves_its_page_alone(
    docs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = (docs / "performance.md").read_text("utf-8")
    assert run(monkeypatch, "authors_step.py") == 0
    assert "needs runs/HREM: git clone https://" in capsys.readouterr().err
    assert (docs / "performance.md").read_text("utf-8") == before
    (docs.parent / "runs" / "HREM").mkdir(parents=True)
    assert run(monkeypatch, "authors_step.py") == 0
    assert "figures of\n" in (docs / "performance.md").read_text("utf-8")


def test_quick_figures_go_into_copies(docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (docs / "sampler.md").read_text("utf-8")
    assert run(monkeypatch, "--quick", "sampler.md") == 0
    assert (docs / "sampler.md").read_text("utf-8") == before
    copied = (docs.parent / "runs" / "quick-pages" / "sampler.md").read_text("utf-8")
    assert "figures of clusters --scale 0.01" in copied
