"""The example script on two processes: whatever ends one of them ends both, soon and with the reason."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from example_runs import SCRIPT, TORCHRUN, command, finish, results, start, start_by_hand, wait_for_checkpoint
from precomputed import write_folder

for package in ("tqdm", "tensorboard", "matplotlib"):
    pytest.importorskip(package, reason='the script needs pip install "hrem-layers[examples]"')

SOON = 120.0  # seconds, on a busy machine; what hangs does so for longer
LONG = ("--epochs", "1000", "--checkpoint-every", "2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("precomputed"))


def ended(*processes: subprocess.Popen) -> list[str]:
    """What each has printed by the time it and its children are gone, which must be soon."""
    deadline = time.monotonic() + SOON
    outputs = []
    try:
        for process in processes:  # the pipe is at its end when the last child that could write to it is gone
            outputs.append(process.communicate(timeout=max(deadline - time.monotonic(), 0))[0])
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"still running after {SOON:.0f} s: {error.output}") from None
    finally:
        for process in processes:
            process.kill()
    return outputs


def ranks_of(torchrun: subprocess.Popen) -> list[int]:
    """The process ids of its workers, by rank."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children")
    if not children.exists():
        pytest.skip("needs Linux's /proc to find the workers")
    pids = {}
    for pid in map(int, children.read_text().split()):
        if rank := re.search(rb"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes()):
            pids[int(rank[1])] = pid
    assert sorted(pids) == [0, 1]
    return [pids[0], pids[1]]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def changed_script(folder: Path, changes: str) -> Path:
    """The script after ``changes`` to its modules, in which ``RANK`` is known."""
    path = folder / "changed.py"
    head = "import os, sys, time\nimport checkpoint, flickr30k, processes, training\nRANK = int(os.environ['RANK'])\n"
    path.write_text(head + textwrap.dedent(changes) + "\nflickr30k.main(sys.argv[1:])\n")
    return path


# ---------------------------------------------------------------------------------------- under torchrun


def test_torchrun_ends_and_names_the_rank_that_was_killed(data: Path, tmp_path: Path) -> None:
    torchrun = start(*command(data, tmp_path, *LONG, "--num-workers", "1"), launcher=TORCHRUN)
    wait_for_checkpoint(torchrun, tmp_path / "last.pt", epoch=0)
    pids = ranks_of(torchrun)
    os.kill(pids[1], signal.SIGKILL)
    output = ended(torchrun)[0]
    assert torchrun.returncode > 0
    assert not any(map(alive, pids))
    cause = output[output.index("Root Cause") :]
    assert re.search(r"rank +: 1 ", cause), output
    assert "Signal 9 (SIGKILL)" in cause


def test_ctrl_c_ends_all_with_one_line(data: Path, tmp_path: Path) -> None:
    torchrun = start(*command(data, tmp_path, *LONG), launcher=TORCHRUN)
    wait_for_checkpoint(torchrun, tmp_path / "last.pt", epoch=0)
    pids = ranks_of(torchrun)
    # a terminal signals its whole process group, to which the workers belong in some versions of torchrun
    for pid in (torchrun.pid, *pids):
        os.kill(pid, signal.SIGINT)
    output = ended(torchrun)[0]
    assert torchrun.returncode > 0
    assert not any(map(alive, pids))
    assert output.count("interrupted: go on with --resume") == 1, output
    assert "KeyboardInterrupt" not in output
    assert output.count("Traceback") <= 1  # torchrun's own
    finish(start("--eval-only", str(tmp_path / "last.pt"), "--device", "cpu"))


def test_an_error_of_one_rank_is_what_torchrun_shows(data: Path, tmp_path: Path) -> None:
    broken = write_folder(tmp_path / "broken")
    features = np.load(broken / "train_ims.npy")
    features[7, 2, 3] = np.nan  # the rank that draws it finds it out alone
    np.save(broken / "train_ims.npy", features)
    torchrun = start(*command(broken, tmp_path / "run", *LONG), launcher=TORCHRUN)
    output = ended(torchrun)[0]
    assert torchrun.returncode > 0
    assert re.search(r"rank [01]: error: \S*train_ims.npy: expected finite features, found NaN or inf in row 7", output)
    cause = output[output.index("Root Cause") :]
    assert "expected finite features" in cause, output


def test_a_death_ends_who_is_in_the_middle_of_long_work(data: Path, tmp_path: Path) -> None:
    script = changed_script(tmp_path, """
        def long_work(*_):
            print("working", flush=True)
            time.sleep(600)

        if RANK == 0:
            training.evaluate = long_work
    """)  # fmt: skip
    torchrun = start(*command(data, tmp_path / "run", "--epochs", "1"), script=script, launcher=TORCHRUN)
    while "working" not in torchrun.stdout.readline():
        assert torchrun.poll() is None
    pids = ranks_of(torchrun)
    os.kill(pids[1], signal.SIGKILL)
    output = ended(torchrun)[0]
    assert re.search(r"rank +: 1 ", output[output.index("Root Cause") :]), output
    assert not any(map(alive, pids))


# ---------------------------------------------------------------------------------------- without a launcher


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_others_say_that_one_may_have_died(data: Path, tmp_path: Path, killed: int) -> None:
    processes = start_by_hand(*command(data, tmp_path, *LONG, "--batch-size", "36"), processes=3)
    wait_for_checkpoint(processes[0], tmp_path / "last.pt", epoch=0)
    processes[killed].kill()
    outputs = ended(*processes)
    for rank in {0, 1, 2} - {killed}:
        assert processes[rank].returncode > 0
        assert re.search(rf"rank {rank}: error: .* another process .* it may have died", outputs[rank])
        assert "Traceback" not in outputs[rank]


def test_a_stuck_process_is_given_up_and_ends_too(data: Path, tmp_path: Path) -> None:
    processes = start_by_hand(*command(data, tmp_path, *LONG, "--step-timeout", "15"))
    wait_for_checkpoint(processes[0], tmp_path / "last.pt", epoch=0)
    processes[1].send_signal(signal.SIGSTOP)
    try:
        output = ended(processes[0])[0]
    finally:
        processes[1].send_signal(signal.SIGCONT)
    assert "rank 0: error: another process did not answer for 15 s: it is stuck, or it may have died" in output
    assert "Traceback" not in output
    assert re.search(r"rank 1: error: .*another process .* it may have died", ended(processes[1])[0])


def test_a_second_ctrl_c_does_not_disturb_the_end() -> None:
    body = """
        import time, processes

        processes.interrupt_once()
        print("ready", flush=True)
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            time.sleep(1)
            print("put in order")
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body)],
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    assert ended(process) == ["put in order\n"]
    assert process.returncode == 0


@pytest.mark.slow
def test_long_waits_that_are_no_training_step_are_no_failure(data: Path, tmp_path: Path) -> None:
    """Rank 0 saves slowly; rank 1 clusters and evaluates slowly; all longer than a step may take."""
    script = changed_script(tmp_path, """
        def slowly(function):
            def wrapper(*arguments, **options):
                time.sleep(8)
                return function(*arguments, **options)
            return wrapper

        if RANK == 0:
            checkpoint.save = slowly(checkpoint.save)
        else:
            training.evaluate = slowly(training.evaluate)
            training.make_sampler = slowly(training.make_sampler)
    """)  # fmt: skip
    options = ("--epochs", "2", "--step-timeout", "6")
    for process in start_by_hand(*command(data, tmp_path / "run", *options), script=script):
        finish(process)
    assert len(results(tmp_path / "run")["history"]) == 2


# ---------------------------------------------------------------------------------------- the same numbers


def test_saves_once_and_shares_the_encoding(data: Path, tmp_path: Path) -> None:
    script = changed_script(tmp_path, """
        import encoders

        log = open(f"{sys.argv[-1]}-{RANK}.log", "w", buffering=1)
        save, encode = checkpoint.save, encoders.ImageEncoder.forward

        def logged_save(path, state):
            log.write(f"save {path.name}\\n")
            save(path, state)

        def logged_encode(self, images, mask):
            if not self.training:
                log.write(f"encode {len(images)}\\n")
            return encode(self, images, mask)

        checkpoint.save, encoders.ImageEncoder.forward = logged_save, logged_encode
        sys.argv.pop()
    """)  # fmt: skip
    options = (*command(data, tmp_path / "run", "--epochs", "1"), str(tmp_path / "rank"))
    for process in start_by_hand(*options, script=script):
        finish(process)
    logs = [(tmp_path / f"rank-{rank}.log").read_text().splitlines() for rank in (0, 1)]
    assert [line for line in logs[0] if line.startswith("save")] == ["save last.pt", "save best.pt"]
    assert not [line for line in logs[1] if line.startswith("save")]
    for log in logs:  # half of the 24 images of dev, then half of the 24 of test
        assert [line for line in log if line.startswith("encode")] == ["encode 12", "encode 12"]


def test_gradients_of_what_the_processes_exchange(tmp_path: Path) -> None:
    """All compute the same from everything, so what one put in gets the sum of their equal gradients."""
    script = tmp_path / "exchange.py"
    script.write_text(
        textwrap.dedent("""
        import os, torch, processes

        with processes.together("cpu", 20.0):
            rank = processes.rank()
            x = torch.arange(6.0).view(2, 3).add(10 * rank).requires_grad_()
            weight = torch.arange(12.0).view(4, 3)
            rows = processes.gather_rows(x)
            assert rows.tolist() == [[0, 1, 2], [3, 4, 5], [10, 11, 12], [13, 14, 15]], rows
            (grad,) = torch.autograd.grad((rows * weight).sum(), x)
            assert torch.equal(grad, 2 * weight[2 * rank : 2 * rank + 2]), grad
            total = processes.add_up(x)
            assert total.tolist() == [[10, 12, 14], [16, 18, 20]], total
            (grad,) = torch.autograd.grad((total * weight[:2]).sum(), x)
            assert torch.equal(grad, 2 * weight[:2]), grad
    """)
    )
    for process in start_by_hand(script=script):
        finish(process)


@pytest.mark.slow
def test_killed_in_mid_epoch_and_resumed_on_two_ends_with_the_same_numbers(data: Path, tmp_path: Path) -> None:
    options = ("--epochs", "3", "--checkpoint-every", "2")  # with dropout: each rank has its own random state
    finish(start(*command(data, tmp_path / "whole", *options), launcher=TORCHRUN))
    killed = start(*command(data, tmp_path / "killed", *options), launcher=TORCHRUN)
    wait_for_checkpoint(killed, tmp_path / "killed" / "last.pt", epoch=1)
    for pid in (killed.pid, *ranks_of(killed)):
        os.kill(pid, signal.SIGKILL)
    ended(killed)
    assert not (tmp_path / "killed" / "metrics.json").exists()
    output = finish(start(*command(data, tmp_path / "killed", *options, "--resume"), launcher=TORCHRUN))
    assert re.search(r"resumed in epoch \d+ after [1-9]\d* steps", output)
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
