"""What the GPU kernels compile to, without a GPU: registers, spills, shared memory, instructions, per size.

python benchmarks/kernel_figures.py [--capability 90]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from _common import section, table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from test_alignment_kernel import compile_for, kernels

from hrem_layers.alignment.gpu import kernel, launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def figures(function: object, per_warp: int, capability: int, words: int, regions: int, mode: str) -> list[str]:
    """Registers of a thread, spilled bytes of a thread, shared bytes, instructions, warps."""
    blocks, warps = launch.blocks_for(words, regions, per_warp)
    compiled = compile_for(function, capability, blocks, warps, mode)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run("cuobjdump", "--dump-resource-usage", file.name)
        code = run("cuobjdump", "-sass", file.name)
    registers, stack = (int(x) for x in re.findall(r"REG:(\d+) STACK:(\d+)", usage)[-1])
    instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, flags=re.MULTILINE))
    pairs = blocks.images
    return [
        f"{words} × {regions}", str(pairs), str(warps), str(registers), str(stack), str(compiled.metadata.shared),
        f"{instructions}", f"{instructions * warps / pairs:.0f}",
    ]  # fmt: skip


def run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, choices=[80, 90])
    parser.add_argument("--mode", default="cosine", choices=["cosine", "scan"])
    options = parser.parse_args()
    header = ["words × regions", "pairs", "warps", "registers", "spills, B", "shared, B", "instructions", "per pair"]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        tables = [
            table(header, [
                figures(function, per_warp, options.capability, words, regions, options.mode)
                for regions in (36, 49, 100, 196) for words in (16, 32, 128)
                if words * launch._power_of_2(regions) <= launch.MAX_PAIR
            ])
            for function, per_warp in kernels(kernel)
        ]  # fmt: skip
    real = 16 * 36 * 128 * 128
    chunks = len(list(launch._chunks(128, 24, 128, 36)))
    section(
        "What the GPU kernels compile to",
        f'`alignment="{options.mode}"`, compute capability {options.capability / 10}, Triton {triton.__version__}, '
        f"PyTorch {torch.__version__}. **Not measured on hardware**: these are figures of the compiled code. *Pairs* "
        "of a program; registers and spilled bytes of a thread; *instructions* in the code, which has no loops, so "
        "that each warp runs each at most once; *per pair*: times warps, over pairs. 77 words take the row of 128, "
        "texts of 17 to 32 words that of 32.",
        "Forward:", tables[0], "Backward:", tables[1],
        f"The products are cuBLAS's. At the release's size (128 images of 36 regions, 128 captions of 8 to 24 words, "
        f"16 on average, padded to 24) {real / (24 * 36 * 128 * 128):.2f} of what is multiplied is needed, in {chunks} "
        "chunks of one product and two kernels each.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
