"""Runs the benchmarks and writes docs/performance.md.

python benchmarks/run_all.py                                       # all: a quarter of an hour on two cores
python benchmarks/run_all.py alignment_ratio.py loss_ratio.py      # these; the page names what was left out
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
SCRIPTS = ("alignment_ratio.py", "loss_ratio.py", "memory.py", "cost_curves.py", "compile.py", "alignment_gpu.py")
HEAD = """# Performance

Written by `python benchmarks/run_all.py`; what is below the line comes from the scripts named there, each of which can
be run alone. Times are compared in turn within one run, so that what disturbs one disturbs all; read the ratios, not
the seconds. The yardstick is the *bare matmul*: real words by real regions and nothing else, which nothing that looks
at every pair of fragments can beat.

## How it is done

- **CPU.** Padding is left out before the product: texts are sorted by length, and texts of one length form a block.
  The product is made in tiles of 8 MB, and what follows it runs on blocks that stay in a core's cache.
- **Backward** on a CPU keeps up to 16.8 million similarities (64 MB in float32) and multiplies the others again. Their
  derivative is written tile by tile and turned into gradients by two products; memory does not grow with R·W.
- **CUDA.** A Triton kernel takes a tile of pairs from fragments to p and q: compute capability 8.0 or more, R up to
  256, W up to 128, float32, float16, bfloat16 (Triton comes with PyTorch's CUDA builds). Which texts a program works on
  is decided on the device. Backward writes the derivative of the similarities, at most 67 million at a time, and
  multiplies with cuBLAS. No atomics: the same input gives the same bits as far as cuBLAS does. Under
  `torch.set_float32_matmul_precision("highest")`, the default, float32 is multiplied as such, otherwise as TF32.
- **Elsewhere** (other devices, wider batches, float64 on CUDA) the tiles are padded and masked; this does not wait for
  the device either.

---
"""


def main() -> None:
    chosen = tuple(sys.argv[1:]) or SCRIPTS
    unknown = set(chosen) - set(SCRIPTS)
    if unknown:
        sys.exit(f"expected names among {', '.join(SCRIPTS)}, got {', '.join(sorted(unknown))}")
    parts = [HEAD]
    missing = [script for script in SCRIPTS if script not in chosen]
    if missing:
        parts.append(f"Not run for this page, so not measured: {', '.join(f'`{script}`' for script in missing)}.\n")
    for script in chosen:
        print(f"{script} ...", file=sys.stderr, flush=True)
        path = (HERE / script).relative_to(Path.cwd()) if HERE.is_relative_to(Path.cwd()) else HERE / script
        done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{script} failed:\n{done.stderr}")
        parts.append(done.stdout.strip() + "\n")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)


if __name__ == "__main__":
    main()
