"""What a diagnosis consists of."""

from __future__ import annotations

import textwrap
from typing import NamedTuple


class Finding(NamedTuple):
    """One thing that goes wrong.

    Example:
        >>> from hrem_layers.tools import Finding
        >>> print(Finding("flat relevance", "S varies by 0.001.", "Use a smaller sigma."))
        flat relevance
          Seen: S varies by 0.001.
          Do:   Use a smaller sigma.
    """

    name: str
    """What it is called; the same words for the same trouble, to test for."""
    seen: str
    """What was observed, with numbers."""
    remedy: str
    """What to do."""

    def __str__(self) -> str:
        parts = [("  Seen: ", self.seen), ("  Do:   ", self.remedy)]
        lines = [
            textwrap.fill(text, 100, initial_indent=first, subsequent_indent=" " * len(first)) for first, text in parts
        ]
        return "\n".join([self.name, *lines])


class Diagnosis(list[Finding]):
    """A list of findings, the most basic first; empty if nothing was found. ``print`` shows it as text.

    Example:
        >>> from hrem_layers.tools import Diagnosis
        >>> print(Diagnosis())
        Nothing found.
    """

    @property
    def names(self) -> list[str]:
        """The names of the findings."""
        return [finding.name for finding in self]

    def __str__(self) -> str:
        return "\n".join(map(str, self)) if self else "Nothing found."
