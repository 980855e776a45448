"""What the README says can be run, runs."""

from __future__ import annotations

import re
from pathlib import Path

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
    block = re.search(r"```\w*\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S).group(1)
    commands = block.strip().splitlines()
    assert len(commands) == 2
    assert all("pip install -c constraints.txt" in command for command in commands)


def test_links_lead_somewhere() -> None:
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (README.parent / target).exists(), target
    for file in re.findall(r"^\| .*?\| `([\w/.]+)` \|", text, flags=re.M):
        assert (README.parent / "hrem_layers" / file).exists(), file
