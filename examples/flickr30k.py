"""Train an image-text retrieval model with relation modelling, and print its R@K table.

    python examples/flickr30k.py                                    # on emoji that pip installs, in minutes
    python examples/flickr30k.py --data-dir data/f30k_precomp       # on Flickr30K, the release's settings
    python examples/flickr30k.py --data-dir data/coco_precomp --test-split testall --nonzero-cutoff 1.9
    torchrun --nproc-per-node 2 examples/flickr30k.py ...           # on several processes
    python examples/flickr30k.py --eval-only runs/f30k/best.pt      # evaluate only

From top to bottom: the options, the data, the model, training, evaluation, what is left behind. At
inference the two encoders run alone: nothing of the relation modules is needed then.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import checkpoint
import numpy as np
import processes
import report
import torch
from batches import Rest, make_sampler
from encoders import BertEncoder, BiGRUEncoder, ImageEncoder, load_bert
from options import parse_arguments
from pair_data import Batch, Captions, DataError, Images, Pairs, TrainingPairs, collate, load_pairs, pad
from text_tokens import BertTokens, Vocabulary, read_word_vectors
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from hrem_layers import (
    AssociationGraph,
    FragmentRelation,
    HREMLoss,
    HREMTerms,
    InfoNCELoss,
    RelationInteraction,
    TripletLoss,
)
from hrem_layers.retrieval import RetrievalMetrics, retrieval_metrics

# ------------------------------------------------------------------------------------------ the data


def data_folder(arguments: argparse.Namespace) -> Path:
    if arguments.data_dir is not None:
        return arguments.data_dir
    from emoji_pairs import prepare_emoji_pairs

    if processes.is_main():
        prepare_emoji_pairs(arguments.cache_dir.expanduser())
    processes.wait()
    return prepare_emoji_pairs(arguments.cache_dir.expanduser())


# ------------------------------------------------------------------------------------------ the model


class RetrievalModel(nn.Module):
    """Both encoders and, for training, the loss with its relation modules."""

    def __init__(self, image_encoder: nn.Module, text_encoder: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.image_encoder, self.text_encoder, self.loss = image_encoder, text_encoder, loss

    def forward(self, batch: Batch) -> HREMTerms:
        image_embedding, regions = self.image_encoder(batch.images, batch.image_mask)
        text_embedding, words = self.text_encoder(batch.tokens, batch.text_mask)
        return self.loss.terms(
            image_embedding, text_embedding, regions, words, batch.image_mask, batch.text_mask, batch.image_ids
        )


class PlainLoss(nn.Module):
    """``--mechanism none``: the pair loss alone, for comparison."""

    def __init__(self, pair_loss: nn.Module) -> None:
        super().__init__()
        self.pair_loss = pair_loss

    def terms(self, image_embedding: Tensor, text_embedding: Tensor, *fragments_masks_ids: Tensor) -> HREMTerms:
        v, u = (
            processes.gather_rows(nn.functional.normalize(x.float(), dim=1)) for x in (image_embedding, text_embedding)
        )
        ids = processes.gather_rows(fragments_masks_ids[-1])
        loss = self.pair_loss(v @ u.t(), ids.unsqueeze(1) == ids)
        zero = loss.new_zeros(())
        return HREMTerms(loss, loss, zero, zero, zero, zero)


class Built(NamedTuple):
    model: RetrievalModel
    encode: Vocabulary | BertTokens
    vocabulary: list[str]  # empty for BERT


def build(arguments: argparse.Namespace, feature_dim: int, vocabulary: list[str], vectors: Path | None) -> Built:
    """The model, and the function that turns captions into tokens."""

    def relation() -> FragmentRelation:
        return FragmentRelation(arguments.embed_dim, num_heads=arguments.num_heads, dropout=arguments.dropout)

    if arguments.text_encoder == "bert":
        tokenizer, bert = load_bert(arguments.bert)
        encode: Vocabulary | BertTokens = BertTokens(tokenizer, augment=arguments.word_drop)
        text_encoder: nn.Module = BertEncoder(bert, arguments.embed_dim, relation())
    else:
        encode = Vocabulary(vocabulary, augment=arguments.word_drop)
        known = read_word_vectors(vectors, vocabulary) if vectors else None
        text_encoder = BiGRUEncoder(encode, arguments.embed_dim, relation(), vectors=known)
    if arguments.pair_loss == "triplet":
        pair_loss: nn.Module = TripletLoss(
            negative_sampling=arguments.negatives, nonzero_cutoff=arguments.nonzero_cutoff
        )
    else:
        pair_loss = InfoNCELoss()
    if arguments.mechanism == "none":
        loss: nn.Module = PlainLoss(pair_loss)
    else:
        loss = HREMLoss(
            arguments.embed_dim,
            graph=AssociationGraph(candidates=arguments.candidates),
            interaction=RelationInteraction(
                arguments.embed_dim,
                mechanism=arguments.mechanism,
                num_heads=arguments.num_heads,
                dropout=arguments.dropout,
            ),
            pair_loss=pair_loss,
            warmup_steps=arguments.warmup_steps,
            gather_distributed=True,
        )
    image_encoder = ImageEncoder(feature_dim, arguments.embed_dim, relation())
    return Built(RetrievalModel(image_encoder, text_encoder, loss), encode, vocabulary)


def make_optimizer(model: RetrievalModel, arguments: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW; what is pretrained learns more slowly."""
    if arguments.text_encoder == "bert":
        name, pretrained, factor = "lr_bert", list(model.text_encoder.bert.parameters()), 0.1
    else:
        name, pretrained, factor = "lr_words", list(model.text_encoder.words.parameters()), arguments.word_lr_factor
    slow = {id(p) for p in pretrained}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in slow], "lr": arguments.lr, "name": "lr"},
        {"params": pretrained, "lr": arguments.lr * factor, "name": name},
    ]
    return torch.optim.AdamW(groups, weight_decay=arguments.weight_decay)


# ------------------------------------------------------------------------------------------ training


class Run:
    """Everything that changes while training, and therefore everything that a checkpoint holds."""

    def __init__(self, built: Built, arguments: argparse.Namespace, device: torch.device) -> None:
        self.model = built.model.to(device)
        self.vocabulary = built.vocabulary
        self.arguments = {key: str(x) if isinstance(x, Path) else x for key, x in vars(arguments).items()}
        self.optimizer = make_optimizer(self.model, arguments)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, arguments.lr_steps, gamma=0.1)
        self.scaler = torch.amp.GradScaler(device.type, enabled=arguments.amp == "fp16")
        self.epoch, self.step = 0, 0  # step: within the epoch
        self.total_steps = 0
        self.loss_sums = {"total": 0.0, "base": 0.0}  # within the epoch
        self.best_rsum, self.history = -1.0, []

    def state(self) -> dict[str, Any]:
        return {
            "arguments": self.arguments,
            "vocabulary": self.vocabulary,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sampler": {"epoch": self.epoch, "batches_done": self.step},
            "total_steps": self.total_steps,
            "loss_sums": self.loss_sums,
            "best_rsum": self.best_rsum,
            "history": self.history,
            "random": processes.gather_objects(checkpoint.random_state()),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["sampler"]["epoch"], state["sampler"]["batches_done"]
        self.total_steps, self.loss_sums = state["total_steps"], state["loss_sums"]
        self.best_rsum, self.history = state["best_rsum"], state["history"]
        if len(state["random"]) != processes.count():
            raise ValueError(
                f"--resume: the checkpoint was written by {len(state['random'])} processes, "
                f"this run has {processes.count()}"
            )
        checkpoint.restore_random_state(state["random"][processes.rank()])


def train(
    run: Run, train_pairs: Pairs, dev_pairs: Pairs, built: Built, arguments: argparse.Namespace, folder: Path,
    device: torch.device,
) -> None:  # fmt: skip
    """Trains from where ``run`` is to the last epoch; leaves ``best.pt`` and ``last.pt`` in ``folder``."""
    from torch.utils.tensorboard import SummaryWriter

    pairs = TrainingPairs(train_pairs, built.encode, region_drop=arguments.region_drop, seed=arguments.seed)
    sampler = make_sampler(train_pairs, arguments)
    model: nn.Module = run.model
    processes.wait()  # reading and clustering the features may take one much longer than another
    if processes.count() > 1:
        model = DistributedDataParallel(run.model, device_ids=[device] if device.type == "cuda" else None)
    board = SummaryWriter(folder / "tensorboard", purge_step=run.total_steps) if processes.is_main() else None

    while run.epoch < arguments.epochs:
        start = time.perf_counter()
        pairs.set_epoch(run.epoch)
        sampler.set_epoch(run.epoch)
        rest = Rest(sampler, run.step)
        loader = DataLoader(
            pairs, batch_sampler=rest, collate_fn=collate, num_workers=arguments.num_workers,
            pin_memory=device.type == "cuda", generator=torch.Generator(),
        )  # fmt: skip
        model.train()
        for batch in processes.progress(loader, f"epoch {run.epoch + 1}", initial=run.step, total=len(sampler)):
            with torch.autocast(device.type, amp_dtype(arguments), enabled=arguments.amp != "none"):
                terms = model(batch.to(device))
            run.optimizer.zero_grad(set_to_none=True)
            run.scaler.scale(terms.total).backward()
            run.scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), arguments.grad_clip)
            run.scaler.step(run.optimizer)
            run.scaler.update()

            run.step, run.total_steps = run.step + 1, run.total_steps + 1
            for name in run.loss_sums:
                run.loss_sums[name] += getattr(terms, name).item()
            if not np.isfinite(run.loss_sums["total"]):
                raise FloatingPointError(f"the loss is not finite in epoch {run.epoch + 1}, step {run.step}: {terms}")
            if board and run.total_steps % arguments.log_every == 0:
                for name, value in terms._asdict().items():
                    board.add_scalar(f"loss/{name}", value, run.total_steps)
                for group in run.optimizer.param_groups:
                    board.add_scalar(f"learning_rate/{group['name']}", group["lr"], run.total_steps)
            if run.step % arguments.checkpoint_every == 0 and run.step < len(sampler):
                save(folder / "last.pt", run)

        metrics = evaluate(run.model, dev_pairs, built, arguments, device, "dev")[0]
        loss, base_loss = (run.loss_sums[name] / run.step for name in ("total", "base"))
        run.history.append({"epoch": run.epoch + 1, "loss": loss, "base_loss": base_loss, "dev": metrics.as_dict()})
        is_best = metrics.rsum > run.best_rsum
        run.best_rsum = max(run.best_rsum, metrics.rsum)
        run.scheduler.step()
        run.epoch, run.step, run.loss_sums = run.epoch + 1, 0, dict.fromkeys(run.loss_sums, 0.0)
        if is_best:  # first the best, then the last: a kill between the two repeats this evaluation
            save(folder / "best.pt", run)
        save(folder / "last.pt", run)
        if board:
            for name, value in metrics.as_dict().items():
                board.add_scalar(f"dev/{name}", value, run.total_steps)
            print(
                f"epoch {run.epoch}/{arguments.epochs}  loss {loss:.3f}  dev R@1 image to text {metrics.i2t.r1:.1f}, "
                f"text to image {metrics.t2i.r1:.1f}, rSum {metrics.rsum:.1f}{' (best)' if is_best else ''}  "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
    if board:
        board.close()


def amp_dtype(arguments: argparse.Namespace) -> torch.dtype:
    return torch.float16 if arguments.amp == "fp16" else torch.bfloat16


def save(path: Path, run: Run) -> None:
    """Every process contributes its random state; the main one writes while the others wait."""
    state = run.state()
    if processes.is_main():
        checkpoint.save(path, state)
    processes.wait()


# ------------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def evaluate(
    model: RetrievalModel,
    pairs: Pairs,
    built: Built,
    arguments: argparse.Namespace,
    device: torch.device,
    what: str,
) -> tuple[RetrievalMetrics, Tensor, Tensor]:
    """R@K of one split, and the embeddings it is computed from. Each process encodes its share."""
    model.eval()

    def encode(items: Any, encoder: nn.Module, name: str) -> Tensor:
        mine = processes.shard(len(items))
        loader = DataLoader(
            torch.utils.data.Subset(items, mine), batch_size=arguments.batch_size, collate_fn=pad,
            num_workers=arguments.num_workers, generator=torch.Generator(),
        )  # fmt: skip
        rows = [torch.zeros(0, arguments.embed_dim)]
        for batch, mask in processes.progress(loader, f"{what}: {name}"):
            with torch.autocast(device.type, amp_dtype(arguments), enabled=arguments.amp != "none"):
                rows.append(encoder(batch.to(device), mask.to(device))[0].float().cpu())
        return processes.gather_shards(torch.cat(rows), len(items))

    images = encode(Images(pairs), model.image_encoder, "images")
    texts = encode(Captions(pairs, built.encode), model.text_encoder, "captions")
    return retrieval_metrics(images, texts, captions_per_image=pairs.captions_per_image), images, texts


def final_evaluation(
    run_arguments: argparse.Namespace, model: RetrievalModel, built: Built, folder: Path, data: Path,
    state: dict[str, Any], device: torch.device,
) -> None:  # fmt: skip
    """Once, on the test split: the table, metrics.json and the picture."""
    pairs = load_pairs(data, run_arguments.test_split, run_arguments.captions_per_image)
    metrics, images, texts = evaluate(model, pairs, built, run_arguments, device, run_arguments.test_split)
    if not processes.is_main():
        return
    chance = report.chance(pairs)
    content: dict[str, Any] = {
        "split": run_arguments.test_split, "images": pairs.num_images, "captions": len(pairs.captions),
        "test": metrics.as_dict(), "chance": chance, "best_epoch": state["sampler"]["epoch"],
        "best_dev_rsum": state["best_rsum"], "history": state["history"], "arguments": state["arguments"],
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }  # fmt: skip
    print(f"\n{run_arguments.test_split}: {pairs.num_images} images, {len(pairs.captions)} captions; "
          f"encoders of epoch {state['sampler']['epoch']}, chosen on dev")  # fmt: skip
    print(metrics.table())
    print(f"chance: R@1 {chance['i2t_r1']:.2f} image to text, {chance['t2i_r1']:.2f} text to image")
    if run_arguments.five_fold:
        folds = retrieval_metrics(images, texts, captions_per_image=pairs.captions_per_image, folds=5)
        content["five_fold"] = folds.as_dict()
        print(f"\nmean over five folds\n{folds.table()}")
    report.write_json(folder / "metrics.json", content)
    pictures_file = data / f"{run_arguments.test_split}_pictures.npy"
    pictures = np.load(pictures_file, mmap_mode="r") if pictures_file.is_file() else None
    shown = np.linspace(0, pairs.num_images - 1, min(6, pairs.num_images)).astype(int).tolist()
    report.draw(
        folder / "report.png",
        state["history"],
        pairs,
        shown,
        report.top_captions(images, texts, shown),
        metrics,
        pictures,
    )
    print(f"\nwritten to {folder}: metrics.json, report.png, best.pt, last.pt, tensorboard/")


# ------------------------------------------------------------------------------------------ all together


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    try:
        with processes.together(arguments.device, arguments.step_timeout) as device:
            if arguments.eval_only:
                evaluate_only(arguments, device)
            else:
                train_and_evaluate(arguments, device)
    except (DataError, ValueError, FileNotFoundError, FileExistsError, ImportError, processes.PeerLost) as error:
        sys.exit(processes.signed(f"error: {error}"))
    except KeyboardInterrupt:
        sys.exit("interrupted: go on with --resume and the same --output-dir" if processes.is_main() else 130)


def train_and_evaluate(arguments: argparse.Namespace, device: torch.device) -> None:
    data = data_folder(arguments)
    vectors = arguments.word_vectors
    if arguments.data_dir is None and vectors is None and arguments.text_encoder == "bigru":
        vectors = data / "word_vectors.npz"
    train_pairs = load_pairs(data, "train", arguments.captions_per_image)
    dev_pairs = load_pairs(data, "dev", arguments.captions_per_image)
    folder = checkpoint.output_folder(arguments)
    resumed = checkpoint.resume_from(arguments, folder)

    torch.manual_seed(arguments.seed)
    vocabulary: list[str] = []
    if arguments.text_encoder == "bigru":
        vocabulary = Vocabulary.of(
            train_pairs.captions, min_count=arguments.vocabulary_min_count, augment=arguments.word_drop
        ).known
        if arguments.open_vocabulary:
            if vectors is None:
                raise ValueError("--open-vocabulary needs --word-vectors")
            vocabulary += sorted(read_word_vectors(vectors, None).keys() - set(vocabulary))
    built = build(arguments, train_pairs.features.shape[2], vocabulary, vectors)
    run = Run(built, arguments, device)
    # the model starts the same on every process; what is drawn from here on is drawn by each for itself
    torch.manual_seed(arguments.seed + processes.rank())
    if resumed is not None:
        run.restore(resumed)
    if processes.is_main():
        print(
            f"{train_pairs.num_images} training images, {len(train_pairs.captions)} captions, "
            f"{processes.count()} process(es), {device}; writing to {folder}"
            + (f"; resumed in epoch {run.epoch + 1} after {run.step} steps" if resumed else ""),
            flush=True,
        )
    train(run, train_pairs, dev_pairs, built, arguments, folder, device)
    processes.wait()
    best = checkpoint.load(folder / "best.pt")
    run.model.load_state_dict(best["model"])
    final_evaluation(arguments, run.model, built, folder, data, {**best, "history": run.history}, device)


def evaluate_only(arguments: argparse.Namespace, device: torch.device) -> None:
    state = checkpoint.load(arguments.eval_only)
    saved = argparse.Namespace(**{**vars(arguments), **state["arguments"], "test_split": arguments.test_split,
                                  "five_fold": arguments.five_fold, "num_workers": arguments.num_workers})  # fmt: skip
    if arguments.data_dir is None and saved.data_dir is not None:
        arguments.data_dir = Path(saved.data_dir)
    data = data_folder(arguments)
    feature_dim = state["model"]["image_encoder.linear.weight"].shape[1]
    built = build(saved, feature_dim, state["vocabulary"], None)
    built.model.load_state_dict(state["model"])
    folder = arguments.output_dir or arguments.eval_only.parent / f"eval-{arguments.test_split}"
    folder.mkdir(parents=True, exist_ok=True)
    final_evaluation(saved, built.model.to(device), built, folder, data, state, device)


if __name__ == "__main__":
    main()
