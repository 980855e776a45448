"""The options of the example script, with the release's settings as defaults where data is given."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import processes
from encoders import check_bert_folder
from ranges import SHARE, Integer, Number, Word, check_device, check_value, location

from hrem_layers.tools import release

# What an option is if it is not given: with --data-dir what the authors' release uses on Flickr30K; without,
# what suits scenes of emoji on two CPU cores.
TRAINING, PAIRS = release.SETTINGS["training"], release.SETTINGS["pair_loss"]
RELEASE = {
    **{key: TRAINING[key] for key in ("epochs", "batch_size", "embed_dim", "lr", "text_encoder")},
    "lr_steps": list(TRAINING["lr_steps"]), "num_heads": release.SETTINGS["fragments"]["num_heads"],
    "warmup_steps": release.SETTINGS["loss"]["warmup_steps"], "pair_loss": "triplet",
    "alignment": release.SETTINGS["graph"]["alignment"], "residual": release.SETTINGS["interaction"]["residual"],
    # of the script, not of the release
    "vocabulary_min_count": 4, "checkpoint_every": 500, "open_vocabulary": False, "word_lr_factor": 1.0,
}  # fmt: skip
DEMO = {
    "epochs": 6, "batch_size": 128, "embed_dim": 128, "num_heads": 4, "lr": 2e-3, "lr_steps": [5],
    "warmup_steps": 100, "vocabulary_min_count": 1, "checkpoint_every": 50, "text_encoder": "bigru",
    "open_vocabulary": True, "word_lr_factor": 0.2, "pair_loss": "infonce", "alignment": "cosine",
    "residual": True,
}  # fmt: skip
# Options in which a resumed run may differ from the run that it resumes without changing its numbers. The data
# themselves are compared by their content.
MAY_DIFFER = {
    "resume", "output_dir", "data_dir", "cache_dir", "device", "num_workers", "checkpoint_every", "log_every",
    "step_timeout", "eval_only", "threads", "bert", "epochs", "test_split", "five_fold", "save_embeddings",
    "init_from",
}  # fmt: skip
# Options that count with --eval-only; all others come from the checkpoint
EVALUATION = {
    "eval_only", "data_dir", "cache_dir", "output_dir", "test_split", "five_fold", "bert", "batch_size", "device",
    "amp", "num_workers", "step_timeout", "threads", "captions_per_image", "captions", "save_embeddings",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line; the usage of forty options would hide it."""
        self.exit(2, processes.signed(f"error: {message} (--help lists the options)") + "\n")


def make_parser() -> Parser:
    parser = Parser(
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

    add("--data-dir", "folder with {train,dev,test}_ims.npy and _caps.txt; without it: scenes of emoji", type=location)
    add("--cache-dir", "where the emoji features are kept", type=location, default=Path("~/.cache/hrem-layers"))
    add("--output-dir", "where everything is written [a new folder in runs/]", type=location)
    add("--test-split", "split of the final evaluation (COCO 5K: testall)", default="test", type=Word())
    add("--captions-per-image", "captions per image in the files", type=Integer(1), default=5)
    add("--captions", "names of the lists {split}_NAME.txt; the first is read for each split, more where they are",
        nargs="+", metavar="NAME", type=Word(), default=["caps"])  # fmt: skip
    add("--save-embeddings", "also write the embeddings of the test split, as .npy", action="store_true")
    add("--five-fold", "also the mean over five folds of the test split (COCO's 1K protocol)", action="store_true")

    add("--text-encoder", "recurrent on a vocabulary of the training captions, or BERT", choices=["bigru", "bert"])
    add("--bert", "BERT: local folder or hub name", default="bert-base-uncased")
    add("--word-vectors", "bigru: pretrained vectors, GloVe or fastText as text or .gz, or .npz", type=location)
    add("--open-vocabulary", "bigru: know all words of --word-vectors, also those that training never saw",
        action=argparse.BooleanOptionalAction)  # fmt: skip
    add("--word-lr-factor", "bigru: learning rate of the word vectors, times this (0: they stay)",
        type=Number(least=0, most=1e6, zero="they stay as they are"))  # fmt: skip
    add("--vocabulary-min-count", "bigru: occurrences that make a word known", type=Integer(1))
    add("--embed-dim", "size of the joint space", type=Integer(2, 2**16))
    add("--num-heads", "attention heads of all transformer layers", type=Integer(1, 2**16))
    add("--dropout", "dropout of all transformer layers", type=SHARE,
        default=release.SETTINGS["fragments"]["dropout"])  # fmt: skip

    add("--mechanism", "relation interaction; none trains the encoders alone", default="fusion",
        choices=["fusion", "standalone", "none"])  # fmt: skip
    add("--alignment", "how regions and words are compared for the graph", choices=["scan", "cosine", "dot"])
    add("--residual", "add the plain embedding to the enhanced one (the release does not); keeps it from collapsing",
        action=argparse.BooleanOptionalAction)  # fmt: skip
    add("--pair-loss", "loss on the pairs of the batch", choices=["triplet", "infonce"])
    add("--negatives", "triplet: how negatives are chosen", default=PAIRS["negative_sampling"],
        choices=["distance_weighted", "hardest", "all", "expected"])  # fmt: skip
    add("--nonzero-cutoff", "triplet: distance from which negatives have no weight (COCO: 1.9)",
        type=Number(above=0.5, most=2), default=PAIRS["nonzero_cutoff"])  # fmt: skip
    add("--candidates", "look for relations only among the K most similar images and texts each [all of the batch]",
        type=Integer(1), metavar="K")  # fmt: skip
    add("--warmup-steps", "steps for which only the plain pair loss counts", type=Integer(0, zero="none"))

    add("--epochs", "passes over the training captions", type=Integer(1))
    add("--batch-size", "pairs per step, over all processes", type=Integer(2))
    add("--sampler", "how batches are drawn", default="random", choices=["random", "neighbor"])
    add("--images-per-cluster", "neighbor: images of one neighbourhood in a batch", type=Integer(1), default=8)
    add("--region-drop", "share of the regions left out in training", type=SHARE, default=TRAINING["region_drop"])
    add("--word-drop", "share of the words masked, replaced or deleted in training", type=SHARE,
        default=TRAINING["word_drop"])  # fmt: skip
    add("--lr", "learning rate (BERT itself: a tenth)", type=Number(least=1e-12, most=1e6))
    add("--lr-steps", "epochs at which it is divided by ten", type=Integer(1), nargs="*")
    add("--weight-decay", "of AdamW", type=Number(least=0, zero="none"), default=TRAINING["weight_decay"])
    add("--grad-clip", "largest norm of the gradient (0: any)", type=Number(least=0, zero="any norm"),
        default=TRAINING["grad_clip"])  # fmt: skip

    add("--resume", "go on from CHECKPOINT, or from last.pt in --output-dir", nargs="?", const="",
        type=lambda text: text and location(text), metavar="CHECKPOINT")  # fmt: skip
    add("--init-from", "begin with the encoders of this checkpoint, of the script or of the authors' release",
        type=location, metavar="CHECKPOINT")  # fmt: skip
    add("--eval-only", "evaluate checkpoints on the test split, train nothing; of several, by their mean similarity",
        type=location, nargs="+", metavar="CHECKPOINT")  # fmt: skip
    add("--seed", "of everything random", type=Integer(0, 2**32 - 1), default=0)
    add("--device", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one", default="auto", type=check_device)
    add("--threads", "of PyTorch on the CPU [as many as are idle, at most one per core]", type=Integer(1, 1024))
    add("--amp", "mixed precision", default="none", choices=["none", "bf16", "fp16"])
    add(
        "--num-workers",
        "processes that read the data",
        type=Integer(0, 1024, zero="none besides the main one"),
        default=0,
    )
    add("--step-timeout", "several processes: seconds one may keep the others waiting in a training step (gloo)",
        type=Number(above=0, most=86400), default=20.0)  # fmt: skip
    add("--checkpoint-every", "steps between checkpoints, besides the one after each epoch (0: none)",
        type=Integer(0, zero="only after each epoch"))  # fmt: skip
    add("--log-every", "steps between TensorBoard points (0: none)", type=Integer(0, zero="none"), default=10)
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, each in its range and fitting the others; one line and exit status 2 if not."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    for key, value in (RELEASE if arguments.data_dir else DEMO).items():
        if getattr(arguments, key) is None:
            setattr(arguments, key, value)
    given = given_options(argv)
    if arguments.eval_only:
        if ignored := sorted(given - EVALUATION):
            parser.error(f"--eval-only: these come from the checkpoint: {', '.join(map(flag, ignored))}")
        if missing := [str(path) for path in arguments.eval_only if not path.is_file()]:
            parser.error(f"--eval-only: no file {', '.join(missing)}")
        arguments.given = given
        return arguments
    try:
        check_together(arguments)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return arguments


def check_together(arguments: argparse.Namespace) -> None:
    """Raises ValueError where options do not fit one another, or name what is not there."""
    if arguments.batch_size % processes.planned():
        raise ValueError(
            f"--batch-size {arguments.batch_size} must be a multiple of the {processes.planned()} processes"
        )
    if arguments.embed_dim % arguments.num_heads or arguments.embed_dim % 2:
        raise ValueError(
            f"--embed-dim must be even and a multiple of --num-heads {arguments.num_heads}, got {arguments.embed_dim}"
        )
    per_process = arguments.batch_size // processes.planned()
    if arguments.sampler == "neighbor" and per_process % arguments.images_per_cluster:
        raise ValueError(
            f"--images-per-cluster must divide the batch of a process, {per_process}, "
            f"got {arguments.images_per_cluster}"
        )
    fastest = arguments.lr * max(1.0, arguments.word_lr_factor)
    if fastest * arguments.weight_decay >= 1:
        raise ValueError(
            f"--weight-decay {arguments.weight_decay:g}: times the learning rate {fastest:g} it must be below 1, or "
            "each step turns the signs of the weights"
        )
    if 0 < arguments.grad_clip < 1e-6:
        raise ValueError(
            f"--grad-clip {arguments.grad_clip:g}: gradients as short vanish beside AdamW's epsilon; 0 means any norm"
        )
    if arguments.resume == "" and arguments.output_dir is None:
        raise ValueError("--resume needs a CHECKPOINT, or the --output-dir whose last.pt it goes on from")
    if arguments.resume and not arguments.resume.is_file():
        raise ValueError(f"--resume: no file {arguments.resume}")
    if arguments.init_from is not None and not arguments.init_from.is_file():
        raise ValueError(f"--init-from: no file {arguments.init_from}")
    if arguments.data_dir is not None and not arguments.data_dir.is_dir():
        raise ValueError(f"--data-dir: no such folder {arguments.data_dir}")
    if arguments.text_encoder == "bert":
        check_bert_folder(arguments.bert)
        if arguments.word_vectors is not None:
            raise ValueError("--word-vectors: only --text-encoder bigru takes any")
        return
    if arguments.word_vectors is not None and not arguments.word_vectors.is_file():
        raise ValueError(f"--word-vectors: expected a file of word vectors, found no file {arguments.word_vectors}")
    if arguments.open_vocabulary and arguments.word_vectors is None and arguments.data_dir is not None:
        raise ValueError("--open-vocabulary needs --word-vectors")


def flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def given_options(argv: list[str] | None) -> set[str]:
    """Which options stand on the command line."""
    parser = make_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def check_saved(saved: Any, names: Iterable[str] | None = None) -> None:
    """Raises ValueError unless ``saved`` holds the options ``names`` (None: all), each in its range."""
    if not isinstance(saved, dict):
        raise ValueError(f"expected the options of a run, found {type(saved).__name__}")
    filled = {**dict.fromkeys(RELEASE)}
    for action in make_parser()._actions:
        if action.dest == "help" or (names is not None and action.dest not in names):
            continue
        if action.dest not in saved:
            raise ValueError(f"option {flag(action.dest)} is missing")
        value = saved[action.dest]
        try:
            if action.dest in filled and value is None:
                raise argparse.ArgumentTypeError("expected a value, got None")
            check_value(action, value)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"option {flag(action.dest)}: {error}") from None
