"""Search your own pictures in words or by picture, with the encoders that the script has trained.

python examples/search/search.py INDEX --of ~/Pictures --encoders runs/pictures/best.pt    # encode, once
python examples/search/search.py INDEX "a red car" --sheet found.png                       # ask
python examples/search/search.py INDEX --picture car.jpg
python examples/search/search.py INDEX --serve                                          # a page in the browser
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path, help="folder of the index")
    parser.add_argument("words", nargs="*", help="what to look for")
    parser.add_argument("--of", type=Path, metavar="SOURCE",
                        help="make the index of a folder of pictures or .npy files, or of one .npy file")  # fmt: skip
    parser.add_argument("--encoders", type=Path, help="checkpoint to encode with: best.pt, or the authors' .pth")
    parser.add_argument("--bert", help="folder or hub name of the BERT, if it is elsewhere than in training")
    parser.add_argument("--picture", type=Path, help="look for pictures like this one")
    parser.add_argument("--top", type=int, default=12, help="how many [12]")
    parser.add_argument("--sheet", type=Path, help="also write thumbnails to this PNG")
    parser.add_argument("--serve", action="store_true", help="open a page in the browser, for this machine only")
    parser.add_argument("--port", type=int, help="of --serve [the first free one from 7860 on]")
    parser.add_argument("--no-browser", action="store_true", help="--serve: do not open one")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_intermixed_args(argv)  # words may stand on both sides of options
    if (options.of is None) != (options.encoders is None):
        parser.error("--of and --encoders: both make an index, neither asks one")
    asks = [bool(options.words), options.picture is not None, options.serve]
    if sum(asks) > 1 or not (options.of or any(asks)):
        parser.error("expected --of SOURCE, words, --picture or --serve; of the last three one")
    if options.top < 1:
        parser.error(f"--top: expected a whole number from 1, got {options.top}")
    try:
        run(options)
    except ImportError as error:
        sys.exit(f'error: {error.name} is missing: pip install "hrem-layers[examples,search]"')
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def run(options: argparse.Namespace) -> None:
    from searcher import Searcher, make_index

    if options.of is not None:
        for line in make_index(options.index, options.of.expanduser(), options.encoders, options.bert):
            print(f"left out: {line}", file=sys.stderr)
    searcher = Searcher(options.index, options.bert)
    if options.of is not None:
        print(f"{len(searcher.items)} images in {options.index}")
    if options.serve:
        from page import serve

        serve(searcher, options.port, browser=not options.no_browser)
    elif options.words or options.picture:
        found = searcher.picture(options.picture, options.top) if options.picture else searcher.words(
            " ".join(options.words), options.top
        )  # fmt: skip
        print(found)
        if options.sheet:
            found.sheet().save(options.sheet, "PNG")
            print(f"written to {options.sheet}")


if __name__ == "__main__":
    main()
