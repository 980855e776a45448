"""Why the relational objective collapses without warm-up, and which start prevents it: the study's trainings.

    python -m benchmarks.evidence.collapse --variants base plain zero ... --out collapse.csv

One line per training; what is in the file is skipped.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrem_layers import AssociationGraph, HREMLoss, InfoNCELoss, RelationInteraction, TripletLoss, FragmentRelation
from hrem_layers._core.numerics import cosine_matrix, l2_normalize
from hrem_layers.loss import HREMTerms, _positives

CACHE = Path("/work/evidence-cache")
PAIRS = {
    f"{s}-{r}": (lambda s=s, r=r: TripletLoss(negative_sampling=s, reduction=r))
    for s in ("distance_weighted", "hardest", "all", "expected")
    for r in ("sum", "mean")
} | {"infonce": lambda: InfoNCELoss()}


# ---------------------------------------------------------------- data
class Data:
    def __init__(self, images, words, mask, train, test):
        self.images, self.words, self.mask, self.train, self.test = images, words, mask, train, test


def icons() -> Data:
    path = CACHE / "icons_small.npz"
    if not path.exists():
        import sys

        sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
        import emoji_features

        raw = np.load(CACHE / "icons_raw.npy").astype(np.float32)
        meta = json.loads((CACHE / "icons.json").read_text())
        flat = raw.reshape(-1, raw.shape[-1])
        mean = flat.mean(0)
        cov = np.cov((flat[::5] - mean).T)
        w, e = np.linalg.eigh(cov)
        x = (flat - mean) @ e[:, -256:].astype(np.float32)
        x /= np.sqrt((x**2).mean())
        images = x.reshape(raw.shape[0], raw.shape[1], 256)
        caps = []
        rng = np.random.default_rng(0)
        for _, name, tags in meta:
            tags = [t for tag in tags for t in str(tag).replace("-", " ").split()]
            tags = [t for t in dict.fromkeys(tags) if t not in name]
            rng.shuffle(tags)
            caps.append(([n for n in name if n] + tags[:4])[:8])
        known, vec = emoji_features.word_vectors([w for c in caps for w in c])
        index = {w: i for i, w in enumerate(known)}
        words = np.zeros((len(caps), 8, vec.shape[1]), np.float32)
        mask = np.zeros((len(caps), 8), bool)
        for i, c in enumerate(caps):
            for j, w in enumerate(c):
                words[i, j] = vec[index[w]] * 2
                mask[i, j] = True
        stem = np.array([int(hashlib.sha256(m[1][0].encode()).hexdigest(), 16) % 100 for m in meta])
        np.savez(path, images=images, words=words, mask=mask, test=stem < 20)
    z = np.load(path)
    t = z["test"]
    test = np.flatnonzero(t)
    test = np.random.default_rng(0).permutation(test)[:1000]
    return Data(torch.tensor(z["images"]), torch.tensor(z["words"]), torch.tensor(z["mask"]),
                torch.tensor(np.flatnonzero(~t)), torch.tensor(test))


def synthetic(n=3000, concepts=200, regions=8, words=6, dim=128, noise=1.0) -> Data:
    """Topics: an image shows ``words`` of a topic's concepts and some clutter; the text names them. The two
    modalities have random vectors of their own for every concept."""
    g = torch.Generator().manual_seed(0)
    topics = 40
    topic_concepts = torch.stack([torch.randperm(concepts, generator=g)[:20] for _ in range(topics)])
    vi, vt = torch.randn(concepts, dim, generator=g), torch.randn(concepts, dim, generator=g)
    topic = torch.randint(topics, (n,), generator=g)
    pick = torch.stack([torch.randperm(20, generator=g)[:words] for _ in range(n)])
    chosen = topic_concepts[topic].gather(1, pick)
    clutter = torch.randint(concepts, (n, regions - words + 2), generator=g)
    shown = torch.cat([chosen[:, : words - 2], clutter], 1)
    images = vi[shown] + noise * torch.randn(n, regions, dim, generator=g)
    texts = vt[chosen] + 0.5 * torch.randn(n, words, dim, generator=g)
    length = torch.randint(3, words + 1, (n, 1), generator=g)
    mask = torch.arange(words) < length
    return Data(images, texts, mask, torch.arange(n - 1000), torch.arange(n - 1000, n))


DATA = {"icons": icons, "synthetic": synthetic}


class Encoder(nn.Module):
    def __init__(self, width, dim, head):
        super().__init__()
        self.linear = nn.Linear(width, dim)
        self.head = FragmentRelation(dim, num_heads=8) if head == "relation" else None

    def forward(self, x, mask=None):
        h = self.linear(x)
        if self.head is not None:
            return self.head(h, mask), h
        if mask is None:
            return h.mean(1), h
        m = mask.unsqueeze(-1)
        return (h * m).sum(1) / m.sum(1), h


# ---------------------------------------------------------------- variants
class Study(HREMLoss):
    """HREMLoss with the switches of the study."""

    opts: frozenset[str] = frozenset()
    chance = None
    running = None

    def _terms(self, batch, shares=None):
        o = self.opts
        v, u = batch.image_embedding, batch.text_embedding
        vr, ur = (v.detach(), u.detach()) if "detach_in" in o else (v, u)
        if "scale_in" in o:
            vr, ur = (0.1 * x + 0.9 * x.detach() for x in (vr, ur))
        graph = self.graph(vr, ur, *batch[2:6])
        if "center" in o:  # a constant vector cannot lower the loss
            ve, ue = (l2_normalize(x - x.mean(0)) for x in self.interaction(vr, ur, graph))
        elif "centerres" in o:
            ve, ue = (l2_normalize(x - x.mean(0)) for x in self.interaction(vr, ur, graph))
            ve, ue = (l2_normalize(x + y) for x, y in ((vr, ve), (ur, ue)))
        elif "skip" in o:  # v + gain·(what the transformer adds)
            nv, nu = self.interaction(vr, ur, graph)
            if not hasattr(self, "gain"):
                raise RuntimeError
            ve, ue = (l2_normalize(x + self.gain * l2_normalize(y)) for x, y in ((vr, nv), (ur, nu)))
        elif "skip1" in o:
            ve, ue = (l2_normalize(x + l2_normalize(y)) for x, y in zip((vr, ur), self.interaction(vr, ur, graph)))
        else:
            ve, ue = (l2_normalize(x) for x in self.interaction(vr, ur, graph))
        positives = _positives(batch.image_ids, v)

        def pair(x, y):
            return self.pair_loss(cosine_matrix(x, y), positives)

        base, enhanced = pair(v, u), pair(ve, ue)
        cv, cu = (v.detach(), u.detach()) if "detach_plain" in o else (v, u)
        ce = (ve.detach(), ue.detach()) if "detach_enh" in o else (ve, ue)
        c1, c2 = pair(ce[0], cu), pair(cv, ce[1])
        reg = self.graph.regularization(graph, v, u)
        terms = [enhanced, c1, c2]
        weights = [self.enhanced_weight, self.cross_weight, self.cross_weight]
        if "minbase" in o:
            weights = [w * (base / t.clamp(min=1e-12)).clamp(max=1).detach() for w, t in zip(weights, terms)]
        if "minbase2" in o:
            weights = [w * (base / t.clamp(min=1e-12)).clamp(max=1).square().detach() for w, t in zip(weights, terms)]
        relational = sum(w * t for w, t in zip(weights, terms)) + self.regularization_weight * reg
        if "auto" in o and self.training:
            # on from the call on at which the mean of the base is half of its first value
            if self.chance is None:
                self.chance, self.running = base.detach(), base.detach()
                self.on = False
            self.running = 0.9 * self.running + 0.1 * base.detach()
            self.on = self.on or bool(self.running < 0.5 * self.chance)
            if not self.on:
                relational = 0 * relational
        if "ramp" in o and self.training:
            self.count = getattr(self, "count", 0) + 1
            relational = relational * min(1.0, self.count / 100)
        self.seen = (v, u, ve, ue)
        return HREMTerms(base + relational, base, enhanced, c1, c2, reg)


class PreNorm(nn.Module):
    """Layer without norms on the residual: x + attention(norm(x)), x + ffn(norm(x))."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, bias=None, context=None):
        la = self.layer
        h = la.norm1(x)
        x = x + la.dropout(la.self_attn(h, h, bias))
        return x + la.dropout(la.linear2(la.dropout(F.relu(la.linear1(la.norm2(x))))))


def make_loss(variant: str, dim: int, pair) -> nn.Module:
    o = frozenset(variant.split("+"))
    dropout = 0.0 if "nodrop" in o else 0.1
    inter = RelationInteraction(dim, dropout=dropout)
    ws = dict(enhanced_weight=1.0, cross_weight=1.0, regularization_weight=10.0)
    if "nocross" in o:
        ws["cross_weight"] = 0.0
    if "noenh" in o:
        ws["enhanced_weight"] = 0.0
    if "noreg" in o:
        ws["regularization_weight"] = 0.0
    for name in o:
        if name.startswith("w="):
            ws["enhanced_weight"] = ws["cross_weight"] = float(name[2:])
    loss = Study(dim, graph=AssociationGraph(alignment="cosine"), interaction=inter, pair_loss=pair, **ws)
    loss.opts = o
    if "skip" in o:
        loss.gain = nn.Parameter(torch.tensor(0.1))
    with torch.no_grad():
        for la in inter.layers:
            if "zero" in o:
                la.self_attn.out_proj.weight.zero_()
                la.linear2.weight.zero_()
                la.linear2.bias.zero_()
            if "zeroffn" in o:
                la.linear2.weight.zero_()
                la.linear2.bias.zero_()
            if "smallw" in o:
                for p in (la.self_attn.out_proj.weight, la.linear2.weight, la.linear2.bias):
                    p.mul_(0.1)
            if "nobias" in o:  # no constant vector can be learned
                for p in (la.linear2.bias, la.norm2.bias, la.norm1.bias, la.self_attn.out_proj.bias):
                    p.zero_()
                    p.requires_grad_(False)
            if "affinefree" in o:
                for nm in (la.norm1, la.norm2):
                    nm.weight.requires_grad_(False)
                    nm.bias.requires_grad_(False)
    if "prenorm" in o:
        inter.layers = nn.ModuleList(PreNorm(la) for la in inter.layers)
    return loss


# ---------------------------------------------------------------- one training
def recall(v: Tensor, u: Tensor, fold: int = 200) -> float:
    """rSum, the mean of folds of 200 (a gallery of 1,000 leaves too little to lose)."""
    totals = []
    for x, y in zip(l2_normalize(v).split(fold), l2_normalize(u).split(fold)):
        s = x @ y.T
        d = s.diagonal()
        # ties count against
        places = [(m >= d.unsqueeze(1)).sum(1) for m in (s, s.T)]
        totals.append(sum(100 * (place <= k).float().mean().item() for place in places for k in (1, 5, 10)))
    return float(np.mean(totals))


def run(data: Data, *, variant, pair, lr, clip, seed, steps, batch, dim, head, trace=None):
    torch.manual_seed(seed)
    img, txt = Encoder(data.images.shape[-1], dim, head), Encoder(data.words.shape[-1], dim, head)
    pl = PAIRS[pair]()
    hrem = None if variant == "base" else make_loss(variant, dim, pl)
    enc = [*img.parameters(), *txt.parameters()]
    rel = [] if hrem is None else [p for p in hrem.parameters() if p.requires_grad]
    rel_lr = lr * (0.1 if "lr10" in variant.split("+") else 1)
    opt = torch.optim.AdamW([{"params": enc, "lr": lr}, {"params": rel, "lr": rel_lr}], weight_decay=1e-4)
    g = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < batch:
            order = data.train[torch.randperm(len(data.train), generator=g)]
        i, order = order[:batch], order[batch:]
        v, r = img(data.images[i])
        u, w = txt(data.words[i], data.mask[i])
        if hrem is None:
            n = l2_normalize(v), l2_normalize(u)
            total = pl(n[0] @ n[1].T, torch.eye(batch, dtype=torch.bool))
        else:
            t = hrem.terms(v, u, r, w, None, data.mask[i])
            total = t.total
            if trace is not None and (step < 10 or step % 10 == 0):
                trace.append(diagnose(step, t, hrem, (v, u)))
        opt.zero_grad()
        total.backward()
        if clip:
            nn.utils.clip_grad_norm_([*enc, *rel], clip)
        opt.step()
    img.eval(), txt.eval()
    with torch.no_grad():
        result = recall(img(data.images[data.test])[0], txt(data.words[data.test], data.mask[data.test])[0])
    last = (float("nan"),) * 2
    if hrem is not None:
        ve = hrem.seen[2].detach()
        n = len(ve)
        last = (t.enhanced.item(), ((ve @ ve.T).sum().item() - n) / (n * (n - 1)))
    return result, last


def diagnose(step, t, hrem, plain):
    def spread(x):
        x = x.detach()
        n = len(x)
        return ((x @ x.T).sum().item() - n) / (n * (n - 1))

    row = {"step": step, **{k: x.item() for k, x in t._asdict().items()}}
    row |= {f"cos_{k}": spread(x) for k, x in zip(("v", "u", "ve", "ue"), hrem.seen)}
    for k in ("base", "enhanced", "cross_image", "cross_text"):
        gr = torch.autograd.grad(getattr(t, k), plain, retain_graph=True, allow_unused=True)
        row[f"grad_{k}"] = sum(0.0 if x is None else x.norm().item() ** 2 for x in gr) ** 0.5
    return row


FIELDS = ["data", "variant", "pair", "lr", "clip", "seed", "steps", "batch", "dim", "head", "rsum", "enhanced", "cos", "seconds"]


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--data", nargs="+", default=["icons", "synthetic"])
    p.add_argument("--variants", nargs="+", default=["base", "plain"])
    p.add_argument("--pairs", nargs="+", default=list(PAIRS))
    p.add_argument("--lrs", nargs="+", type=float, default=[1e-3, 4e-3, 1.6e-2])
    p.add_argument("--clips", nargs="+", type=float, default=[0.0])
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--heads", nargs="+", default=["mean"])
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--dim", type=int, default=128)
    p.add_argument("--out", type=Path, default=CACHE / "collapse.csv")
    a = p.parse_args()
    torch.set_num_threads(1)
    done = set()
    if a.out.exists():
        with a.out.open() as f:
            done = {tuple(r[k] for k in FIELDS[:10]) for r in csv.DictReader(f)}
    else:
        a.out.write_text(",".join(FIELDS) + "\n")
    loaded = {d: DATA[d]() for d in a.data}
    for seed, variant, d, head, clip, pair, lr in itertools.product(
        a.seeds, a.variants, a.data, a.heads, a.clips, a.pairs, a.lrs
    ):
        key = (d, variant, pair, f"{lr:g}", f"{clip:g}", str(seed), str(a.steps), str(a.batch), str(a.dim), head)
        if key in done:
            continue
        start = time.process_time()
        rsum, last = run(loaded[d], variant=variant, pair=pair, lr=lr, clip=clip, seed=seed, steps=a.steps,
                         batch=a.batch, dim=a.dim, head=head)
        row = [*key, f"{rsum:.2f}", f"{last[0]:.3f}", f"{last[1]:.3f}", f"{time.process_time() - start:.1f}"]
        with a.out.open("a") as f:
            f.write(",".join(row) + "\n")


if __name__ == "__main__":
    main()
