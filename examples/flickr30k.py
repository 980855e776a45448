"""Train an image-text retrieval model with relation modelling, and print its R@K table.

    python examples/flickr30k.py                                    # on scenes of emoji, in minutes
    python examples/flickr30k.py --data-dir data/f30k_precomp       # on Flickr30K, the release's settings
    python examples/flickr30k.py --data-dir data/coco_precomp --test-split testall --nonzero-cutoff 1.9
    torchrun --nproc-per-node 2 examples/flickr30k.py ...           # on several processes
    python examples/flickr30k.py --eval-only runs/f30k/best.pt      # evaluate only; several: their ensemble
    python examples/flickr30k.py --data-dir data/f30k_precomp --init-from model_best.pth     # the authors' encoders

This file puts the parts together: the data, the model (retrieval_model.py), training (training.py), evaluation
(evaluation.py). At inference the two encoders run alone: nothing of the relation modules is needed then.
"""

from __future__ import annotations

import interrupt  # isort: skip

import argparse
import contextlib
import glob
import importlib
import os
import sys
from pathlib import Path

import authors_checkpoint
import checkpoint
import checkpoint_checks
import processes
import run_folder
import torch
from errors import explain, let_idle_workers_die
from evaluation import check_test_split, evaluate, final_evaluation, read_pictures, together
from options import EVALUATION, parse_arguments
from pair_data import Pairs, load_pairs
from retrieval_model import build, known_words, rebuild, say_what_is_cut, vocabulary_fingerprint
from run_state import Run
from training import train


def main(argv: list[str] | None = None) -> None:
    interrupt.as_exception()
    arguments = parse_arguments(argv)
    run: list[Run] = []  # once there is one: what it has saved so far
    try:
        with processes.together(arguments.device, arguments.step_timeout) as device:
            if arguments.eval_only:
                evaluate_only(arguments, device)
            else:
                train_and_evaluate(arguments, device, run)
    except KeyboardInterrupt:
        interrupt.ignore()  # what comes now would meet an interpreter that is being taken apart
        go_on = f"; {run[0].saved}" if run else ""
        sys.exit(f"interrupted: go on with --resume and the same --output-dir{go_on}" if processes.is_main() else 130)
    except Exception as error:
        interrupt.ignore_workers()  # where one has died others may, and this one's reason would be lost
        reason = explain(error)
        if reason is None:
            raise
        if run and run[0].saved not in reason and not isinstance(error, checkpoint.Damaged):
            reason += f"; {run[0].saved}"
        sys.exit(processes.signed(f"error: {reason}"))


def choose_threads(arguments: argparse.Namespace) -> None:
    """As many as there are idle cores: with more, each layer waits for whoever shares a core with others."""
    most = torch.get_num_threads()
    if arguments.threads is None:
        idle = most
        if "OMP_NUM_THREADS" not in os.environ and hasattr(os, "getloadavg"):
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            with contextlib.suppress(OSError):
                idle = round(cores - os.getloadavg()[0])
        arguments.threads = max(1, min(most, idle))
    torch.set_num_threads(arguments.threads)


def data_folder(arguments: argparse.Namespace) -> Path:
    if arguments.data_dir is not None:
        return arguments.data_dir
    from emoji_scenes import prepare_emoji_scenes

    if processes.is_main():
        prepare_emoji_scenes(arguments.cache_dir.expanduser())
    processes.wait()
    return prepare_emoji_scenes(arguments.cache_dir.expanduser(), progress=False)


def open_splits(arguments: argparse.Namespace, data: Path, *splits: str) -> list[Pairs]:
    """The splits, and all of those that are only read at the end of an epoch or of the run."""
    if len({*arguments.captions}) < len(arguments.captions):
        raise ValueError(f"--captions {' '.join(arguments.captions)}: expected each name once")
    for name in arguments.captions[1:]:
        if not any(data.glob(f"*_{glob.escape(name)}.txt")):
            raise ValueError(f"--captions {name}: expected train_{name}.txt, or that of another split, in {data}")
    opened = [load_pairs(data, split, arguments.captions_per_image, arguments.captions) for split in splits]
    for pairs in opened[1:]:
        if pairs.features.shape[2] != opened[0].features.shape[2]:
            raise ValueError(
                f"{pairs.path}: expected {opened[0].features.shape[2]} features per region as in "
                f"{opened[0].path.name}, found {pairs.features.shape[2]}"
            )
        pairs.check_all()
    return opened


def train_and_evaluate(arguments: argparse.Namespace, device: torch.device, announce: list[Run]) -> None:
    for package in ("tqdm", "tensorboard", "matplotlib"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(f'the script needs {package}: pip install "hrem-layers[examples]"') from error
    data = data_folder(arguments)
    vectors = arguments.word_vectors
    if arguments.data_dir is None and vectors is None and arguments.text_encoder == "bigru":
        vectors = data / "word_vectors.npz"
    train_pairs, dev_pairs, test_pairs = open_splits(arguments, data, "train", "dev", arguments.test_split)
    check_test_split(arguments, test_pairs)
    read_pictures(data, arguments.test_split, test_pairs)

    folder = run_folder.choose(arguments)
    with run_folder.locked(folder):
        resumed = run_folder.resume_from(arguments, folder)
        if resumed and arguments.threads is None:
            arguments.threads = resumed[1]["arguments"]["threads"]  # sums depend on it in their last digits
        choose_threads(arguments)
        words = known_words(arguments, train_pairs, vectors)
        fingerprint = vocabulary_fingerprint(words)
        for pairs in (train_pairs, dev_pairs, test_pairs):
            fingerprint |= pairs.fingerprint()
        if resumed:
            run_folder.check_same_data(resumed[0], resumed[1]["data"], fingerprint, data)
        torch.manual_seed(arguments.seed)
        built = build(arguments, train_pairs.features.shape[2], words)
        if arguments.init_from and not resumed:
            authors_checkpoint.start_from(arguments.init_from, built, arguments)
        run = Run(built, arguments, device, fingerprint)
        # the model starts the same on every process; what is drawn from here on is drawn by each for itself
        torch.manual_seed(arguments.seed + processes.rank())
        if resumed:
            run.restore(*resumed)
            if run.best is not None and processes.is_main():
                checkpoint.save(folder / "best.pt", run.best_state())
        announce.append(run)
        splits = {"train": train_pairs, "dev": dev_pairs, arguments.test_split: test_pairs}
        say_start(arguments, run, folder, device, splits)
        for split, pairs in splits.items():
            say_what_is_cut(built.encode, split, pairs)
        train(run, train_pairs, dev_pairs, built, arguments, folder, device)

        assert run.best is not None
        run.model.load_state_dict(run.best["model"])
        evaluated = evaluate(run.model, test_pairs, built, arguments, device, arguments.test_split)
        whose = f"encoders of epoch {run.best['epoch']}, chosen on dev"
        final_evaluation(
            arguments, test_pairs, evaluated, folder, data, {**run.best_state(), "history": run.history}, whose
        )


def say_start(
    arguments: argparse.Namespace, run: Run, folder: Path, device: torch.device, splits: dict[str, Pairs]
) -> None:
    sizes = "; ".join(f"{name} {p.num_images} images, {len(p.captions)} captions" for name, p in splits.items())
    threads = f", {arguments.threads} thread(s)" if device.type == "cpu" else ""
    resumed = f"; resumed in epoch {run.epoch + 1} after {run.step} steps" if run.total_steps else ""
    processes.say(f"{sizes}; {processes.count()} process(es), {device}{threads}; writing to {folder}{resumed}")


def evaluate_only(arguments: argparse.Namespace, device: torch.device) -> None:
    """One checkpoint, or several together. Models come from them, all about the evaluation from the command line."""
    choose_threads(arguments)
    states = [(path, authors_checkpoint.load_any(path, arguments.data_dir)) for path in arguments.eval_only]
    for path, state in states:
        checkpoint_checks.check(path, state, to_go_on=False)
    first = states[0][1]["arguments"]
    if arguments.data_dir is None and first["data_dir"] is not None:
        arguments.data_dir = Path(first["data_dir"])
    for key in {"captions_per_image", "captions"} - arguments.given:
        setattr(arguments, key, first[key])
    data, split = data_folder(arguments), arguments.test_split
    (pairs,) = open_splits(arguments, data, split)
    check_test_split(arguments, pairs)
    folder = arguments.output_dir or arguments.eval_only[0].parent / f"eval-{split}"
    folder.mkdir(parents=True, exist_ok=True)

    models, members, whose = [], [], ""
    for path, state in states:  # all of them fit before the first is evaluated
        saved = argparse.Namespace(**state["arguments"])
        for key in EVALUATION & (arguments.given | {"data_dir", "num_workers"}):
            setattr(saved, key, getattr(arguments, key))
        built = rebuild(path, state, saved, pairs)
        models.append((built, saved))
    for (path, state), (built, saved) in zip(states, models, strict=True):
        say_what_is_cut(built.encode, split, pairs)
        members.append(evaluate(built.model.to(device), pairs, built, saved, device, split))
        done = state["sampler"]["batches_done"]
        whose = f"encoders of epoch {state['sampler']['epoch']}" + (f" and {done} steps" if done else "")
        whose = state.get("whose", whose)
        if len(states) > 1:
            processes.say(f"\n{path}, {whose}\n{members[-1].metrics.table()}")
    if len(states) == 1:
        final_evaluation(arguments, pairs, members[0], folder, data, states[0][1], whose)
        return
    parts = [{"checkpoint": str(p), "test": m.metrics.as_dict()} for (p, _), m in zip(states, members, strict=True)]
    whose = f"mean similarity of {len(members)} checkpoints"
    final_evaluation(arguments, pairs, together(members, pairs), folder, data, states[0][1], whose, {"members": parts})


if __name__ == "__main__":
    let_idle_workers_die()
    main()
