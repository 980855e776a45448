"""Fine-tunes a CLIP or SigLIP of transformers with relations, in the Hugging Face Trainer.

python examples/recipes/clip_trainer.py --model openai/clip-vit-base-patch32 --train FOLDER --test FOLDER
torchrun --nproc-per-node 2 examples/recipes/clip_trainer.py ...   # graph and loss over the batches of all
"""

from __future__ import annotations

import os

from clip_options import parameter_groups, parse
from clip_relations import Captions, Collate, RelationalPair, evaluate, load, neighbor_batches
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments


class NeighborTrainer(Trainer):
    """Trainer that takes its batches from a NeighborBatchSampler."""

    batches = None

    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(
            self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )  # fmt: skip
        return self.accelerator.prepare(loader)  # deals the batches out to the processes


class NextEpoch(TrainerCallback):
    """Tells the sampler which epoch it is, which Trainer does for samplers of its own only."""

    def __init__(self, batches) -> None:
        self.batches = batches

    def on_epoch_begin(self, args, state, control, **_) -> None:
        self.batches.set_epoch(int(state.epoch or 0))


def main(argv: list[str] | None = None) -> str:
    options = parse(__doc__, argv)

    model, processor = load(options.model)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    pair = RelationalPair(model, options.warmup_steps, gather_distributed=several)
    collate = Collate(processor, fixed_length=hasattr(model, "logit_bias"))
    train, test = Captions(options.train), Captions(options.test)
    batches = neighbor_batches(pair, train, collate, options.batch_size)
    arguments = TrainingArguments(
        str(options.output_dir), num_train_epochs=options.epochs, per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate, learning_rate=options.lr, lr_scheduler_type="cosine",
        remove_unused_columns=False, save_strategy="no", report_to="none", logging_steps=10, disable_tqdm=True,
    )  # fmt: skip
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    groups = parameter_groups(pair, options.lr, options.relation_lr)
    trainer = NeighborTrainer(
        pair, arguments, train_dataset=train, data_collator=collate, optimizers=(kind(groups, **settings), None),
        callbacks=[NextEpoch(batches)],
    )  # fmt: skip
    trainer.batches = batches
    trainer.train()
    pair = trainer.accelerator.unwrap_model(trainer.model)
    if not trainer.is_world_process_zero():
        return ""
    pair.model.save_pretrained(options.output_dir)  # an ordinary CLIP: the loss stays behind
    processor.save_pretrained(options.output_dir)
    metrics = evaluate(pair, test, collate)
    print(metrics)
    return metrics


if __name__ == "__main__":
    main()
