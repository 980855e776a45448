"""Fine-tunes a CLIP or SigLIP of transformers with relations, in a loop of your own with accelerate.

accelerate launch examples/recipes/clip_accelerate.py --train FOLDER --test FOLDER
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from clip_options import parameter_groups, parse
from clip_relations import Captions, Collate, RelationalPair, evaluate, load, neighbor_batches
from torch.utils.data import DataLoader


def main(argv: list[str] | None = None) -> str:
    options = parse(__doc__, argv)

    accelerator = Accelerator(gradient_accumulation_steps=options.accumulate)
    model, processor = load(options.model)
    pair = RelationalPair(model, options.warmup_steps, gather_distributed=accelerator.num_processes > 1)
    pair.to(accelerator.device)
    collate = Collate(processor, fixed_length=hasattr(model, "logit_bias"))
    train, test = Captions(options.train), Captions(options.test)
    batches = neighbor_batches(pair, train, collate, options.batch_size)
    optimizer = torch.optim.AdamW(parameter_groups(pair, options.lr, options.relation_lr))
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
