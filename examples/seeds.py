"""What the example script reaches over several seeds, with relations and without: mean and range.

    python examples/seeds.py                                  # the README's figures
    python examples/seeds.py --seeds 0 1 2 3 4 --data-dir data/f30k_precomp

All other options are the script's. A run whose metrics.json is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

SCRIPT = Path(__file__).with_name("flickr30k.py")
SHOWN = ("i2t_r1", "t2i_r1", "rsum")


def run(folder: Path, options: Sequence[str]) -> dict[str, float]:
    """The test figures of one run of the script.

    Raises:
        SystemExit: the script failed; it has said why.
    """
    if not (folder / "metrics.json").is_file():
        done = subprocess.run([sys.executable, str(SCRIPT), "--output-dir", str(folder), *options], check=False)
        if done.returncode:
            raise SystemExit(done.returncode)
    try:
        test: dict[str, float] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["test"]
        return {name: float(test[name]) for name in SHOWN}
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"error: {folder / 'metrics.json'}: expected the figures of a run, found others ({error!r})"
        ) from error


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """A line per mechanism: mean (smallest to largest) of each figure over its runs."""
    lines = ["| `--mechanism` | image to text R@1 | text to image R@1 | rSum | seeds |", "|---|---|---|---|---|"]
    for mechanism, runs in results.items():
        figures = [[one[name] for one in runs] for name in SHOWN]
        said = [f"{mean(x):.1f} ({min(x):.1f} to {max(x):.1f})" for x in figures]
        lines.append(f"| `{mechanism}` | {' | '.join(said)} | {len(runs)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Mean and range of the script's figures over seeds.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--mechanisms", nargs="+", default=["fusion", "none"], help="[fusion none]")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/seeds"), help="[%(default)s]")
    arguments, options = parser.parse_known_args(argv)
    results = {
        mechanism: [
            run(
                arguments.output_dir / f"{mechanism}-{seed}",
                ["--seed", str(seed), "--mechanism", mechanism, *options],
            )
            for seed in arguments.seeds
        ]
        for mechanism in arguments.mechanisms
    }
    print(table(results))


if __name__ == "__main__":
    main()
