"""What the README says can be run, runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from readme_loop import python_blocks, run

README = Path(__file__).parents[1] / "README.md"


def test_the_loop_trains_somebodys_own_encoders() -> None:
    totals = run(README)
    assert len(totals) == 12
    assert totals[-1] < 0.9 * totals[0]


def test_the_loop_has_fifteen_lines() -> None:
    (block,) = python_blocks(README)
    assert len([line for line in block.splitlines() if line.strip()]) <= 15


def test_the_first_block_holds_two_commands_that_install_through_the_constraints() -> None:
    block = re.search(r"```\w*\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL).group(1)
    commands = block.strip().splitlines()
    assert len(commands) == 2
    assert all("pip install -c constraints.txt" in command for command in commands)


def test_the_table_of_parts_names_files_that_exist() -> None:
    text = README.read_text(encoding="utf-8")
    files = re.findall(r"^\| .*?\| `([\w/.]+)` \|", text, flags=re.MULTILINE)
    assert len(files) == 8
    for file in files:
        assert (README.parent / "hrem_layers" / file).exists(), file


def test_on_a_package_index_no_link_leads_into_the_repository() -> None:
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    project = tomllib.loads((README.parent / "pyproject.toml").read_text(encoding="utf-8"))
    text = README.read_text(encoding="utf-8")
    for rule in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert "bolt it on (`docs/bolt_on.md`)" in text
    assert not re.findall(r"\]\((?!https://)[^)]*\)", text)
