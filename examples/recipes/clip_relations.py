"""CLIP or SigLIP of transformers with HREMLoss: what the Trainer and the accelerate recipe share."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModel, AutoProcessor, PreTrainedModel

from hrem_layers import HREMLoss, InfoNCELoss, NeighborBatchSampler, RelationInteraction, SigmoidLoss, retrieval_metrics


class RelationalPair(nn.Module):
    """The two towers of a CLIP or SigLIP and the loss that lets the samples of a batch talk to each other.

    ``forward`` returns ``{"loss": scalar}``, as Trainer wants it. The loss shares the model's own temperature, so that
    what is saved by ``model.save_pretrained`` is a whole CLIP again, without anything of this library.

    Args:
        model: ``CLIPModel``, ``SiglipModel`` or one that is built like them.
        warmup_steps: training calls on the pair loss alone, see :class:`hrem_layers.HREMLoss`.
        gather_distributed: build graph and loss over the batches of all processes.
    """

    def __init__(self, model: PreTrainedModel, warmup_steps: int = 0, gather_distributed: bool = False) -> None:
        super().__init__()
        self.model = model
        sigmoid = hasattr(model, "logit_bias")
        dim = model.config.text_config.projection_size if sigmoid else model.config.projection_dim
        heads = next(h for h in (16, 12, 8, 4, 2, 1) if dim % h == 0)
        shared = {"log_scale": model.logit_scale} | ({"bias": model.logit_bias} if sigmoid else {})
        self.loss = HREMLoss(
            dim, pair_loss=(SigmoidLoss if sigmoid else InfoNCELoss)(**shared),
            interaction=RelationInteraction(dim, num_heads=heads),
            warmup_steps=warmup_steps, gather_distributed=gather_distributed,
        )  # fmt: skip

    def encode_image(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (N, D) and patches (N, R, D) in the joint space: through the projection that pools them too."""
        vision = self.model.vision_model(pixel_values=pixel_values)
        if not hasattr(self.model, "visual_projection"):  # SigLIP: no class token, its head pools in the same space
            return vision.pooler_output, vision.last_hidden_state
        patches = self.model.vision_model.post_layernorm(vision.last_hidden_state[:, 1:])  # without the class token
        return self.model.visual_projection(vision.pooler_output), self.model.visual_projection(patches)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings (N, D) and tokens (N, W, D)."""
        if not hasattr(self.model, "text_projection"):  # SigLIP was trained without attention masks
            text = self.model.text_model(input_ids=input_ids)
            return text.pooler_output, self.model.text_model.head(text.last_hidden_state)
        text = self.model.text_model(input_ids=input_ids, attention_mask=attention_mask)
        return self.model.text_projection(text.pooler_output), self.model.text_projection(text.last_hidden_state)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, image_ids: Tensor
    ) -> dict[str, Tensor]:
        v, patches = self.encode_image(pixel_values)
        u, tokens = self.encode_text(input_ids, attention_mask)
        words = attention_mask.bool()  # transformers' masks are int; True = real here
        return {"loss": self.loss(v, u, patches, tokens, text_mask=words, image_ids=image_ids)}


class Captions(Dataset[dict[str, object]]):
    """A folder in the ImageFolder form of the Hugging Face hub: pictures and ``metadata.jsonl``, a line
    ``{"file_name": ..., "text": caption or list of captions}`` per picture. One item per caption.
    """

    def __init__(self, folder: Path) -> None:
        if not (listed := folder / "metadata.jsonl").is_file():
            raise SystemExit(f"error: {folder} has no file metadata.jsonl")
        rows = [json.loads(line) for line in listed.read_text(encoding="utf-8").split("\n") if line.strip()]
        texts = [row["text"] if isinstance(row["text"], list) else [row["text"]] for row in rows]
        self.files = [folder / row["file_name"] for row in rows]
        self.items = [(image, text) for image, several in enumerate(texts) for text in several]
        self.captions_per_image = [len(several) for several in texts]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict[str, object]:
        image, text = self.items[i]
        with Image.open(self.files[image]) as opened:
            return {"image": opened.convert("RGB"), "text": text, "image_id": image}


class Collate:
    """Items to the arguments of :meth:`RelationalPair.forward`."""

    def __init__(self, processor: AutoProcessor, *, fixed_length: bool) -> None:
        self.processor, self.padding = (
            processor,
            "max_length" if fixed_length else True,
        )  # SigLIP knows full length only

    def __call__(self, items: list[dict[str, object]]) -> dict[str, Tensor]:
        texts, images = [x["text"] for x in items], [x["image"] for x in items]
        batch = dict(
            self.processor(text=texts, images=images, return_tensors="pt", padding=self.padding, truncation=True)
        )
        if "attention_mask" not in batch:
            batch["attention_mask"] = batch["input_ids"] != self.processor.tokenizer.pad_token_id
        return batch | {"image_ids": torch.tensor([x["image_id"] for x in items])}


@torch.no_grad()
def encode_all(pair: RelationalPair, data: Captions, collate: Collate, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Embeddings of all pictures (n, D), one each, and of all captions (m, D)."""
    device, training = next(pair.parameters()).device, pair.training
    pair.eval()
    images, texts, seen = [], [], -1
    for batch in DataLoader(data, batch_size, collate_fn=collate):
        batch = {name: x.to(device) for name, x in batch.items()}
        new = batch["image_ids"] > torch.cat([batch["image_ids"].new_tensor([seen]), batch["image_ids"][:-1]])
        seen = int(batch["image_ids"][-1])
        if new.any():
            images.append(pair.encode_image(batch["pixel_values"][new])[0].float())
        texts.append(pair.encode_text(batch["input_ids"], batch["attention_mask"])[0].float())
    pair.train(training)
    return torch.cat(images), torch.cat(texts)


def neighbor_batches(pair: RelationalPair, data: Captions, collate: Collate, batch_size: int) -> NeighborBatchSampler:
    """Batches of pictures that the model itself, as it is now, finds alike: four to a neighbourhood."""
    features = nn.functional.normalize(encode_all(pair, data, collate)[0], dim=1).cpu().numpy()
    return NeighborBatchSampler(
        features, clusters_per_batch=batch_size // 4, images_per_cluster=4, captions_per_image=data.captions_per_image,
        num_clusters=max(len(features) // 64, batch_size // 4), num_replicas=1,  # the frameworks share out themselves
    )  # fmt: skip


def load(name: str) -> tuple[PreTrainedModel, AutoProcessor]:
    """Model and processor by hub name or local folder."""
    return AutoModel.from_pretrained(name), AutoProcessor.from_pretrained(name)


def evaluate(pair: RelationalPair, data: Captions, collate: Collate) -> str:
    return str(retrieval_metrics(*encode_all(pair, data, collate), captions_per_image=data.captions_per_image))
