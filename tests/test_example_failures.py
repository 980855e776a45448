"""What ends a run of the example: it says so in one line, and the checkpoint of before is whole."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from example_runs import SCRIPT, command, start, wait_for_checkpoint
from precomputed import write_folder

for package in ("tqdm", "tensorboard", "matplotlib"):
    pytest.importorskip(package, reason='the script needs pip install "hrem-layers[examples]"')

import checkpoint  # noqa: E402
import flickr30k  # noqa: E402
import interrupt  # noqa: E402
import processes  # noqa: E402
import retrieval_model  # noqa: E402
import training  # noqa: E402
from errors import explain, let_idle_workers_die  # noqa: E402

from hrem_layers import HREMTerms  # noqa: E402

TINY = ("--embed-dim", "8", "--epochs", "3", "--checkpoint-every", "2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("precomputed"), train=32, dev=6, test=6)


def stopped(arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as error:
        flickr30k.main(arguments)
    message = str(error.value.code)
    assert message.startswith("error: ") and "\n" not in message, message
    return message


# ---------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("term", HREMTerms._fields)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("warmup", ["0", "1000"])
def test_a_term_that_is_not_finite_stops_before_the_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, term: str, value: float, warmup: str
) -> None:
    calls = 0
    forward = retrieval_model.RetrievalModel.forward

    def spoil(self: retrieval_model.RetrievalModel, batch: object) -> HREMTerms:
        nonlocal calls
        calls += 1
        terms = forward(self, batch)  # type: ignore[arg-type]
        return terms._replace(**{term: getattr(terms, term) + value}) if calls == 4 else terms

    monkeypatch.setattr(retrieval_model.RetrievalModel, "forward", spoil)
    message = stopped(command(data, tmp_path, *TINY, "--warmup-steps", warmup))
    assert f"not finite in epoch 1, step 4 (step 4 of the run): {term} = {value}" in message
    assert f"the last good checkpoint is {tmp_path / 'last.pt'} (epoch 1, after 2 steps)" in message
    state = checkpoint.load(tmp_path / "last.pt")
    assert state["total_steps"] == 2 and all(x.isfinite().all() for x in state["model"].values())


@pytest.mark.parametrize("warmup", ["0", "1000"])
def test_a_gradient_that_is_not_finite_stops_before_the_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warmup: str
) -> None:
    clip, calls = torch.nn.utils.clip_grad_norm_, 0

    def spoil(parameters: object, *limits: float) -> torch.Tensor:
        nonlocal calls
        calls += 1
        listed = list(parameters)  # type: ignore[call-overload]
        if calls == 3:
            listed[0].grad[0] = math.nan
        return clip(listed, *limits)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoil)
    message = stopped(command(data, tmp_path, *TINY, "--warmup-steps", warmup, "--grad-clip", "0"))
    assert "not finite in epoch 1, step 3 (step 3 of the run): gradient norm = nan; the step was not made" in message
    assert checkpoint.load(tmp_path / "last.pt")["total_steps"] == 2


def test_weights_that_are_not_finite_are_not_saved(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = torch.optim.AdamW.step, 0

    def spoil(self: torch.optim.AdamW, *more: object) -> None:
        nonlocal calls
        calls += 1
        step(self)
        if calls == 4:  # in weights that no term of the warm-up sees
            with torch.no_grad():
                self.param_groups[0]["params"][-1][..., 0] = math.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    message = stopped(command(data, tmp_path, *TINY, "--warmup-steps", "1000"))
    assert re.search(r"not finite in epoch 1, step \d.*: the weights loss\.\w+", message) or "gradient norm" in message
    assert checkpoint.load(tmp_path / "last.pt")["total_steps"] == 2


def test_an_overflow_of_fp16_is_no_error_until_the_scale_is_at_its_end(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = dict.fromkeys((*HREMTerms._fields, "gradient norm"), 1.0)

    class Scaler:
        scale = 2.0**16

        def is_enabled(self) -> bool:
            return True

        def get_scale(self) -> float:
            return self.scale

    class Standing:
        scaler, saved = Scaler(), "nothing saved"

        def now(self) -> str:
            return "now"

    run = Standing()
    training.check_step(run, {**values, "gradient norm": math.inf})  # type: ignore[arg-type]
    with pytest.raises(FloatingPointError, match="base = nan"):
        training.check_step(run, {**values, "base": math.nan})  # type: ignore[arg-type]
    run.scaler.scale = 2.0**-20
    with pytest.raises(FloatingPointError, match="gradient norm = inf"):
        training.check_step(run, {**values, "gradient norm": math.inf})  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- the disk


def test_a_file_too_large_leaves_the_last_checkpoint_whole(data: Path, tmp_path: Path) -> None:
    """As a full disk; the limit is on each file of the process."""
    flickr30k.main(command(data, tmp_path, *TINY[:2], "--epochs", "1"))
    whole = (tmp_path / "last.pt").read_bytes()
    limited = subprocess.run(
        [sys.executable, str(SCRIPT), *command(data, tmp_path, *TINY, "--resume")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, len(whole) // 2)),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert limited.returncode > 0
    last = limited.stderr.strip().split("\n")[-1]
    assert re.match(r"error: \S+(last|best)\.pt: could not be written \(File too large\)", last), limited.stderr
    assert f"the last good checkpoint is {tmp_path / 'last.pt'}" in last
    assert "Traceback" not in limited.stderr
    assert (tmp_path / "last.pt").read_bytes() == whole
    assert not list(tmp_path.glob(".*partial*"))


def test_curves_that_cannot_be_written_are_one_line(data: Path, tmp_path: Path) -> None:
    options = command(data, tmp_path, *TINY[:2], "--epochs", "20", "--checkpoint-every", "0", "--log-every", "1")
    limited = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert limited.returncode > 0 and "Traceback" not in limited.stderr, limited.stderr
    last = limited.stderr.strip().split("\n")[-1]
    assert re.match(r"error: \S+(tensorboard|last\.pt): .*could not be written \(File too large\)", last), last


@pytest.mark.parametrize("size", [0, 1000, 100_000])
def test_any_write_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    path = tmp_path / "last.pt"
    state = {"arguments": {}, "x": torch.arange(50_000)}
    checkpoint.save(path, state)
    pass_on, written = checkpoint._Sealing._pass_on, 0

    def fail(self: checkpoint._Sealing, view: memoryview) -> None:
        nonlocal written
        written += len(view)
        if written > size:
            raise OSError(28, "No space left on device")
        pass_on(self, view)

    monkeypatch.setattr(checkpoint._Sealing, "_pass_on", fail)
    with pytest.raises(OSError, match=r"last\.pt: could not be written \(No space left on device\)"):
        checkpoint.save(path, {"arguments": {}, "x": torch.zeros(50_000)})
    assert checkpoint.load(path)["x"][-1] == 49_999
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_the_new_name_is_made_after_the_contents_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (order.append("fsync"), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("replace"), replace(*names)))
    checkpoint.save(tmp_path / "last.pt", {"arguments": {}})
    assert order == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_a_folder_that_cannot_be(data: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    assert f"--output-dir {tmp_path / place}: no folder" in stopped(command(data, tmp_path / place, *TINY))


def test_a_folder_in_which_nothing_can_be_written(data: Path, tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    assert f"--output-dir {tmp_path}: nothing can be written there" in stopped(command(data, tmp_path, *TINY))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o500)
    assert "Permission denied" in stopped(command(data, tmp_path / "run", *TINY))


# ---------------------------------------------------------------------------------------- processes and signals


def children_of(pid: int) -> list[int]:
    if not Path("/proc/self/task").exists():
        pytest.skip("needs Linux's /proc to find the workers")
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has ended
        return []


def test_a_killed_worker_is_one_line(data: Path, tmp_path: Path) -> None:
    options = ("--embed-dim", "8", "--epochs", "1000", "--checkpoint-every", "2", "--num-workers", "1")
    run = start(*command(data, tmp_path, *options))
    try:
        wait_for_checkpoint(run, tmp_path / "last.pt", epoch=0)
        deadline = time.monotonic() + 60
        while run.poll() is None and time.monotonic() < deadline:  # one that has read all may go without being missed
            for pid in children_of(run.pid):
                if "resource_tracker" not in cmdline(pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        output = run.communicate(timeout=60)[0]
    finally:
        run.kill()
    assert run.returncode > 0
    assert "Traceback" not in output, output
    last = output.strip().split("\n")[-1]
    assert re.match(r"error: a process that reads the data ended unexpectedly.*; the last good checkpoint is", last)
    checkpoint.load(tmp_path / "last.pt")


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="no news of workers on this system")
def test_a_second_worker_that_dies_does_not_hide_the_reason(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch raises wherever the main process is, also while it explains what happened to the first."""

    def killed(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")

    def explain_late(error: Exception) -> str | None:
        os.kill(os.getpid(), signal.SIGCHLD)
        return explain(error)

    monkeypatch.setattr(flickr30k, "train_and_evaluate", killed)
    monkeypatch.setattr(flickr30k, "explain", explain_late)
    before = signal.signal(signal.SIGCHLD, killed)
    try:
        with pytest.raises(SystemExit, match=r"error: a process that reads the data ended unexpectedly \(Killed\)"):
            flickr30k.main(command(data, tmp_path))
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="no news of workers on this system")
def test_a_worker_that_dies_after_ctrl_c_is_not_told_of() -> None:
    def killed(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGCHLD)}
    signal.signal(signal.SIGCHLD, killed)
    try:
        interrupt.ignore()
        os.kill(os.getpid(), signal.SIGCHLD)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def cmdline(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return "resource_tracker"


class Dismissed:
    """Raises ``error`` when it is taken apart, as a loader does whose worker is killed at that moment."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __del__(self) -> None:
        raise self.error


def test_a_worker_that_dies_when_it_is_dismissed_is_not_spoken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[BaseException | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: heard.append(what.exc_value))
    other = RuntimeError("another")
    let_idle_workers_die()
    for error in (RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "), other):
        Dismissed(error)
    assert heard == [other]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGCHLD], ids=["Ctrl-C", "end of a worker"])
def test_a_signal_while_saving_takes_effect_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    class Raised(RuntimeError):
        pass

    def handler(*_: object) -> None:
        raise Raised

    pass_on = checkpoint._Sealing._pass_on

    def meanwhile(self: checkpoint._Sealing, view: memoryview) -> None:
        os.kill(os.getpid(), number)
        pass_on(self, view)

    monkeypatch.setattr(checkpoint._Sealing, "_pass_on", meanwhile)
    before = signal.signal(number, handler)
    try:
        with pytest.raises(Raised):
            checkpoint.save(tmp_path / "last.pt", {"arguments": {}, "x": torch.ones(1000)})
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert checkpoint.load(tmp_path / "last.pt")["x"].sum() == 1000


@pytest.mark.parametrize("pause", [0.0, 0.2])
def test_two_quick_interrupts_are_one_line(data: Path, tmp_path: Path, pause: float) -> None:
    run = start(*command(data, tmp_path, "--embed-dim", "8", "--epochs", "1000", "--checkpoint-every", "2"))
    wait_for_checkpoint(run, tmp_path / "last.pt", epoch=0)
    for _ in range(2):
        run.send_signal(signal.SIGINT)
        time.sleep(pause)
    output = run.communicate(timeout=120)[0]
    assert run.returncode > 0
    assert "Traceback" not in output and output.count("interrupted: go on with --resume") == 1, output
    assert f"the last good checkpoint is {tmp_path / 'last.pt'}" in output
    checkpoint.load(tmp_path / "last.pt")
    assert not list(tmp_path.glob(".*partial*"))


def test_an_interrupt_while_the_script_loads_is_one_line(data: Path, tmp_path: Path) -> None:
    run = start(*command(data, tmp_path))
    time.sleep(0.4)
    run.send_signal(signal.SIGINT)
    run.send_signal(signal.SIGINT)
    output = run.communicate(timeout=120)[0]
    assert run.returncode != 0 and "Traceback" not in output, output


# ---------------------------------------------------------------------------------------- what is said


def test_bars_stay_out_of_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    for on_terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda on_terminal=on_terminal: on_terminal, raising=False)
        assert processes.progress(range(3), "reading").disable is not on_terminal


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one two"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (ConnectionResetError(104, "Connection reset by peer"), "a process that reads the data ended"),
        (EOFError(), "a process that reads the data ended"),
        (RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly"), "a process that reads the data ended"),
        (RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "), "unexpectedly (Killed)"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory: a smaller --batch-size"),
        (ValueError("Caught E in DataLoader worker process 0.\nOriginal Traceback:\n  x\nm.E: f.npy: no"), "f.npy: no"),
    ],
)  # fmt: skip
def test_what_is_no_bug_is_one_line(error: Exception, line: str) -> None:
    explained = explain(error)
    assert explained is not None and line in explained and "\n" not in explained


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2"), TypeError("x"), KeyError("x"), AssertionError()])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    assert explain(error) is None


@pytest.mark.slow
def test_kills_at_random_moments_change_no_figure(capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.util

    path = Path(__file__).parent.parent / "benchmarks" / "reliability" / "kills.py"
    spec = importlib.util.spec_from_file_location("kills", path)
    assert spec is not None and spec.loader is not None
    kills = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kills)
    assert kills.main(["--kills", "6", "--kills-per-run", "3"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["kills"] == 6 and counts["runs"] >= 2
