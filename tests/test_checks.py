"""What the caller gets wrong is told: the argument, what was expected, what came."""

from __future__ import annotations

import math
import re

import pytest
import torch
from support import batch, graph_inputs

from hrem_layers import (
    AssociationGraph,
    FragmentRelation,
    HREMLoss,
    InfoNCELoss,
    RelationGraph,
    RelationInteraction,
    TripletLoss,
    align_fragments,
)
from hrem_layers._core.checks import (
    check_bool,
    check_bool_tensor,
    check_choice,
    check_int,
    check_number,
    check_tensor,
)
from hrem_layers._core.transformer import BiasedAttention, TransformerLayer

N, R, W, D = 4, 3, 5, 16


def good():
    return batch(n=N, r=R, w=W, dim=D)


def fragment_relation(**options):
    return FragmentRelation(**{"embed_dim": D, **options})


def association_graph(**options):
    return AssociationGraph(**options)


def relation_interaction(**options):
    return RelationInteraction(**{"embed_dim": D, **options})


def hrem_loss(**options):
    return HREMLoss(**{"embed_dim": D, **options})


def relate(**change):
    b = {"fragments": good()["image_fragments"], "mask": good()["image_mask"], **change}
    return FragmentRelation(D)(**b)


def align(**change):
    b = {name: x for name, x in good().items() if name.endswith(("fragments", "mask"))}
    return align_fragments(**{**b, **change})


def build_graph(**change):
    return AssociationGraph()(**{**graph_inputs(n=N, r=R, w=W, dim=D), **change})


def some_graph(n=N):
    return RelationGraph(torch.ones(2 * n, 2 * n, dtype=torch.bool), torch.zeros(2 * n, 2 * n))


def regularize(**change):
    embeddings = {name: x for name, x in good().items() if name.endswith("embedding")}
    return AssociationGraph().regularization(**{"graph": some_graph(), **embeddings, **change})


def interact(**change):
    embeddings = {name: x for name, x in good().items() if name.endswith("embedding")}
    return RelationInteraction(D)(**{**embeddings, "graph": some_graph(), **change})


def lose(**change):
    return HREMLoss(D)(**{**good(), **change})


def triplet_call(**change):
    return TripletLoss()(**{"similarity": torch.zeros(N, N), "positives": torch.eye(N, dtype=torch.bool), **change})


def infonce_call(**change):
    return InfoNCELoss()(**{"similarity": torch.zeros(N, N), "positives": torch.eye(N, dtype=torch.bool), **change})


def options(make, *cases):
    """Cases (name, value, error, what was expected): the message must also hold the name and what came."""
    return [(make, {name: value}, error, name, expected, repr(value)) for name, value, error, expected in cases]


def counts(make, *names, minimum=1):
    return [
        case
        for name in names
        for case in options(
            make,
            (name, minimum - 1, ValueError, f"at least {minimum}"),
            (name, -3, ValueError, f"at least {minimum}"),
            (name, 2.0, TypeError, "int"),
            (name, "4", TypeError, "int"),
            (name, True, TypeError, "int"),
        )
    ]


def numbers(make, name, *outside):
    """Values outside the range, and what no number may be."""
    return options(
        make,
        *((name, value, ValueError, expected) for value, expected in outside),
        (name, math.nan, ValueError, "finite"),
        (name, math.inf, ValueError, "finite"),
        (name, "0.5", TypeError, "number"),
        (name, None, TypeError, "number"),
        (name, True, TypeError, "number"),
    )


def choices(make, name, *known):
    return [
        (make, {name: value}, ValueError, name, repr(choice), repr(value))
        for value in ("Nonsense", None, 3)
        for choice in known
    ]


def flags(make, *names):
    return [case for name in names for v in (1, None, "yes") for case in options(make, (name, v, TypeError, "True"))]


DROPOUT = ((-0.1, "at least 0"), (1.0, "less than 1"), (1, "less than 1"))
TRIPLET = ("distance_weighted", "hardest", "all", "expected")

CONSTRUCTORS = [
    *counts(fragment_relation, "embed_dim", "num_heads", "num_layers", "max_pool_k"),
    *(case for case in counts(fragment_relation, "ffn_dim")),
    *numbers(fragment_relation, "dropout", *DROPOUT),
    *numbers(fragment_relation, "beta", (-0.01, "at least 0"), (1.01, "at most 1")),
    (fragment_relation, {"num_heads": 5}, ValueError, "embed_dim", "multiple of num_heads", "16 and 5"),
    *counts(association_graph, "topk", "chunk_size"),
    *numbers(association_graph, "neighbor_ratio", (0, "greater than 0"), (-0.5, "greater than 0"), (1.5, "at most 1")),
    *numbers(association_graph, "sigma", (0.0, "greater than 0"), (-1, "greater than 0")),
    *flags(association_graph, "squared_distance", "detach_fragments"),
    *choices(association_graph, "alignment", "scan", "cosine", "dot"),
    *counts(relation_interaction, "embed_dim", "num_heads", "num_layers"),
    *counts(relation_interaction, "ffn_dim"),
    *numbers(relation_interaction, "dropout", *DROPOUT),
    *numbers(relation_interaction, "relation_weight"),
    *choices(relation_interaction, "mechanism", "fusion", "standalone"),
    (relation_interaction, {"num_heads": 3}, ValueError, "embed_dim", "multiple of num_heads", "16 and 3"),
    *counts(hrem_loss, "embed_dim"),
    *counts(hrem_loss, "warmup_steps", minimum=0),
    *(c for name in ("enhanced_weight", "cross_weight", "regularization_weight")
      for c in numbers(hrem_loss, name, (-0.5, "at least 0"))),
    *flags(hrem_loss, "gather_distributed"),
    (hrem_loss, {"graph": 3}, TypeError, "graph", "torch.nn.Module", "int"),
    (hrem_loss, {"graph": AssociationGraph}, TypeError, "graph", "torch.nn.Module", "type"),
    (build_graph, {"exchange": None}, TypeError, "exchange", "ALONE", "NoneType"),
    (hrem_loss, {"graph": torch.nn.Identity()}, TypeError, "graph", "method regularization", "Identity"),
    (hrem_loss, {"interaction": RelationInteraction(32)}, ValueError, "interaction", "embed_dim 16", "32"),
    (hrem_loss, {"interaction": "fusion"}, TypeError, "interaction", "torch.nn.Module", "str"),
    (hrem_loss, {"pair_loss": "triplet"}, TypeError, "pair_loss", "callable (similarity, positives)", "str"),
    (hrem_loss, {"pair_loss": TripletLoss}, TypeError, "pair_loss", "callable", "the class TripletLoss"),
    *numbers(TripletLoss, "margin", (-0.1, "at least 0")),
    *choices(TripletLoss, "negative_sampling", *TRIPLET),
    *numbers(TripletLoss, "cutoff", (0, "greater than 0"), (2.0, "less than 2")),
    *numbers(TripletLoss, "nonzero_cutoff", (0.5, "greater than 0.5"), (2.5, "at most 2")),
    *counts(TripletLoss, "weight_dim", minimum=2),
    *choices(TripletLoss, "reduction", "sum", "mean"),
    *numbers(InfoNCELoss, "temperature", (0, "greater than 0"), (-1.0, "greater than 0")),
    *flags(InfoNCELoss, "learnable"),
    *choices(InfoNCELoss, "reduction", "sum", "mean"),
    *numbers(lambda **o: InfoNCELoss(**o, learnable=True), "temperature", (0.009, "at least 0.01")),
    *counts(align, "topk", "chunk_size"),
    *choices(align, "mode", "scan", "cosine", "dot"),
]  # fmt: skip


def tensors(call, name, shape, expected, *, also=()):
    """What any floating-point tensor argument may come as; ``also``: further wrong shapes."""
    cases = [
        (call, {name: [[1.0]]}, TypeError, name, expected, "list"),
        (call, {name: None}, TypeError, name, "tensor", "NoneType"),
        (call, {name: torch.zeros(shape, dtype=torch.long)}, TypeError, name, "floating-point", "torch.int64"),
        (call, {name: torch.zeros(shape, dtype=torch.bool)}, TypeError, name, "floating-point", "torch.bool"),
        (call, {name: torch.zeros(shape, dtype=torch.complex64)}, TypeError, name, "floating-point", "torch.complex64"),
    ]
    for wrong in ((*shape, 1), shape[1:], *also):
        cases.append((call, {name: torch.zeros(wrong)}, ValueError, name, expected, f"shape {wrong}"))
    return cases


def masks(call, name, shape, *, optional=True):
    expected = str(shape)
    cases = [
        (call, {name: torch.ones(shape)}, TypeError, name, "bool tensor (True = real)", "torch.float32"),
        (call, {name: torch.ones(shape, dtype=torch.uint8)}, TypeError, name, "bool tensor", "torch.uint8"),
        (call, {name: [True]}, TypeError, name, expected, "list"),
    ]
    for wrong in ((shape[0], shape[1] + 1), (shape[0] + 1, shape[1]), shape[:1], (*shape, 1)):
        bad = torch.ones(wrong, dtype=torch.bool)
        cases.append((call, {name: bad}, ValueError, name, expected, f"shape {wrong}"))
    return cases if optional else [*cases, (call, {name: None}, TypeError, name, expected, "NoneType")]


def elsewhere(call, name, shape, dtype=torch.float32):
    return [(call, {name: torch.zeros(shape, dtype=dtype, device="meta")}, ValueError, name, "on cpu", "meta")]


def everything_of_the_graph(call):
    return [
        *(case for name in ("image_fragments", "text_fragments")
          for case in tensors(call, name, (N, 2, D), f"({N}, ", also=((N + 1, 2, D),))),
        *masks(call, "image_mask", (N, R)),
        *masks(call, "text_mask", (N, W)),
        (call, {"text_fragments": torch.zeros(N, W, D + 1)}, ValueError,
         "text_fragments", f"({N}, W, {D})", f"{D + 1})"),
        (call, {"image_fragments": torch.zeros(N, 0, D), "image_mask": None}, ValueError,
         "image_fragments", "at least 1", "0"),
        (call, {"text_fragments": torch.zeros(N, 0, D), "text_mask": None}, ValueError,
         "text_fragments", "at least 1", "0"),
        *elsewhere(call, "image_fragments", (N, R, D)),
        *elsewhere(call, "text_fragments", (N, W, D)),
        *elsewhere(call, "image_mask", (N, R), torch.bool),
        *elsewhere(call, "text_mask", (N, W), torch.bool),
    ]  # fmt: skip


def embeddings(call, dim):
    return [
        *tensors(call, "image_embedding", (N, D), f"(N, {dim})"),
        *tensors(call, "text_embedding", (N, D), f"({N}, {D})", also=((N + 1, D), (N, D + 1))),
        *elsewhere(call, "text_embedding", (N, D)),
    ]


WRONG = torch.ones(6, 6, dtype=torch.bool)
CALLS = [
    *tensors(relate, "fragments", (N, R, D), f"(N, R, {D})", also=((N, R, D + 1),)),
    (relate, {"fragments": torch.zeros(N, 0, D), "mask": None}, ValueError, "fragments", "at least 1", "(4, 0, 16)"),
    *masks(relate, "mask", (N, R)),
    *elsewhere(relate, "mask", (N, R), torch.bool),
    *tensors(align, "image_fragments", (N, R, D), "(I, R, D)"),
    *tensors(align, "text_fragments", (N, W, D), f"(T, W, {D})", also=((N, W, D + 1),)),
    *masks(align, "image_mask", (N, R)),
    *masks(align, "text_mask", (N, W)),
    *elsewhere(align, "text_fragments", (N, W, D)),
    *elsewhere(align, "image_mask", (N, R), torch.bool),
    *elsewhere(align, "text_mask", (N, W), torch.bool),
    (align, {"image_fragments": torch.zeros(N, 0, D), "image_mask": None}, ValueError,
     "image_fragments", "at least 1", "0"),
    (align, {"text_fragments": torch.zeros(N, 0, D), "text_mask": None}, ValueError,
     "text_fragments", "at least 1", "0"),
    *embeddings(build_graph, "D"),
    *everything_of_the_graph(build_graph),
    (build_graph, {n: torch.zeros(0, *s) for n, s in (("image_embedding", (D,)), ("text_embedding", (D,)),
     ("image_fragments", (R, D)), ("text_fragments", (W, D)))} | {"image_mask": None, "text_mask": None},
     ValueError, "image_embedding", "at least 1", "empty"),
    *embeddings(regularize, "D"),
    (regularize, {"graph": "graph"}, TypeError, "graph", "RelationGraph", "str"),
    (regularize, {"graph": some_graph(3)}, ValueError, "graph.connection", "(8, 8)", "(6, 6)"),
    *embeddings(interact, D),
    (interact, {"image_embedding": torch.zeros(N, 8)}, ValueError, "image_embedding", "(N, 16)", "(4, 8)"),
    (interact, {"graph": None}, TypeError, "graph", "RelationGraph", "NoneType"),
    (interact, {"graph": tuple(some_graph())}, TypeError, "graph", "RelationGraph", "tuple"),
    (interact, {"graph": some_graph(3)}, ValueError, "graph.connection", "(8, 8)", "(6, 6)"),
    (interact, {"graph": some_graph()._replace(relevance=torch.zeros(8, 4))}, ValueError,
     "graph.relevance", "(8, 8)", "(8, 4)"),
    (interact, {"graph": some_graph()._replace(connection=torch.zeros(8, 8))}, TypeError,
     "graph.connection", "bool", "float32"),
    (interact, {"graph": some_graph()._replace(relevance=torch.zeros(8, 8).long())}, TypeError,
     "graph.relevance", "floating", "int64"),
    *embeddings(lose, D),
    (lose, {"image_embedding": torch.zeros(N, 8)}, ValueError, "image_embedding", "(N, 16)", "(4, 8)"),
    *everything_of_the_graph(lose),
    (lose, {"image_ids": [1, 2, 3, 4]}, TypeError, "image_ids", "integer tensor of shape (4,)", "list"),
    (lose, {"image_ids": torch.zeros(N)}, TypeError, "image_ids", "integer tensor", "torch.float32"),
    (lose, {"image_ids": torch.ones(N, dtype=torch.bool)}, TypeError, "image_ids", "integer tensor", "torch.bool"),
    (lose, {"image_ids": torch.zeros(N, dtype=torch.complex64)}, TypeError, "image_ids", "integer tensor", "complex64"),
    (lose, {"image_ids": torch.zeros(N + 1, dtype=torch.long)}, ValueError, "image_ids", "(4,)", "(5,)"),
    (lose, {"image_ids": torch.zeros(N, 1, dtype=torch.long)}, ValueError, "image_ids", "(4,)", "(4, 1)"),
    *elsewhere(lose, "image_ids", (N,), torch.long),
    *(case for call in (triplet_call, infonce_call) for case in (
        *tensors(call, "similarity", (N, N), "(N, M)"),
        (call, {"positives": torch.ones(N, N)}, TypeError, "positives", "bool", "torch.float32"),
        (call, {"positives": WRONG}, ValueError, "positives", "(4, 4)", "(6, 6)"),
        (call, {"positives": None}, TypeError, "positives", "(4, 4)", "NoneType"),
        *elsewhere(call, "positives", (N, N), torch.bool),
        (call, {"similarity": torch.zeros(0, 3), "positives": WRONG[:0, :3]}, ValueError,
         "similarity", "at least 1", "(0, 3)"),
        (call, {"similarity": torch.zeros(3, 0), "positives": WRONG[:3, :0]}, ValueError,
         "similarity", "at least 1", "(3, 0)"),
    )),
    (triplet_call, {"noise": torch.ones(N, N)}, ValueError, "noise", "(8,)", "(4, 4)"),
    (triplet_call, {"noise": torch.ones(2 * N).long()}, TypeError, "noise", "floating-point", "int64"),
    (triplet_call, {"noise": 0.5}, TypeError, "noise", "(8,)", "float"),
    (some_graph().block, {"name": "x2i"}, ValueError, "name", "'i2i', 'i2t', 't2i', 't2t'", "'x2i'"),
]  # fmt: skip


def label(case):
    make, given, *_ = case
    values = (
        f"{k}={str(tuple(v.shape)) + str(v.dtype)[6:] if isinstance(v, torch.Tensor) else v}" for k, v in given.items()
    )
    return f"{getattr(make, '__name__', 'call')}({', '.join(values)})"[:80]


CASES = [*CONSTRUCTORS, *CALLS]


@pytest.mark.parametrize("case", CASES, ids=[label(case) for case in CASES])
def test_message_names_the_argument_what_was_expected_and_what_came(case):
    make, given, error, name, expected, came = case
    with pytest.raises(error) as caught:
        make(**given)
    message = str(caught.value)
    assert type(caught.value) is error
    assert re.search(rf"\b{re.escape(name)}\b", message), message
    assert expected in message, message
    assert came in message, message


@pytest.mark.parametrize(
    "make", [relate, align, build_graph, regularize, interact, lose, triplet_call, infonce_call, fragment_relation,
             association_graph, relation_interaction, hrem_loss, TripletLoss, InfoNCELoss],
)  # fmt: skip
def test_what_the_cases_are_made_from_is_right(make):
    make()


def test_options_are_keyword_only():
    for make in (
        lambda: FragmentRelation(D, 4), lambda: AssociationGraph(10), lambda: RelationInteraction(D, "fusion"),
        lambda: HREMLoss(D, AssociationGraph()), lambda: TripletLoss(0.2, "hardest"), lambda: InfoNCELoss(0.07, True),
        lambda: align_fragments(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), None, None, 10),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="positional"):
            make()


def test_what_a_pair_loss_returns_must_be_a_scalar():
    for bad, said in ((lambda s, p: s, r"shape \(4, 4\)"), (lambda s, p: 0.5, r"0\.5 \(float\)")):
        with pytest.raises(TypeError, match=f"pair_loss must return a scalar tensor, got {said}"):
            HREMLoss(D, pair_loss=bad)(**good())


def test_zero_and_the_limits_themselves_are_fine():
    FragmentRelation(D, beta=0, dropout=0, max_pool_k=1)
    FragmentRelation(D, beta=1)
    AssociationGraph(neighbor_ratio=1, topk=1, chunk_size=1)
    RelationInteraction(D, relation_weight=0)
    RelationInteraction(D, relation_weight=-1.5)
    HREMLoss(D, enhanced_weight=0, cross_weight=0, regularization_weight=0)
    TripletLoss(0, cutoff=1e-3, nonzero_cutoff=2, weight_dim=2)
    InfoNCELoss(0.01, learnable=True)
    InfoNCELoss(1e-3)


def test_wrong_input_costs_no_work():
    """Checked before anything is computed: no module is called, no step counted."""
    module = HREMLoss(D, warmup_steps=5)
    module.interaction.register_forward_pre_hook(lambda *_: pytest.fail("got as far as the interaction"))
    for change in ({"image_ids": torch.zeros(N)}, {"text_mask": torch.ones(N, W)}, {"image_fragments": None}):
        with pytest.raises((TypeError, ValueError)):
            module(**{**good(), **change})
    assert module.step.item() == 0


# the checks themselves


def test_checks_return_what_is_right():
    x = torch.zeros(2, 3)
    assert check_int("n", 3, minimum=3) == 3
    assert check_number("x", 1, minimum=0, maximum=1) == 1.0
    assert isinstance(check_number("x", 1), float)
    assert check_bool("b", False) is False
    assert check_choice("c", "a", ("a", "b")) == "a"
    assert check_tensor("x", x, (2, "M")) is x
    assert check_bool_tensor("m", x > 0, ("N", 3), device=x.device).shape == (2, 3)


def test_shapes_are_said_as_tuples():
    with pytest.raises(ValueError, match=r"x must have shape \(5,\), got shape \(2, 3\), torch.float32, cpu"):
        check_tensor("x", torch.zeros(2, 3), (5,))
    with pytest.raises(TypeError, match=r"x must be a tensor of shape \(N, 3\), got int"):
        check_tensor("x", 3, ("N", 3))
    with pytest.raises(ValueError, match=r"x must be finite and greater than 0 and at most 1, got 2"):
        check_number("x", 2, above=0, maximum=1)


def test_checks_do_not_look_at_elements():
    check_tensor("x", torch.full((2, 2), math.nan), (2, 2))
    check_tensor("x", torch.empty(2, 2, device="meta"), (2, 2))


def test_parts_of_the_transformer():
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads, got 16 and 3"):
        BiasedAttention(16, num_heads=3)
    with pytest.raises(ValueError, match="ffn_dim must be at least 1, got 0"):
        TransformerLayer(16, num_heads=2, ffn_dim=0)
