"""The options of the Trainer and the accelerate recipe, and the two groups of parameters that both train."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from clip_relations import RelationalPair


def parse(description: str | None, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="openai/clip-vit-base-patch32", help="hub name or folder")
    parser.add_argument("--train", type=Path, required=True, help="pictures and metadata.jsonl")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/clip"))
    parser.add_argument("--batch-size", type=int, default=64, help="per process, a multiple of 4")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--relation-lr", type=float, default=1e-4, help="the relation modules start from nothing")
    parser.add_argument("--warmup-steps", type=int, default=100, help="steps on the pair loss alone")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per optimizer step; a graph sees one batch")
    options = parser.parse_args(argv)
    if options.batch_size < 4 or options.batch_size % 4:
        parser.error(f"--batch-size must be a multiple of 4, the pictures of a neighbourhood, got {options.batch_size}")
    return options


def parameter_groups(pair: RelationalPair, lr: float, relation_lr: float) -> list[dict[str, Any]]:
    """The model's parameters, and those of the relation modules with a learning rate of their own."""
    relations = list(pair.loss.relation_parameters())
    known = {id(p) for p in relations}
    return [
        {"params": [p for p in pair.parameters() if id(p) not in known], "lr": lr},
        {"params": relations, "lr": relation_lr},
    ]
