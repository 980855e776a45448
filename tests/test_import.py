"""``import hrem_layers`` is light, and changes nothing for anybody else in the process."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files

import hrem_layers

HEAVY = {
    "accelerate", "hypothesis", "joblib", "lightning", "llvmlite", "matplotlib", "numba", "pandas", "pytest",
    "pytorch_lightning", "safetensors", "scipy", "sklearn", "tensorboard", "tokenizers", "torchdata",
    "transformers", "triton",
}  # fmt: skip
# Time is not measured: on a busy machine it says nothing. What would take time is loading modules.
MOST_MODULES = 100  # beyond those of torch, NumPy and einops, our own among them

SCRIPT = """
import json, logging, random, sys, warnings
import einops, numpy, torch

def state():
    return [
        torch.get_rng_state().sum().item(), hash(random.getstate()), str(torch.get_default_dtype()),
        torch.is_grad_enabled(), torch.get_num_threads(), torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(), logging.getLogger().level, len(logging.getLogger().handlers),
        len(warnings.filters), list(sys.path), str(torch.get_default_device()),
    ]

modules, before = set(sys.modules), state()
import hrem_layers
after = state()
print(json.dumps({
    "changed": [(x, y) for x, y in zip(before, after) if x != y],
    "modules": sorted(set(sys.modules) - modules),
}))
"""


def fresh_import() -> dict:
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:hrem_layers", "-c", SCRIPT],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert not done.stderr
    return json.loads(done.stdout)


def test_import_is_light_and_leaves_everything_as_it_was():
    seen = fresh_import()
    assert not HEAVY & {name.split(".")[0] for name in seen["modules"]}
    assert seen["changed"] == []
    assert len(seen["modules"]) <= MOST_MODULES, seen["modules"]


def test_public_names():
    assert sorted(hrem_layers.__all__) == hrem_layers.__all__
    for name in hrem_layers.__all__:
        assert getattr(hrem_layers, name).__doc__, name
    promised = {
        "AssociationGraph", "FragmentRelation", "HREMLoss", "HREMTerms", "InfoNCELoss", "RelationGraph",
        "RelationInteraction", "TripletLoss", "align_fragments",
    }  # fmt: skip
    assert promised <= set(hrem_layers.__all__)
    assert files("hrem_layers").joinpath("py.typed").is_file()
    assert hrem_layers.__version__
