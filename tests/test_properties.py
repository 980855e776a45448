"""What every module keeps: compilation, the meta device, copies, pickles, state, repr."""

from __future__ import annotations

import ast
import copy
import inspect
import io
import pickle
import re

import pytest
import torch
from support import assert_near, batch, generator, gradients, graph_inputs
from torch import nn
from torch._subclasses import FakeTensorMode

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

D, HEADS = 16, 2
NEGATIVES = ("distance_weighted", "hardest", "all", "expected")


def fragment_inputs(n=4, r=3, w=5):
    b = batch(n=n, r=r, w=w, dim=D)
    return {"fragments": b["text_fragments"], "mask": b["text_mask"]}


def fragment_inputs_without_mask(n=4, r=3, w=5):
    return {"fragments": fragment_inputs(n, r, w)["fragments"]}


def alignment_inputs(n=4, r=3, w=5):
    return {name: x for name, x in graph_inputs(n=n, r=r, w=w, dim=D).items() if not name.endswith("embedding")}


def association_inputs(n=4, r=3, w=5):
    return graph_inputs(n=n, r=r, w=w, dim=D)


def interaction_inputs(n=4, r=3, w=5):
    b = batch(n=n, dim=D)
    connection = torch.rand(2 * n, 2 * n, generator=generator(0)) < 0.6
    connection[1] = False
    relevance = torch.randn(2 * n, 2 * n, generator=generator(1)).requires_grad_()
    return {
        "image_embedding": b["image_embedding"],
        "text_embedding": b["text_embedding"],
        "graph": RelationGraph(connection, relevance),
    }


def pair_inputs(n=4, r=3, w=5):
    similarity = (2 * torch.rand(n, n + w, generator=generator(0)) - 1).requires_grad_()
    return {"similarity": similarity, "positives": torch.rand(n, n + w, generator=generator(1)) < 0.3}


def loss_inputs(n=4, r=3, w=5):
    return batch(n=n, r=r, w=w, dim=D)


def hrem(pair_loss=None, *, mechanism="fusion", **options):
    return HREMLoss(
        D,
        graph=AssociationGraph(topk=4),
        interaction=RelationInteraction(D, num_heads=HEADS, mechanism=mechanism, dropout=0.0, gate=0.6),
        pair_loss=pair_loss,
        **options,
    )


MODULES = {
    "FragmentRelation": (lambda: FragmentRelation(D, num_heads=HEADS, dropout=0.0), fragment_inputs),
    "FragmentRelation without mask": (
        lambda: FragmentRelation(D, num_heads=HEADS, dropout=0.0, num_layers=2), fragment_inputs_without_mask
    ),
    "AssociationGraph": (lambda: AssociationGraph(topk=4), association_inputs),
    "AssociationGraph with gradient": (
        lambda: AssociationGraph(
            topk=4, detach_fragments=False, squared_distance=True, alignment="cosine", chunk_size=3
        ),
        association_inputs,
    ),
    "RelationInteraction fusion": (
        lambda: RelationInteraction(D, num_heads=HEADS, dropout=0.0, gate=0.6),
        interaction_inputs,
    ),
    "RelationInteraction standalone": (
        lambda: RelationInteraction(D, num_heads=HEADS, dropout=0.0, gate=0.6, mechanism="standalone", num_layers=1),
        interaction_inputs,
    ),
    **{
        f"TripletLoss {name}": ((lambda name=name: TripletLoss(negative_sampling=name, weight_dim=8)), pair_inputs)
        for name in NEGATIVES
    },
    "InfoNCELoss": (InfoNCELoss, pair_inputs),
    "InfoNCELoss learnable": (lambda: InfoNCELoss(learnable=True), pair_inputs),
    "HREMLoss": (lambda: hrem(TripletLoss(negative_sampling="hardest"), warmup_steps=2), loss_inputs),
}  # fmt: skip
every_module = pytest.mark.parametrize("name", MODULES)


def make(name):
    torch.manual_seed(1)
    return MODULES[name][0]()


def tensors_of(out):
    return [out] if isinstance(out, torch.Tensor) else [x for x in out if isinstance(x, torch.Tensor)]


def flat(inputs):
    """Inputs by name with the graph taken apart."""
    parts = {}
    for name, x in inputs.items():
        parts |= (
            {f"{name}.{field}": getattr(x, field) for field in ("connection", "relevance")}
            if isinstance(x, RelationGraph)
            else {name: x}
        )
    return parts


def results(function, module, inputs):
    """Outputs and gradients of all inputs and parameters, drawn from the same seed."""
    torch.manual_seed(5)
    outputs = tensors_of(function(**inputs))
    leaves = {**flat(inputs), **dict(module.named_parameters())} if module is not None else flat(inputs)
    return [*outputs, *gradients(leaves, *outputs).values()]


def assert_same_results(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        if y.dtype.is_floating_point:
            # a small gradient is the difference of numbers near 1, whose rounding it keeps
            largest = float(y.detach().abs().max())
            assert_near(x, y, max(1e-4, 1e-7 / largest)) if largest > 1e-6 else assert_near(x + 1, y + 1, 1e-6)
        else:
            assert torch.equal(x, y)


# compilation

SHAPES = [(6, 5, 7), (9, 4, 11)]
# the others hold what these hold, or compile for long
COMPILED_FIRST = {
    "FragmentRelation",
    "AssociationGraph with gradient",
    "RelationInteraction fusion",
    "TripletLoss distance_weighted",
    "TripletLoss expected",
    "InfoNCELoss learnable",
    "HREMLoss",
}


def check_compiled(name, backend, dynamic, shapes):
    module, inputs = make(name), MODULES[name][1]
    twin = copy.deepcopy(module)  # modules that count their calls must count alike
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)
    for shape in shapes:
        assert_same_results(
            results(compiled, module, inputs(*shape)), results(twin, twin, inputs(*shape))
        )  # fmt: skip
    for x, y in zip(module.buffers(), twin.buffers(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "name", [name if name in COMPILED_FIRST else pytest.param(name, marks=pytest.mark.slow) for name in MODULES]
)
def test_compiles_whole_once_for_all_sizes(name, fresh_compiler):
    """fullgraph, forward and backward, symbolic N, R and W: one compilation, the numbers of eager mode."""
    check_compiled(name, "aot_eager", True, SHAPES)


def test_alignment_compiles_whole_once_for_all_sizes(fresh_compiler):
    def function(**inputs):
        return align_fragments(**inputs, topk=4)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in SHAPES:
        inputs = alignment_inputs(*shape)
        assert_same_results(results(compiled, None, inputs), results(function, None, inputs))


def test_sizes_that_turn_out_to_vary_compile_once_more():
    """Without being told: the first sizes are taken as fixed, the second make one compilation for all."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(make("AssociationGraph"), backend="eager", fullgraph=True)
    with torch.no_grad():
        for shape in (*SHAPES, (12, 6, 9), (7, 10, 13)):
            compiled(**association_inputs(*shape))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


@pytest.mark.slow
@every_module
def test_compiles_with_fixed_sizes(name, fresh_compiler):
    check_compiled(name, "aot_eager", False, SHAPES[:1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "pair_loss", [*(TripletLoss(negative_sampling=n) for n in NEGATIVES), InfoNCELoss(learnable=True)]
)
@pytest.mark.parametrize("mechanism", ["fusion", "standalone"])
def test_every_loss_compiles(pair_loss, mechanism, fresh_compiler, monkeypatch):
    case = (lambda: hrem(copy.deepcopy(pair_loss), mechanism=mechanism), loss_inputs)
    monkeypatch.setitem(MODULES, "this", case)
    check_compiled("this", "aot_eager", True, SHAPES)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in MODULES if "distance_weighted" not in n])  # inductor draws other numbers
def test_inductor(name, fresh_compiler):
    check_compiled(name, "inductor", None, SHAPES[:1])


@pytest.mark.slow
def test_inductor_dynamic(fresh_compiler):
    check_compiled("HREMLoss", "inductor", True, SHAPES)


# no value is waited for


def on_meta(inputs):
    def move(x):
        if not isinstance(x, torch.Tensor):
            return x
        return x.detach().to("meta").requires_grad_(x.requires_grad)

    return {
        name: RelationGraph(*map(move, x)) if isinstance(x, RelationGraph) else move(x) for name, x in inputs.items()
    }


@every_module
def test_meta_device(name):
    module, inputs = make(name), MODULES[name][1]()
    expected = tensors_of(module(**inputs))
    module, inputs = make(name).to("meta"), on_meta(inputs)
    out = tensors_of(module(**inputs))
    for x, y in zip(out, expected, strict=True):
        assert (x.shape, x.dtype, x.device.type) == (y.shape, y.dtype, "meta")
    sum(x.sum() for x in out if x.dtype.is_floating_point).backward()
    for leaf in (*flat(inputs).values(), *module.parameters()):
        if leaf.requires_grad and leaf.grad is not None:
            assert leaf.grad.shape == leaf.shape


def test_alignment_on_meta():
    inputs = alignment_inputs()
    out = align_fragments(**on_meta(inputs), topk=4)
    for x, y in zip(out, align_fragments(**inputs, topk=4), strict=True):
        assert (x.shape, x.dtype, x.device.type) == (y.shape, y.dtype, "meta")


@every_module
def test_fake_tensors(name):
    expected = tensors_of(make(name)(**MODULES[name][1]()))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        module = make(name)
        inputs = {
            key: RelationGraph(*map(mode.from_tensor, x[:2])) if isinstance(x, RelationGraph) else mode.from_tensor(x)
            for key, x in MODULES[name][1]().items()
        }
        out = tensors_of(module(**inputs))
        for x, y in zip(out, expected, strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
        sum(x.sum() for x in out if x.dtype.is_floating_point).backward()


@every_module
def test_built_on_meta(name):
    with torch.device("meta"):
        module = make(name)
    assert all(x.device.type == "meta" for x in (*module.parameters(), *module.buffers()))
    module = module.to_empty(device="cpu")
    module.load_state_dict(make(name).state_dict(), strict=True)
    inputs, twin = MODULES[name][1](), make(name)
    assert_same_results(results(module, module, inputs), results(twin, twin, inputs))


# state and copies


def run(module, name):
    torch.manual_seed(7)
    with torch.no_grad():
        return tensors_of(module.eval()(**MODULES[name][1]()))


def other_weights(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


@every_module
def test_state_dict_round_trip(name):
    module, other = other_weights(make(name)), make(name)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for x, y in zip(run(other, name), run(module, name), strict=True):
        assert torch.equal(x, y)


@every_module
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_independent(name, duplicate):
    module = other_weights(make(name))
    twin = duplicate(module)
    assert repr(twin) == repr(module)
    before = run(module, name)
    for x, y in zip(run(twin, name), before, strict=True):
        assert torch.equal(x, y)
    other_weights(twin)
    for x, y in zip(run(module, name), before, strict=True):
        assert torch.equal(x, y)
    if list(twin.parameters()):
        assert any(not torch.equal(x, y) for x, y in zip(run(twin, name), before, strict=True))


def test_loss_copies_go_on_counting_by_themselves():
    module = hrem(warmup_steps=3)
    module(**loss_inputs())
    twin = copy.deepcopy(module)
    twin(**loss_inputs())
    assert (module.step.item(), twin.step.item()) == (1, 2)


def test_results_pickle():
    graph = AssociationGraph(topk=4)(**association_inputs())
    again = pickle.loads(pickle.dumps(RelationGraph(graph.connection, graph.relevance.detach())))
    assert isinstance(again, RelationGraph)
    assert torch.equal(again.connection, graph.connection)
    terms = hrem().terms(**loss_inputs())
    assert terms._asdict().keys() == {
        "total", "base", "enhanced", "cross_image", "cross_text", "regularization"
    }  # fmt: skip


# repr

UNUSUAL = {
    FragmentRelation: [{
        "embed_dim": 12, "num_heads": 3, "num_layers": 2, "ffn_dim": 20, "dropout": 0.25, "beta": 0.4, "max_pool_k": 3,
    }],
    AssociationGraph: [{
        "topk": 3, "neighbor_ratio": 0.25, "sigma": 2.0, "squared_distance": True, "alignment": "dot",
        "detach_fragments": False, "chunk_size": 7,
    }],
    RelationInteraction: [{
        "embed_dim": 12, "mechanism": "standalone", "num_heads": 3, "num_layers": 2, "ffn_dim": 20, "dropout": 0.25,
        "relation_weight": -1.5, "residual": True, "gate": 0.25,
    }],
    TripletLoss: [{
        "margin": 0.3, "negative_sampling": "all", "cutoff": 0.4, "nonzero_cutoff": 1.9, "weight_dim": 64,
        "reduction": "mean",
    }],
    InfoNCELoss: [{"temperature": 0.1, "learnable": True, "reduction": "sum"}],
    HREMLoss: [{
        "embed_dim": 16, "enhanced_weight": 0.5, "cross_weight": 0.25, "regularization_weight": 3.0, "warmup_steps": 4,
        "gather_distributed": True,
    }],
}  # fmt: skip


def options_in_repr(module):
    """The options on the first lines of the repr, read as the arguments of a call."""
    shown = module.extra_repr()
    assert shown in repr(module)
    call = ast.parse(f"f({shown})", mode="eval").body
    names = list(inspect.signature(type(module)).parameters)
    values = {name: ast.literal_eval(arg) for name, arg in zip(names, call.args, strict=False)}
    return values | {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


@pytest.mark.parametrize(("kind", "options"), [(kind, given) for kind, (given,) in UNUSUAL.items()])
def test_repr_shows_every_option_and_rebuilds_the_module(kind, options):
    module = kind(**options)
    shown = options_in_repr(module)
    assert shown.items() >= options.items()
    children = {name for name, _ in module.named_children()}
    for name, parameter in inspect.signature(kind).parameters.items():
        if name == "layer":  # a function; what it made are the children ``layers``
            continue
        assert name in shown or name in children, f"{name} is not in {module!r}"
        if name not in children:
            assert name in options or shown[name] == parameter.default
    rebuilt = kind(**shown)
    assert repr(rebuilt) == repr(module)
    assert re.match(rf"{kind.__name__}\(", repr(module))
    assert {n: x.shape for n, x in rebuilt.state_dict().items()} == {n: x.shape for n, x in module.state_dict().items()}


def test_repr_of_the_loss_shows_its_parts():
    text = repr(hrem(InfoNCELoss()))
    for part in ("(graph): AssociationGraph", "(interaction): RelationInteraction", "(pair_loss): InfoNCELoss"):
        assert part in text

    def my_pair_loss(similarity, positives):
        return similarity.sum()

    assert "pair_loss=<function" in repr(hrem(my_pair_loss))
    assert "my_pair_loss" in repr(hrem(my_pair_loss))


# dtypes and devices of modules as wholes


@every_module
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_to_dtype(name, dtype):
    module = make(name).to(dtype)

    def convert(x):
        return x.detach().to(dtype).requires_grad_() if x.dtype.is_floating_point else x

    inputs = {
        key: RelationGraph(*map(convert, x[:2])) if isinstance(x, RelationGraph) else convert(x)
        for key, x in MODULES[name][1]().items()
    }
    for outputs in (tensors_of(module(**inputs)),):
        losses = name.startswith(("Triplet", "InfoNCE", "HREM"))
        for x in outputs:
            if x.dtype.is_floating_point:
                assert x.dtype == (torch.float32 if losses and dtype != torch.float64 else dtype)
                assert torch.isfinite(x).all()
    for leaf, grad in gradients({**flat(inputs), **dict(module.named_parameters())}, *outputs).items():
        assert grad.dtype == dtype, leaf
        assert torch.isfinite(grad).all(), leaf


@every_module
def test_nothing_is_drawn_in_eval_mode_but_by_distance_weighted_sampling(name):
    module = make(name).eval()
    state = torch.get_rng_state()
    module(**MODULES[name][1]())
    assert torch.equal(torch.get_rng_state(), state) == ("distance_weighted" not in name)


def test_the_relation_modules_are_in_the_checkpoint():
    names = set(hrem(InfoNCELoss(learnable=True)).state_dict())
    assert {"step", "pair_loss.log_scale", "graph.mlp_i2t.0.weight", "interaction.layers.0.norm1.weight"} <= names


def test_modules_train_with_an_optimizer():
    """The whole thing learns: relations pull the two sides of random pairs together."""
    torch.manual_seed(0)
    b = batch(n=8, dim=D, grad=False)
    loss = hrem(TripletLoss(negative_sampling="hardest", reduction="mean"), warmup_steps=5)
    encoders = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])
    pool = FragmentRelation(D, num_heads=HEADS, dropout=0.0)
    optimizer = torch.optim.AdamW([*encoders.parameters(), *pool.parameters(), *loss.parameters()], lr=3e-3)
    values = []
    for _ in range(60):
        images, texts = (
            encoder(b[f"{side}_fragments"]) for encoder, side in zip(encoders, ("image", "text"), strict=True)
        )
        terms = loss.terms(
            pool(images, b["image_mask"]), pool(texts, b["text_mask"]), images, texts, b["image_mask"], b["text_mask"]
        )
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        values.append(terms.base.item())
    assert sum(values[-5:]) < 0.3 * sum(values[:5])
