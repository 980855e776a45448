"""Runs the benchmarks and writes docs/performance.md.

python benchmarks/run_all.py                                       # all: about an hour on two idle cores
python benchmarks/run_all.py --quick                               # few rounds, small sizes: a quarter of an hour
python benchmarks/run_all.py alignment_ratio.py loss_ratio.py      # these; the page names what was left out
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
# script: its options in the full run, and with --quick
SCRIPTS: dict[str, tuple[str, str]] = {
    "alignment_ratio.py": ("", "--repeats 5"),
    "alignment_grid.py": ("", "--sizes 64 128 256 --repeats 3"),
    "loss_ratio.py": ("", "--repeats 5"),
    "warmup_and_captions.py": ("", "--repeats 3"),
    "peers.py": ("", "--quick"),
    "retrieval_speed.py": ("--large", "--images 200 --repeats 3"),
    "memory.py": ("", ""),
    "cost_curves.py": ("", ""),
    "autocast.py": ("", "--repeats 3"),
    "dtype_error.py": ("", "--seeds 1"),
    "compile.py": ("", ""),
    "alignment_gpu.py": ("", ""),
    "kernel_figures.py": ("", ""),
}
HEAD = """# Performance

Written by `python benchmarks/run_all.py`; what is below the line comes from the scripts named there, each of which can
be run alone. Times are compared in turn within one run, so that what disturbs one disturbs all; read the ratios, not
the seconds. The yardstick is the *bare matmul*: real words by real regions and nothing else, which nothing that looks
at every pair of fragments can beat.

## How it is done

- **CPU.** Padding is left out before the product: texts are sorted by length, and texts of one length form a block.
  The product is made in tiles of 8 MB whose rows begin at a cache line (where they do not, the product itself loses up
  to 40% of its speed), and what follows it runs on blocks that stay in a core's cache. The largest values come from
  NumPy's vectorised sort up to four threads, from `torch.topk` with more.
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
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help=f"some of {', '.join(SCRIPTS)}; none = all")
    parser.add_argument("--quick", action="store_true", help="few rounds, small sizes")
    arguments = parser.parse_args()
    chosen = arguments.scripts or list(SCRIPTS)
    unknown = set(chosen) - set(SCRIPTS)
    if unknown:
        parser.error(f"expected names among {', '.join(SCRIPTS)}, got {', '.join(sorted(unknown))}")
    parts, failed = [HEAD], []
    missing = [script for script in SCRIPTS if script not in chosen]
    if missing:
        parts.append(f"Not run for this page, so not measured: {', '.join(f'`{script}`' for script in missing)}.\n")
    for script in chosen:
        start = time.perf_counter()
        path = HERE / script
        path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        command = [sys.executable, str(path), *SCRIPTS[script][arguments.quick].split()]
        done = subprocess.run(command, capture_output=True, text=True)
        print(f"{script}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if done.returncode:
            failed.append(script)
            print(done.stderr[-2000:], file=sys.stderr, flush=True)
            continue
        parts.append(done.stdout.strip() + "\n")
    if failed:
        parts.append(f"Failed, so not measured: {', '.join(f'`{script}`' for script in failed)}.\n")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
