"""What TensorBoard shows of a run: every term of the loss, rates, norms, and what the graph of a batch looks like."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import processes
import torch
from torch import nn

from hrem_layers.retrieval import RetrievalMetrics


class Curves:
    """A ``SummaryWriter`` of the main process; on the others, and with ``every`` = 0 in steps, nothing.

    Args:
        folder: of the event files.
        run: where it stands; what an interrupted run wrote beyond that is no longer shown.
        every: steps between points.

    Raises:
        OSError: from any method, if the files cannot be written; names the folder.
    """

    def __init__(self, folder: Path, run: Any, every: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.every, self._graph = folder, every, GraphWatch(run.model.loss)
        self._board: Any = None
        self._hook = threading.excepthook
        if processes.is_main():
            threading.excepthook = self._quietly
            try:
                self._board = SummaryWriter(folder, purge_step=run.total_steps)
            except OSError as error:
                raise self._failed(error) from error

    def _quietly(self, what: threading.ExceptHookArgs) -> None:
        """The writer's thread hands what it meets over to the next call, which tells of it; once is enough."""
        if not isinstance(what.exc_value, OSError):
            self._hook(what)

    def __enter__(self) -> Curves:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._graph.remove()
        if self._board is None:
            return
        try:
            self._board.close()
        except Exception as failure:
            if kind is None:  # else the first error is the one to tell of
                raise self._failed(failure) from failure
        finally:
            threading.excepthook = self._hook

    def expect(self, step: int) -> None:
        """The step that is about to be made: if it will be logged, its graph is looked at."""
        self._graph.wanted = self._board is not None and self._due(step)

    def step(self, run: Any, values: dict[str, float]) -> None:
        if self._board is None or not self._due(run.total_steps):
            return
        scalars = {f"loss/{name}": value for name, value in values.items() if name != "gradient norm"}
        scalars["gradient_norm"] = values["gradient norm"]
        scalars["loss/relational"] = values["total"] - values["base"]
        scalars |= {f"learning_rate/{group['name']}": group["lr"] for group in run.optimizer.param_groups}
        if (temperature := _temperature(run.model.loss)) is not None:
            scalars["temperature"] = temperature
        self._add(scalars | self._graph.take(), run.total_steps)

    def epoch(self, run: Any, metrics: RetrievalMetrics) -> None:
        if self._board is not None:
            self._add({f"dev/{name}": value for name, value in metrics.as_dict().items()}, run.total_steps)

    def _due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def _add(self, scalars: dict[str, float], step: int) -> None:
        try:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        except Exception as error:  # the writer's thread hands over what it met, as it is
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> OSError:
        return OSError(f"{self.folder}: the curves could not be written ({getattr(error, 'strerror', None) or error})")


def _temperature(loss: nn.Module) -> float | None:
    pair_loss = getattr(loss, "pair_loss", None)
    log_scale = getattr(pair_loss, "log_scale", None)
    if isinstance(log_scale, torch.Tensor):
        return float(torch.exp(-log_scale.detach()))
    temperature = getattr(pair_loss, "temperature", None)
    return float(temperature) if isinstance(temperature, (int, float)) else None


class GraphWatch:
    """Looks at the graph that a step builds anyway: share of edges, mean and spread of the relevance on them."""

    def __init__(self, loss: nn.Module) -> None:
        self.wanted, self._found = False, {}
        graph = getattr(loss, "graph", None)
        self._hook = graph.register_forward_hook(self._look) if isinstance(graph, nn.Module) else None

    @torch.no_grad()
    def _look(self, _: nn.Module, __: Any, graph: Any) -> None:
        if not self.wanted:
            return
        self._found = {}
        for name in ("i2i", "i2t", "t2i", "t2t"):
            block = graph.block(name)
            edges, relevance = block.connection, block.relevance.float()
            count = edges.sum().clamp(min=1)
            mean = relevance.where(edges, 0).sum() / count
            spread = ((relevance - mean).square().where(edges, 0).sum() / count).sqrt()
            self._found |= {
                f"graph/edges_{name}": edges.sum() / (len(edges) * getattr(block, "columns", edges.shape[1])),
                f"graph/relevance_{name}": mean,
                f"graph/relevance_spread_{name}": spread,
            }

    def take(self) -> dict[str, float]:
        """Of the graph since the last call; empty if none was built."""
        found, self._found = self._found, {}
        return {name: float(value) for name, value in found.items()}

    def remove(self) -> None:
        if self._hook is not None:
            self._hook.remove()
