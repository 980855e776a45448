"""``import hrem_layers`` is light, and changes nothing for anybody else in the process."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files

import hrem_layers

HEAVY = {
    "accelerate", "hypothesis", "joblib", "lightning", "matplotlib", "pandas", "pytest", "pytorch_lightning",
    "safetensors", "scipy", "sklearn", "tensorboard", "tokenizers", "torchdata", "transformers", "triton",
}  # fmt: skip
LIMIT = 0.3  # seconds beyond import torch

SCRIPT = """
import json, logging, random, sys, time, warnings
import torch

def state():
    return [
        torch.get_rng_state().sum().item(), hash(random.getstate()), str(torch.get_default_dtype()),
        torch.is_grad_enabled(), torch.get_num_threads(), torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(), logging.getLogger().level, len(logging.getLogger().handlers),
        len(warnings.filters), list(sys.path), str(torch.get_default_device()),
    ]

modules, before = set(sys.modules), state()
start = time.perf_counter()
import hrem_layers
seconds = time.perf_counter() - start
after = state()
print(json.dumps({
    "seconds": seconds,
    "changed": [(x, y) for x, y in zip(before, after) if x != y],
    "modules": sorted({name.split(".")[0] for name in set(sys.modules) - modules}),
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
    seconds = []
    for _ in range(4):  # the best of several: the machine may be busy, and the first run may write bytecode
        seen = fresh_import()
        assert not HEAVY & set(seen["modules"])
        assert seen["changed"] == []
        seconds.append(seen["seconds"])
        if min(seconds) <= LIMIT:
            break
    assert min(seconds) <= LIMIT, seconds


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
