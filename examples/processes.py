"""One process, or several started by torchrun: how they come together and end, and the few things that differ."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

JOIN = timedelta(minutes=5)  # until the last process has started
PATIENCE = timedelta(hours=2)  # outside of training steps, where one may work while the others wait
LAST_INTERRUPT = 10.0  # seconds for which further ones are not heard
LAUNCHER_LOOKS = 3.0  # seconds in which torchrun sees which process failed first, and ends the others


class PeerLost(ConnectionError):
    """Another process does not answer, or the connection to it is gone, and most likely the process too."""


@contextlib.contextmanager
def together(device: str, step_timeout: float) -> Iterator[torch.device]:
    """Joins the group that torchrun's environment describes, if any, and gives the device of this process.

    While it lasts, the end of one process ends all: torchrun ends the others, and who waits for a dead one in a
    collective operation fails at once. A process that lives and does not answer is given up after ``step_timeout``
    seconds within a training step (gloo; NCCL counts by its own default), and after :data:`PATIENCE` where one may
    work while the others wait.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    interrupt_once()
    if planned() == 1:
        yield torch.device(device)
        return
    if device == "cuda":
        local = os.environ.get("LOCAL_RANK") or int(os.environ["RANK"]) % torch.cuda.device_count()  # no torchrun
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    try:
        _join("nccl" if device.startswith("cuda") else "gloo", timedelta(seconds=step_timeout))
        yield torch.device(device)
        wait()  # who leaves while others still talk to it ends them
        dist.destroy_process_group()
    except Exception as error:
        lost = _lost_peer(error)
        if lost is None:
            get_error_handler().record_exception(error)  # torchrun shows the first that is recorded as the cause of all
            raise
        time.sleep(LAUNCHER_LOOKS)  # this is not the first
        raise lost from error


def _join(backend: str, step_timeout: timedelta) -> None:
    store, me, world = next(dist.rendezvous("env://", timeout=JOIN))
    store.set(f"joined/{me}", "")
    store.wait([f"joined/{r}" for r in range(world)], JOIN)
    # loss and DDP use the default group: short waits, as all are in the same training step
    timeout = step_timeout if backend == "gloo" else None
    dist.init_process_group(backend, store=store, rank=me, world_size=world, timeout=timeout)
    _patient_group()


def _lost_peer(error: Exception) -> PeerLost | None:
    """What the plain RuntimeError of gloo or of a store means, or None if ``error`` is another one."""
    text = str(error)
    if not isinstance(error, RuntimeError):
        return None
    if "Timed out waiting" in text or "Application timeout" in text:
        waited = re.search(r"(\d+)ms", text)
        how_long = f"for {int(waited[1]) / 1000:g} s" if waited else "in time"
        return PeerLost(
            f"another process did not answer {how_long}: it is stuck, or it may have died (if it is only slow, give "
            "training steps a longer --step-timeout)"
        )
    if "gloo" in text.lower() or isinstance(error, dist.DistError):
        return PeerLost(f"the connection to another process was closed: it may have died ({text.splitlines()[0]})")
    return None


def interrupt_once() -> None:
    """A second Ctrl-C does not disturb the end that the first one brings.

    Of several processes the second comes always: the terminal sends it to all, and torchrun passes on its own. One that
    comes long after is listened to again: the first may have met a place that swallows exceptions.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread may say what a signal does
    last = -LAST_INTERRUPT

    def interrupt(*_: object) -> None:
        nonlocal last
        if time.monotonic() - last > LAST_INTERRUPT:
            last = time.monotonic()
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


@functools.cache
def _patient_group() -> dist.ProcessGroup:
    """For all that is no training step. Gloo on every device: what it carries is small, and it times out on its own."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def signed(message: str) -> str:
    """``message``, and of several processes, whose it is."""
    return f"rank {os.environ['RANK']}: {message}" if planned() > 1 else message


def planned() -> int:
    """How many processes torchrun starts; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def shard(n: int) -> range:
    """Which of n items this process handles: consecutive, sizes that differ by at most one."""
    return range(n * rank() // count(), n * (rank() + 1) // count())


def gather_shards(mine: Tensor, n: int) -> Tensor:
    """The rows, on the CPU, of all processes' :func:`shard` of n items, in order, on every process."""
    if count() == 1:
        return mine
    most = -(-n // count())
    padded = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(count())]
    dist.all_gather(parts, padded, group=_patient_group())
    sizes = [n * (r + 1) // count() - n * r // count() for r in range(count())]
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def from_main(text: str) -> str:
    """A string of the main process, on all."""
    if count() == 1:
        return text
    box = [text]
    dist.broadcast_object_list(box, src=0, group=_patient_group())
    return box[0]


def wait() -> None:
    """Until all processes are here, however long one of them still works. To be called before training steps."""
    if count() > 1:
        dist.barrier(group=_patient_group())


def gather_objects(mine: object) -> list:
    """Small picklable objects of all processes, in rank order."""
    if count() == 1:
        return [mine]
    everyone: list = [None] * count()
    dist.all_gather_object(everyone, mine, group=_patient_group())
    return everyone


def gather_rows(x: Tensor) -> Tensor:
    """The rows of all processes in rank order, with gradient; every process has equally many."""
    return _GatherRows.apply(x) if count() > 1 else x


def add_up(x: Tensor) -> Tensor:
    """The sum of the tensors of all processes, with gradient."""
    return _AddUp.apply(x) if count() > 1 else x


# In both, what one process puts in is used by all, so its gradient is the sum of what all pass back.


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(count())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _add_up(grad).chunk(count())[rank()]


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _add_up(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _add_up(grad)


def _add_up(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def progress(items: Any, what: str, **options: Any) -> Any:
    """A bar on what takes longer than two seconds; the main process shows it, on a terminal, not in a log."""
    from tqdm.auto import tqdm

    hidden = not is_main() or not sys.stderr.isatty()
    return tqdm(items, desc=what, delay=2, leave=False, dynamic_ncols=True, disable=hidden, **options)


def say(text: str) -> None:
    """Once, however many processes there are."""
    if is_main():
        print(text, flush=True)


def warn(text: str) -> None:
    """As :func:`say`, where it does not mix with the results."""
    if is_main():
        print(f"warning: {text}", file=sys.stderr, flush=True)
