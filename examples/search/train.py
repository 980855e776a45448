"""Trains encoders to search pictures with: the script, with the settings of its default data, on single emoji.

    python examples/search/train.py --output-dir runs/pictures      # takes the options of flickr30k.py

The default data will not do for that: their images are lists of things, each described by itself, and what is in a
picture file nobody has listed. Here an image is a picture, described by the grid features of an ImageNet network, as
search.py describes yours.
"""

from __future__ import annotations

import beside  # isort: skip  # noqa: F401

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flickr30k
from options import DEMO, flag, make_parser


def settings(chosen: dict[str, Any]) -> list[str]:
    """Options of the script as they would stand on its command line."""
    line: list[str] = []
    for key, value in chosen.items():
        if isinstance(value, bool):
            line.append(flag(key) if value else flag(f"no_{key}"))
        else:
            line += [flag(key), *map(str, value if isinstance(value, list) else [value])]
    return line


def main(argv: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if argv is None else argv)
    cache = make_parser().parse_known_args(given)[0].cache_dir
    try:
        from emoji_pairs import prepare_emoji_pairs

        data = prepare_emoji_pairs(Path(cache).expanduser())
    except ImportError as error:
        sys.exit(f"error: {error}")
    own = ["--data-dir", str(data), "--word-vectors", str(data / "word_vectors.npz")]
    flickr30k.main([*settings(DEMO), *own, *given])


if __name__ == "__main__":
    from errors import let_idle_workers_die

    let_idle_workers_die()
    main()
