"""Wrong (and unusual but right) values for every kind of argument, and the calls that they are given to.

A value is an ``(expectation, value)``: ``"error"`` (nothing right can come of it), ``"same"`` (it means what the good
one means), ``"nan"`` (a NaN or infinity is in it, and must be in the result or refused), ``"any"`` (an error or a
result).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

import hrem_layers as h
from hrem_layers import losses

N, R, W, D = 4, 5, 6, 16
Value = tuple[str, object]


class Target(NamedTuple):
    name: str
    call: Callable[..., object]
    good: Callable[[], dict[str, Any]]
    kinds: dict[str, str]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def batch() -> dict[str, Any]:
    return {
        "image_embedding": drawn(N, D), "text_embedding": drawn(N, D), "image_fragments": drawn(N, R, D),
        "text_fragments": drawn(N, W, D), "image_mask": torch.arange(R) < torch.tensor([[5], [4], [3], [5]]),
        "text_mask": torch.arange(W) < torch.tensor([[6], [2], [3], [4]]),
    }  # fmt: skip


def embeddings() -> dict[str, Any]:
    return {name: x for name, x in batch().items() if name.endswith("embedding")}


def some_graph() -> h.RelationGraph:
    return h.RelationGraph(torch.ones(2 * N, 2 * N, dtype=torch.bool), drawn(2 * N, 2 * N))


def pairs() -> dict[str, Any]:
    return {"similarity": drawn(N, N).tanh(), "positives": torch.eye(N, dtype=torch.bool)}


def features() -> dict[str, Any]:
    return {"image_features": drawn(12, D), "num_clusters": 3, "clusters_per_batch": 2, "images_per_cluster": 2,
            "captions_per_image": 1, "num_replicas": 1, "rank": 0}  # fmt: skip


def retrieved() -> dict[str, Any]:
    return {"image_embedding": drawn(6, D), "text_embedding": drawn(12, D), "captions_per_image": 2, "folds": None}


def embeddings_of(n: int, m: int) -> dict[str, Any]:
    return {"image_embedding": drawn(n, D), "text_embedding": drawn(m, D)}


TENSORS = dict.fromkeys(("image_embedding", "text_embedding", "image_fragments", "text_fragments", "similarity"), "x")
MASKS = dict.fromkeys(("image_mask", "text_mask", "positives"), "mask")
INDICES = dict.fromkeys(("image_ids", "image_index", "text_ids"), "index")
CALLED = {**TENSORS, **MASKS, **INDICES, "cosines": "object", "exchange": "skip"}
SPECIAL = {
    "layer": "callable", "negative_sampling": "callable choice", "alignment": "callable choice", "log_scale": "object",
    "graph": "object", "interaction": "object", "pair_loss": "callable", "enhanced_pair_loss": "callable",
    "cross_pair_loss": "callable", "temperature": "number", "scale": "number", "noise": "x",
}  # fmt: skip


def kinds_of(call: Callable[..., object], known: dict[str, str]) -> dict[str, str]:
    """By name, or by annotation."""
    by_annotation = {"int": "int", "int | None": "int", "float": "number", "bool": "flag", "str": "choice"}
    found = {}
    for name, parameter in inspect.signature(call).parameters.items():
        annotation = str(parameter.annotation)
        kind = known.get(name) or SPECIAL.get(name) or by_annotation.get(annotation)
        if annotation.startswith("float |"):
            kind = "number"
        if kind not in (None, "skip"):
            found[name] = kind
    return found


def made(cls: type, **good: Any) -> Target:
    return Target(cls.__name__, cls, lambda: dict(good), kinds_of(cls, {}))


def targets() -> Iterator[Target]:
    """Every public name that takes arguments."""
    yield made(h.FragmentRelation, embed_dim=D, num_heads=4)
    yield made(h.TransformerLayer, embed_dim=D, num_heads=4)
    yield made(h.AssociationGraph)
    yield made(h.RelationInteraction, embed_dim=D, num_heads=4)
    yield made(h.HREMLoss, embed_dim=D)
    for cls in (h.TripletLoss, h.InfoNCELoss, h.SigmoidLoss):
        yield made(cls)

    def called(name: str, module: Callable[[], Any], good: Callable[[], dict[str, Any]], known: dict[str, str],
               method: str = "forward") -> Target:  # fmt: skip
        def call(**given: Any) -> object:
            torch.manual_seed(0)
            thing = module()
            return (thing if method == "forward" else getattr(thing, method))(**given)

        return Target(name, call, good, kinds_of(getattr(module(), method), known))

    yield called(
        "FragmentRelation()",
        lambda: h.FragmentRelation(D, num_heads=4, dropout=0),
        lambda: {"fragments": drawn(N, R, D), "mask": batch()["image_mask"]},
        {"fragments": "x", "mask": "mask"},
    )
    yield called(
        "TransformerLayer()",
        lambda: h.TransformerLayer(D, num_heads=4),
        lambda: {"x": drawn(N, R, D)},
        {"x": "any x", "bias": "object", "context": "object"},
    )
    yield called("AssociationGraph()", lambda: h.AssociationGraph(topk=3), batch, CALLED)
    yield called("AssociationGraph(candidates)()", lambda: h.AssociationGraph(topk=3, candidates=2), batch, CALLED)
    yield called(
        "AssociationGraph().regularization",
        lambda: h.AssociationGraph(topk=3),
        lambda: {"graph": some_graph(), **embeddings()},
        CALLED,
        "regularization",
    )
    for mechanism in ("fusion", "standalone"):
        yield called(
            f"RelationInteraction({mechanism})()",
            lambda mechanism=mechanism: h.RelationInteraction(D, num_heads=4, dropout=0, mechanism=mechanism),
            lambda: {**embeddings(), "graph": some_graph()},
            CALLED,
        )
    for method in ("forward", "relate"):
        yield called(
            f"HREMLoss().{method}",
            lambda: h.HREMLoss(D, pair_loss=h.TripletLoss(negative_sampling="hardest")),
            batch,
            CALLED,
            method,
        )
    yield called("HREMLoss(candidates)()", loss_with_candidates, batch, CALLED)
    for cls in (h.TripletLoss, h.InfoNCELoss, h.SigmoidLoss):
        good = {"noise": drawn(2 * N).sigmoid()} if cls is h.TripletLoss else {}
        yield called(f"{cls.__name__}()", cls, lambda good=good: {**pairs(), **good}, CALLED)
    for name in losses.__all__:
        function = getattr(losses, name)
        if not isinstance(function, type):
            noise = {
                "triplet_loss": (2 * N,),
                "streamed_triplet_loss": (2 * N,),
                "distance_weighted_negative": (N, 1),
            }.get(name)
            given = embeddings if name.startswith("streamed_") else pairs
            good = (lambda given=given, noise=noise: {**given(), "noise": drawn(*noise).sigmoid()}) if noise else given

            def seeded(function: Callable[..., object] = function, **given: Any) -> object:
                torch.manual_seed(0)
                return function(**given)

            yield Target(name, seeded, good, kinds_of(function, CALLED))
    yield Target(
        "align_fragments",
        h.align_fragments,
        lambda: {**{k: x for k, x in batch().items() if "embedding" not in k}, "topk": 3},
        kinds_of(h.align_fragments, CALLED),
    )
    yield Target("pair_cosines", h.pair_cosines, embeddings, {"image_embedding": "any x", "text_embedding": "any x"})
    ways = {"image_ids": "object", "text_ids": "object", "captions_per_image": "object", "folds": "int"}
    by_ids = {"image_ids": list(range(6)), "text_ids": [i // 2 for i in range(12)]}
    yield Target(
        "retrieval_metrics by ids",
        h.retrieval_metrics,
        lambda: {**embeddings_of(6, 12), **by_ids},
        {"image_ids": "object", "text_ids": "object"},
    )
    yield Target(
        "retrieval_metrics",
        h.retrieval_metrics,
        retrieved,
        {**kinds_of(h.retrieval_metrics, {**TENSORS, **ways}), "image_embedding": "data", "text_embedding": "data"},
    )
    yield Target(
        "retrieval_metrics_from_similarity",
        h.retrieval_metrics_from_similarity,
        lambda: {"similarity": drawn(6, 12), "captions_per_image": 2},
        {**kinds_of(h.retrieval_metrics_from_similarity, {**TENSORS, **ways}), "similarity": "ordered data"},
    )
    yield Target(
        "NeighborBatchSampler",
        lambda **given: list(h.NeighborBatchSampler(**given)),
        features,
        {
            **kinds_of(h.NeighborBatchSampler, {}),
            "image_features": "data",
            "captions_per_image": "object",
            "cluster_ids": "object",
        },
    )
    yield Target(
        "RelationGraph.block", lambda name: some_graph().block(name), lambda: {"name": "i2t"}, {"name": "choice"}
    )
    yield Target(
        "RelationGraph.attention_bias",
        lambda **o: some_graph().attention_bias(**o),
        lambda: {"relation_weight": 2.0},
        {"relation_weight": "number"},
    )


def loss_with_candidates() -> h.HREMLoss:
    return h.HREMLoss(D, graph=h.AssociationGraph(topk=3, candidates=2), pair_loss=h.InfoNCELoss())


class Wrong:
    """Nothing that anything takes."""


def values(kind: str, good: object) -> Iterator[tuple[str, str, object]]:
    """(what it is, expectation, value)."""
    junk = [("a class", Wrong), ("an object", Wrong()), ("bytes", b"x"), ("a dict", {}), ("a module", torch),
            ("complex", 1j), ("a lambda", lambda *_, **__: None), ("Ellipsis", ...)]  # fmt: skip
    for name, value in junk:
        if not (name == "a lambda" and "callable" in kind):
            yield name, "error", value
    if kind == "ordered data":  # in an order an infinity has its place
        yield from ((name, "any" if "inf" in name else e, value) for name, e, value in data(kind, good))
        return
    if kind == "any x":  # of any number of rows
        free = ("a row more", "no rows", "a dimension less")
        yield from ((name, "any" if name in free else e, value) for name, e, value in tensors(kind, good))
        return
    yield from {"x": tensors, "data": data, "mask": masks, "index": indices}.get(kind, plain)(kind, good)


def tensors(kind: str, x: Any) -> Iterator[tuple[str, str, object]]:
    yield "a list", "error", x.tolist()
    yield "an array", "error", x.numpy()
    yield from layouts(x)
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.uint8):
        yield str(dtype), "error", (x * 4).to(dtype)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        yield str(dtype), "any", x.to(dtype)
    yield "a row more", "error", torch.cat([x, x[:1]])
    yield "a row less", "any", x[:-1]
    yield "a dimension more", "error", x.unsqueeze(-1)
    yield "a dimension less", "error", x[0]
    yield "no dimension", "error", x.sum()
    yield "no rows", "error", x[:0]
    yield "no columns", "any" if x.dim() == 1 else "error", x[..., :0]
    yield "one column", "any", x[..., :1]
    for name, value in (("NaN", torch.nan), ("inf", torch.inf), ("-inf", -torch.inf)):
        bad = x.clone()
        bad.view(-1)[0] = value
        yield name, "nan", bad
        yield f"all {name}", "nan", torch.full_like(x, value)
    yield "huge", "any", x * 1e19
    yield "tiny", "any", x * 1e-20
    yield "zeros", "any", torch.zeros_like(x)
    yield "not contiguous", "same", x.t().contiguous().t() if x.dim() == 2 else x
    yield "a parameter", "same", torch.nn.Parameter(x)


def layouts(x: torch.Tensor) -> Iterator[tuple[str, str, object]]:
    yield "sparse", "error", x.to_sparse()
    if x.dim() == 2 and x.dtype != torch.bool:
        yield "sparse csr", "error", x.to_sparse_csr()
    yield "meta", "error", x.to("meta")
    yield "nested", "error", torch.nested.nested_tensor([x, x])
    if x.is_floating_point():
        yield "mkldnn", "error", x.contiguous().to_mkldnn()
        yield "quantized", "error", torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            yield str(dtype), "error", x.to(dtype)


def data(kind: str, x: Any) -> Iterator[tuple[str, str, object]]:
    for name, expectation, value in tensors(kind, x):
        if name == "an array":
            expectation = "same"
        if name in ("a row more", "no columns", "torch.uint8", "torch.int64"):
            expectation = "any"
        yield name, expectation, value
    a = x.numpy()
    for name, expectation, value in (
        ("float64 array", "any", a.astype(np.float64)), ("big-endian", "same", a.astype(">f4")),
        ("Fortran order", "same", np.asfortranarray(a)), ("read-only", "same", a.copy()),
        ("object array", "error", a.astype(object)), ("str array", "error", a.astype(str)),
        ("a masked array", "any", np.ma.masked_array(a, a > 9)), ("long double", "any", a.astype(np.longdouble)),
        ("structured", "error", np.zeros(4, dtype=[("a", "f4")])), ("a path", "error", "features.npy"),
    ):  # fmt: skip
        yield name, expectation, value


def masks(kind: str, x: Any) -> Iterator[tuple[str, str, object]]:
    x = torch.eye(N, dtype=torch.bool) if x is None else x
    yield "a list", "error", x.tolist()
    yield "an array", "error", x.numpy()
    yield from layouts(x)
    for dtype in (torch.float32, torch.int64, torch.uint8, torch.complex64):
        yield str(dtype), "error", x.to(dtype)
    yield "True", "error", True
    yield "a row more", "error", torch.cat([x, x[:1]])
    yield "a column less", "error", x[:, :-1]
    yield "transposed twice", "same", x.t().contiguous().t()
    yield "one dimension", "error", x[0]
    yield "no rows", "error", x[:0]
    yield "all False", "any", torch.zeros_like(x)


def indices(kind: str, x: Any) -> Iterator[tuple[str, str, object]]:
    x = torch.arange(N)
    yield "a list", "error", x.tolist()
    yield "an array", "error", x.numpy()
    yield "sparse", "error", x.to_sparse()
    yield "meta", "error", x.to("meta")
    for dtype in (torch.float32, torch.bool, torch.complex64):
        yield str(dtype), "error", x.to(dtype)
    yield "torch.int32", "same", x.to(torch.int32)
    for dtype in (torch.uint8, torch.int16):
        yield str(dtype), "any", x.to(dtype)
    yield "one more", "error", torch.arange(N + 1)
    yield "two dimensions", "error", x.unsqueeze(1)
    yield "no dimension", "error", x[0]
    yield "negative", "any", x - 1
    yield "huge", "any", x + 2**62


def plain(kind: str, x: Any) -> Iterator[tuple[str, str, object]]:
    """Numbers, counts, flags, choices, callables and others."""
    yield "nested list", "error", [[[1]], []]
    yield "a sparse tensor", "error", torch.eye(3).to_sparse()
    yield "a tensor of strings' shape", "error", torch.zeros(2, 0)
    if kind in ("number", "int"):
        for name, value in (("NaN", np.nan), ("inf", np.inf), ("-inf", -np.inf), ("a str", "1"), ("True", True),
                            ("10**400", 10**400), ("-10**400", -(10**400)), ("an array", np.ones(3)), ("a list", [1]),
                            ("numpy NaN", np.float32("nan")), ("numpy True", np.bool_(True)),
                            ("a matrix", torch.ones(2, 2))):  # fmt: skip
            yield name, "error", value
        for name, value in (("2**63", 2**63), ("-1", -1), ("0", 0), ("1e-300", 1e-300), ("1e300", 1e300),
                            ("np.float64", np.float64(0.5)), ("np.int16", np.int16(4)), ("a scalar array", np.array(2)),
                            ("a scalar tensor", torch.tensor(0.5))):  # fmt: skip
            yield name, "any", value
        if kind == "int" and isinstance(x, int):
            yield "np.int64 of the same", "same", np.int64(x)
            yield "np.uint8 of the same", "same", np.uint8(x)
            yield "a float of the same", "error", float(x)
        elif isinstance(x, float):
            yield "np.float64 of the same", "same", np.float64(x)
    elif kind == "flag":
        for name, value in (("1", 1), ("0", 0), ("a str", "False"), ("None", None), ("an array", np.array([True])),
                            ("a tensor", torch.tensor([True])), ("a list", [])):  # fmt: skip
            yield name, "error", value
        yield "np.bool_", "any", np.bool_(True)
    elif "choice" in kind:
        for name, value in (("a wrong str", "Nonsense"), ("empty", ""), ("None", None), ("3", 3), ("NaN", np.nan),
                            ("an array", np.array(["mean", "sum"])), ("a list", ["sum"]), ("a set", {"sum"}),
                            ("a tensor", torch.ones(2)), ("bytes", b"sum")):  # fmt: skip
            yield name, "error", value
        if isinstance(x, str):
            yield "np.str_ of the same", "same", np.str_(x)
    elif kind == "object":
        for name, value in (("a str", "x"), ("3.5", 3.5), ("a list of str", ["a"]), ("NaN", np.nan), ("-3", -3),
                            ("a set", {1.5}), ("an array of objects", np.array([None, 1], dtype=object)),
                            ("a half tensor", torch.ones(2).half()), ("a list of NaN", [np.nan] * N),
                            ("meta", torch.ones(N, device="meta")), ("2**70", 2**70),
                            ("[2**70]", [2**70] * 6)):  # fmt: skip
            yield name, "error", value
    if "callable" in kind or kind == "callable":
        yield "a str", "error", "x"
        yield "3", "error", 3
        yield "a tensor", "error", torch.ones(3)
        yield "a callable class", "error", dict
