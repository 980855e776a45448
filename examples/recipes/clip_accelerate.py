"""Fine-tunes a CLIP or SigLIP of transformers with relations, in a loop of your own with accelerate.

accelerate launch examples/recipes/clip_accelerate.py --train FOLDER --test FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from clip_relations import Captions, Collate, RelationalPair, evaluate, load, neighbor_batches
from torch.utils.data import DataLoader


def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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

    accelerator = Accelerator(gradient_accumulation_steps=options.accumulate)
    model, processor = load(options.model)
    pair = RelationalPair(model, options.warmup_steps, gather_distributed=accelerator.num_processes > 1)
    pair.to(accelerator.device)
    collate = Collate(processor, fixed_length=hasattr(model, "logit_bias"))
    train, test = Captions(options.train), Captions(options.test)
    batches = neighbor_batches(pair, train, collate, options.batch_size)
    relations = list(pair.loss.relation_parameters())
    known = {id(p) for p in relations}
    optimizer = torch.optim.AdamW([
        {"params": [p for p in pair.parameters() if id(p) not in known], "lr": options.lr},
        {"params": relations, "lr": options.relation_lr},
    ])  # fmt: skip
    loader = DataLoader(train, batch_sampler=batches, collate_fn=collate)
    wrapped, optimizer, loader = accelerator.prepare(pair, optimizer, loader)  # deals out the batches
    for epoch in range(options.epochs):
        batches.set_epoch(epoch)
        for batch in loader:
            with accelerator.accumulate(wrapped):
                loss = wrapped(**batch)["loss"]
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")
    if not accelerator.is_main_process:
        return ""
    pair.model.save_pretrained(options.output_dir)  # an ordinary CLIP: the loss stays behind
    processor.save_pretrained(options.output_dir)
    metrics = evaluate(pair, test, collate)
    print(metrics)
    return metrics


if __name__ == "__main__":
    main()
