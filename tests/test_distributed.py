"""The gathered loss in 2 and 3 processes equals one process; distributed_cases.py says what is checked."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import hrem_layers.loss
from hrem_layers import HREMLoss

SCRIPT = Path(__file__).with_name("distributed_cases.py")
_spec = importlib.util.spec_from_file_location("distributed_cases", SCRIPT)
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


@functools.cache
def results(world: int, folder: Path, *names: str) -> dict[str, str | None]:
    out = folder / f"{world}.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(world), str(out), *names],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return json.loads(out.read_text())


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", [name for name in cases.CASES if name not in cases.SLOW])
def test_in_processes(case: str, world: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    if "fsdp2" in case and torch.__version__.startswith("2.5."):
        pytest.skip("FSDP2 of PyTorch 2.5 runs on CUDA alone")
    wrong = results(world, tmp_path_factory.getbasetemp())[case]
    assert wrong is None, wrong


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.SLOW)
def test_in_processes_slow(case: str, tmp_path: Path) -> None:
    wrong = results(2, tmp_path, case)[case]
    assert wrong is None, wrong


@pytest.mark.parametrize("group", [False, True], ids=["no group", "a group of one"])
def test_alone_gathering_changes_nothing(group: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [torch.randn(3, 16), torch.randn(3, 16), torch.randn(3, 4, 8), torch.randn(3, 5, 8)]
    plain = HREMLoss(16).eval()
    gathered = HREMLoss(16, gather_distributed=True).eval()
    gathered.load_state_dict(plain.state_dict())
    monkeypatch.setattr(hrem_layers.loss, "agree", lambda *_, **__: pytest.fail("nobody to agree with"))
    if group:
        dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(1)
        expected = plain.terms(*arguments)
        torch.manual_seed(1)
        got = gathered.terms(*arguments)
    finally:
        if group:
            dist.destroy_process_group()
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
