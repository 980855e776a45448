"""Makes docs/tutorial.ipynb of docs/tutorial.md and, with ``--pictures``, that page's pictures by running it."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PICTURES = ("terms", "graph", "neighbors", "alignment")
# The notebook draws and prints these itself
SKIPPED = re.compile(r"^!\[.*?\]\(.*?\)\n?|^```text\n.*?^```\n?", flags=re.MULTILINE | re.DOTALL)


def cells(page: str) -> list[tuple[str, str]]:
    """("markdown" or "code", text), in the order of the page."""
    found, start = [], 0
    for match in re.finditer(r"^```python\n(.*?)^```\n?", page, flags=re.DOTALL | re.MULTILINE):
        found += [("markdown", page[start : match.start()]), ("code", match[1])]
        start = match.end()
    found.append(("markdown", page[start:]))
    return [(kind, _markdown(text) if kind == "markdown" else text.strip()) for kind, text in found if text.strip()]


def _markdown(text: str) -> str:
    text = SKIPPED.sub("", text)
    text = re.sub(r"\{download\}`([^`]*)`", r"`\1`", text)
    return re.sub(r"\]\((\w+)\.md\)", r"](\1.md)", text).strip()


def notebook(page: str) -> str:
    content: list[dict[str, Any]] = []
    for number, (kind, text) in enumerate(part for part in cells(page) if part[1]):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number:02}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        content.append(cell | {"source": text.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return json.dumps({"cells": content, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def run_cell(code: str, namespace: dict[str, Any]) -> Any:
    """As a notebook does: the value of the last expression, None if there is none."""
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "tutorial", "exec"), namespace)
    return None if last is None else eval(compile(ast.Expression(last.value), "tutorial", "eval"), namespace)


def main() -> None:
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    (DOCS / "tutorial.ipynb").write_text(notebook(page), encoding="utf-8")
    if "--pictures" in sys.argv:
        os.chdir(DOCS)
        namespace: dict[str, Any] = {"__name__": "__main__"}
        values = [run_cell(text, namespace) for kind, text in cells(page) if kind == "code"]
        figures = [value for value in values if hasattr(value, "savefig")]
        for name, figure in zip(PICTURES, figures, strict=True):
            figure.savefig(f"images/tutorial_{name}.png", dpi=100)


if __name__ == "__main__":
    main()
