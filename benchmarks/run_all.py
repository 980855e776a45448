"""Runs the benchmarks: writes docs/performance.md, or prints the tables of another page of the documentation.

python benchmarks/run_all.py                                       # performance.md: under an hour on two idle cores
python benchmarks/run_all.py --quick                               # few rounds, small sizes: a quarter of an hour
python benchmarks/run_all.py alignment_ratio.py loss_ratio.py      # these; the page names what was left out
python benchmarks/run_all.py --page scaling                        # prints what the tables of docs/scaling.md come from
python benchmarks/run_all.py --list                                # every page with its commands

docs/results.md is written by ``python -m benchmarks.evidence.tables``, and not from here. What the scripts of
docs/reliability.md have recorded, and with it the page, the full run writes anew.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
OLD = "7ea6736"  # the revision of version 0.1 that this one is compared with


class Run(NamedTuple):
    """A script in this folder, its options in the full run and with --quick (None: not then)."""

    script: str
    full: str = ""
    quick: str | None = ""


# page of docs: what its measured figures come from
PAGES: dict[str, list[Run]] = {
    "performance": [
        Run("revisions.py", OLD, f"{OLD} --repeats 2 --n 32"),
        Run("revisions.py", f"{OLD} --dim 256", f"{OLD} --dim 256 --repeats 2 --n 32"),
        Run("warmup_and_captions.py", "--repeats 7", "--repeats 3"),
        Run("alignment_ratio.py", "", "--repeats 5"),
        Run("alignment_grid.py", "", "--sizes 64 128 --repeats 3"),
        Run("loss_ratio.py", "", "--repeats 5"),
        Run("peers.py", "", "--quick"),
        Run("retrieval_speed.py", "--large", "--images 200 --repeats 3"),
        Run("memory.py", "", "--quick"),
        Run("cost_curves.py", "", "--largest 128"),
        Run("autocast.py", "", "--repeats 3"),
        Run("dtype_error.py", "", "--seeds 1"),
        Run("compile.py"),
        Run("alignment_gpu.py"),
        Run("kernel_figures.py"),
    ],
    "distributed": [
        Run("distributed_counts.py", "", "--items 64 --candidates 8 --processes 1 2"),
        Run("distributed_counts.py", "--memory --items 2048 --dim 256", "--memory --items 128 --candidates 8"),
    ],
    "scaling": [
        Run("scaling_counts.py", "", "--sizes 64 --loss-sizes 64"),
        Run("sparse_scaling.py", "", "--sizes 256 512"),
        Run("candidates_effect.py", "", None),  # half an hour of trainings
    ],
    "large_batches": [Run("large_batches.py", "", "--largest 2048"), Run("pair_losses.py", "", "--repeats 3")],
    "sampler": [
        Run("sampler_scale.py", "clusters", "clusters --scale 0.1"),
        Run("clustering.py", "--repeats 2", None),
        Run("sampler_scale.py", "order", "order --scale 0.1"),
    ],
    "reliability": [  # these record what they find, and the last writes the page
        Run("reliability/bad_input.py", "", None),
        Run("reliability/drift.py", "--steps 10000 --seed 0", None),
        Run("reliability/loss_dtypes.py", "--seeds 5", None),
        Run("reliability/kills.py", "--kills 32", None),
        Run("reliability/mutants.py", "", None),
        Run("reliability/report.py", "", "--check"),
    ],
}
HEAD = """# Performance

Written by `python benchmarks/run_all.py`; what is below the line comes from the scripts named there, each of which can
be run alone. Times are compared in turn within one run, so that what disturbs one disturbs all; read the ratios, not
the seconds. The yardstick is the *bare matmul*: real words by real regions and nothing else, which nothing that looks
at every pair of fragments can beat.

## How it is done

- **CPU.** Padding is left out before the product: texts are sorted by length, and texts of one length form a block.
  The product is made in tiles of 8 MB whose rows begin at a cache line (where they do not, the product itself loses up
  to 40% of its speed). In a tile stand 32 images or a multiple of it, region by region, so that the maxima over regions
  and those over words both run along the memory (images with a mask: image by image). What follows the product runs on
  blocks that stay in a core's cache. The largest values come from NumPy's vectorised sort up to four threads, from
  `torch.topk` with more.
- **Backward** on a CPU keeps up to 16.8 million similarities (64 MB in float32) and multiplies the others again. Their
  derivative is written tile by tile and turned into gradients by two products; memory does not grow with R·W.
- **CUDA.** cuBLAS multiplies the words of some texts by the regions of some images, in chunks of 8.4 million
  similarities (32 MB of float32) that are in the L2 cache still when a Triton kernel reads them, once, and turns them
  into p and q in registers: compute capability 8.0 or more, R up to 256, W up to 128, R·W (in powers of 2) up to
  16,384, float32, float16, bfloat16 (Triton comes with PyTorch's CUDA builds). Words are padded to the longest text
  of the batch, as packing them would make the host wait; which texts a program works on is decided on the device.
  Backward multiplies again, writes the derivative of the similarities and multiplies with cuBLAS. No atomics: the
  same input gives the same bits as far as cuBLAS does. Half types are multiplied as they are and added in float32
  (`torch.mm(out_dtype=...)`, PyTorch 2.8; widened before). Under `torch.set_float32_matmul_precision("highest")`, the
  default, float32 is multiplied as such.
- **Elsewhere** (other devices, wider batches, float64 on CUDA) the tiles are padded and masked; this does not wait for
  the device either.

---
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help="some of the page's scripts; none = all")
    parser.add_argument("--page", choices=PAGES, default="performance", help="the page whose figures are measured")
    parser.add_argument("--quick", action="store_true", help="few rounds, small sizes")
    parser.add_argument("--list", action="store_true", help="print every page with its commands, and run nothing")
    arguments = parser.parse_args()
    if arguments.list:
        for page, runs in PAGES.items():
            commands = (f"    python benchmarks/{run.script} {run.full}".rstrip() for run in runs)
            print(f"docs/{page}.md", *commands, sep="\n")
        return
    runs = PAGES[arguments.page]
    known = dict.fromkeys(run.script for run in runs)
    unknown = set(arguments.scripts) - set(known)
    if unknown:
        parser.error(f"expected names among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    chosen = [run for run in runs if run.script in (arguments.scripts or known)]
    if not revision_is_here(OLD):  # no git, or a copy without its history
        chosen = [run for run in chosen if run.script != "revisions.py"]
    if arguments.page != "performance":  # prose with tables in it, which a run cannot write
        sys.exit(1 if run_each(chosen, arguments.quick, lambda text: print(text, flush=True)) else 0)
    parts = [HEAD]
    missing = [script for script in known if script not in {run.script for run in chosen}]
    if missing:
        parts.append(f"Not run for this page, so not measured: {', '.join(f'`{script}`' for script in missing)}.\n")
    failed = run_each(chosen, arguments.quick, parts.append)
    if failed:
        parts.append(f"Failed, so not measured: {', '.join(f'`{script}`' for script in failed)}.\n")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def run_each(runs: list[Run], quick: bool, take: Callable[[str], object]) -> list[str]:
    """Hands to ``take`` what each prints; returns the scripts that failed."""
    failed = []
    for run in runs:
        options = run.quick if quick else run.full
        if options is None:
            print(f"{run.script}: not with --quick", file=sys.stderr)
            continue
        start = time.perf_counter()
        path = HERE / run.script
        path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        done = subprocess.run([sys.executable, str(path), *options.split()], capture_output=True, text=True)
        seconds = time.perf_counter() - start
        print(f"{f'{run.script} {options}'.rstrip()}: {seconds:.0f} s", file=sys.stderr, flush=True)
        if done.returncode:
            failed.append(run.script)
            print(done.stderr[-2000:], file=sys.stderr, flush=True)
            continue
        take(done.stdout.strip() + "\n")
    return failed


def revision_is_here(revision: str) -> bool:
    command = ["git", "-C", str(HERE), "cat-file", "-e", f"{revision}^{{commit}}"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    main()
