"""What relations and ``candidates=k`` do to the result: the example on its default data, without, dense, with fewer.

    python benchmarks/candidates_effect.py                  # 5 variants, 3 seeds: prints the tables of docs/scaling.md

Each run is a process of its own, one after the other, and is the command of the example with ``--candidates`` and
``--seed``. What has finished is kept in --output-dir and not run again, so that a run that was interrupted can go on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from _common import section, table

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=["none", "dense", "64", "16", "4"], metavar="K",
                        help="numbers of candidates; dense; none (no relations) [none dense 64 16 4]")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--threads", type=int, default=2, help="of each run [2]")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/candidates-effect"), help="[%(default)s]")
    parser.add_argument("--script-options", type=shlex.split, default=[], metavar='"..."',
                        help="more options of the example, in one string: --script-options='--epochs 1'")  # fmt: skip
    parser.add_argument(
        "--cache-dir", type=Path, default=Path("~/.cache/hrem-layers"), help="of the data [%(default)s]"
    )
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one run [3600]")
    options = parser.parse_args(argv)
    for variant in options.variants:
        if variant not in ("dense", "none") and not (variant.isdecimal() and int(variant)):
            parser.error(f"--variants must be positive numbers, dense or none, got {variant}")
    return options


LABELS = {"dense": "none (dense)", "none": "no relation modelling"}


def choice(variant: str) -> list[str]:
    return {"dense": [], "none": ["--mechanism", "none"]}.get(variant, ["--candidates", variant])


def run(options: argparse.Namespace, variant: str, seed: int) -> dict:
    """Test metrics and arguments of one training; from the file that an equal one has left, if there is."""
    folder = options.output_dir / f"{variant}-seed{seed}"
    command = [str(EXAMPLES / "flickr30k.py"), "--output-dir", str(folder), "--device", "cpu", "--seed", str(seed)]
    command += ["--cache-dir", str(options.cache_dir.expanduser()), *choice(variant), *options.script_options]
    made_by = {"command": command[1:], "threads": options.threads, "python": platform.python_version(),
               "torch": torch.__version__}  # fmt: skip
    kept = folder / "candidates_effect.json"
    if kept.is_file():
        result = json.loads(kept.read_text(encoding="utf-8"))
        if result["made_by"] != made_by:
            raise FileExistsError(f"{folder} holds a run with other options or versions: give another --output-dir")
        if "test" in result:
            return result
        shutil.rmtree(folder)  # it was interrupted
    folder.mkdir(parents=True)
    kept.write_text(json.dumps({"made_by": made_by}) + "\n", encoding="utf-8")
    print(f"{variant}, seed {seed} ...", file=sys.stderr, flush=True)
    python(command, options)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    result = {"made_by": made_by, "test": metrics["test"], "chance": metrics["chance"],
              "arguments": metrics["arguments"], "images": metrics["images"]}  # fmt: skip
    kept.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def python(command: list[str], options: argparse.Namespace) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=options.timeout
    )
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def spread(values: list[float]) -> str:
    """Mean; of several also the range."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)  # for the line that says where it ran
    results = {v: [run(options, v, seed) for seed in options.seeds] for v in options.variants}

    used = results[options.variants[0]][0]["arguments"]
    for variant in options.variants:
        if variant.isdecimal() and int(variant) >= used["batch_size"]:
            print(f"--variants {variant}: the batch has {used['batch_size']} items, so this is dense", file=sys.stderr)
    columns = {"i2t_r1": "R@1 image to text", "t2i_r1": "R@1 text to image", "rsum": "rSum"}
    means = [
        [LABELS.get(v, v), *(spread([r["test"][key] for r in runs]) for key in columns)] for v, runs in results.items()
    ]
    each = [
        [LABELS.get(v, v), seed, *(f"{r['test'][key]:.1f}" for key in columns)]
        for v, runs in results.items()
        for seed, r in zip(options.seeds, runs, strict=True)
    ]
    first = results[options.variants[0]][0]
    seeds = f"Seed {options.seeds[0]}"
    if len(options.seeds) > 1:
        seeds = f"Mean over the seeds {', '.join(map(str, options.seeds))} (smallest to largest)"
    section(
        "Measured: what candidates do to the result",
        f"{used['epochs']} epochs with N = {used['batch_size']}, {used['pair_loss']}, {used['warmup_steps']} steps of "
        f"warm-up; test split of {first['images']} images, on which chance is R@1 {first['chance']['i2t_r1']:.1f} and "
        f"{first['chance']['t2i_r1']:.1f}. {seeds}.",
        table(["candidates", *columns.values()], means),
        table(["candidates", "seed", *columns.values()], each),
    )


if __name__ == "__main__":
    main()
