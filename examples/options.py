"""The options of the example script, with the release's settings as defaults where data is given."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import processes

# What an option is if it is not given: with --data-dir what the authors' release uses on Flickr30K; without,
# what suits a thousand emoji on two CPU cores.
RELEASE = {
    "epochs": 30, "batch_size": 128, "embed_dim": 1024, "num_heads": 16, "lr": 5e-4, "lr_steps": [15, 25],
    "warmup_steps": 8000, "vocabulary_min_count": 4, "checkpoint_every": 500, "text_encoder": "bert",
    "open_vocabulary": False, "word_lr_factor": 1.0, "pair_loss": "triplet",
}  # fmt: skip
DEMO = {
    "epochs": 6, "batch_size": 128, "embed_dim": 256, "num_heads": 8, "lr": 1e-3, "lr_steps": [4],
    "warmup_steps": 100, "vocabulary_min_count": 1, "checkpoint_every": 50, "text_encoder": "bigru",
    "open_vocabulary": True, "word_lr_factor": 0.2, "pair_loss": "infonce",
}  # fmt: skip
# Options in which a resumed run may differ from the run that it resumes without changing its numbers
MAY_DIFFER = {
    "resume",
    "output_dir",
    "data_dir",
    "cache_dir",
    "device",
    "num_workers",
    "checkpoint_every",
    "log_every",
    "step_timeout",
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train an image-text retrieval model with relation modelling, and print its R@K table.",
        epilog="Defaults in brackets: with --data-dir / without it.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
    )

    def add(name: str, text: str, **options: Any) -> None:
        key = name[2:].replace("-", "_")
        default = f" [{RELEASE[key]} / {DEMO[key]}]" if key in RELEASE else ""
        if not default and options.get("default") is not None:
            default = f" [{options['default']}]"
        parser.add_argument(name, help=text + default.replace("%", "%%"), **options)

    add("--data-dir", "folder with {train,dev,test}_ims.npy and _caps.txt; without it: emoji", type=Path)
    add("--cache-dir", "where the emoji features are kept", type=Path, default=Path("~/.cache/hrem-layers"))
    add("--output-dir", "where everything is written [a new folder in runs/]", type=Path)
    add("--test-split", "split of the final evaluation (COCO 5K: testall)", default="test")
    add("--captions-per-image", "captions an image in the files", type=int, default=5)
    add(
        "--five-fold",
        "also the mean over five folds of the test split (COCO's 1K protocol)",
        action="store_true",
    )

    add(
        "--text-encoder",
        "recurrent on a vocabulary of the training captions, or BERT",
        choices=["bigru", "bert"],
    )
    add("--bert", "BERT: local folder or hub name", default="bert-base-uncased")
    add("--word-vectors", "bigru: pretrained vectors, GloVe text or .npz", type=Path)
    add("--open-vocabulary", "bigru: know all words of --word-vectors, also those that training never saw",
        action=argparse.BooleanOptionalAction)  # fmt: skip
    add("--word-lr-factor", "bigru: learning rate of the word vectors, times this", type=float)
    add("--vocabulary-min-count", "bigru: occurrences that make a word known", type=int)
    add("--embed-dim", "size of the joint space", type=int)
    add("--num-heads", "attention heads of all transformer layers", type=int)
    add("--dropout", "dropout of all transformer layers", type=float, default=0.1)

    add("--mechanism", "relation interaction; none trains the encoders alone", default="fusion",
        choices=["fusion", "standalone", "none"])  # fmt: skip
    add("--pair-loss", "loss on the pairs of the batch", choices=["triplet", "infonce"])
    add("--negatives", "triplet: how negatives are chosen", default="distance_weighted",
        choices=["distance_weighted", "hardest", "all", "expected"])  # fmt: skip
    add(
        "--nonzero-cutoff",
        "triplet: distance from which negatives have no weight (COCO: 1.9)",
        type=float,
        default=1.7,
    )
    add("--candidates", "look for relations only among the K most similar images and texts each [all of the batch]",
        type=int, metavar="K")  # fmt: skip
    add("--warmup-steps", "steps for which only the plain pair loss counts", type=int)

    add("--epochs", "passes over the training captions", type=int)
    add("--batch-size", "pairs a step, over all processes", type=int)
    add("--sampler", "how batches are drawn", default="random", choices=["random", "neighbor"])
    add("--images-per-cluster", "neighbor: images of one neighbourhood in a batch", type=int, default=8)
    add("--region-drop", "share of the regions left out in training", type=float, default=0.2)
    add("--word-drop", "share of the words masked, replaced or deleted in training", type=float, default=0.2)
    add("--lr", "learning rate (BERT itself: a tenth)", type=float)
    add("--lr-steps", "epochs at which it is divided by ten", type=int, nargs="*")
    add("--weight-decay", "of AdamW", type=float, default=1e-4)
    add("--grad-clip", "largest norm of the gradient", type=float, default=2.0)

    add(
        "--resume",
        "go on from CHECKPOINT, or from last.pt in --output-dir",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
    )
    add(
        "--eval-only",
        "evaluate a checkpoint on the test split, train nothing",
        type=Path,
        metavar="CHECKPOINT",
    )
    add("--seed", "of everything random", type=int, default=0)
    add("--device", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one", default="auto")
    add("--amp", "mixed precision", default="none", choices=["none", "bf16", "fp16"])
    add("--num-workers", "processes that read the data", type=int, default=0)
    add("--step-timeout", "several processes: seconds one may keep the others waiting in a training step (gloo)",
        type=float, default=20.0)  # fmt: skip
    add("--checkpoint-every", "steps between checkpoints (there is one after each epoch as well)", type=int)
    add("--log-every", "steps between TensorBoard points", type=int, default=10)

    arguments = parser.parse_args(argv)
    for key, value in (RELEASE if arguments.data_dir else DEMO).items():
        if getattr(arguments, key) is None:
            setattr(arguments, key, value)
    if arguments.batch_size % processes.planned():
        parser.error(f"--batch-size {arguments.batch_size} must be a multiple of the {processes.planned()} processes")
    if not 0 < arguments.step_timeout <= 86400:
        parser.error(f"--step-timeout must be in seconds, above 0, at most a day, got {arguments.step_timeout:g}")
    if arguments.resume == "" and arguments.output_dir is None:
        parser.error("--resume needs a CHECKPOINT, or the --output-dir whose last.pt it goes on from")
    return arguments
