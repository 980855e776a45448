"""Compiled: rows of length 1 and their gradient, each in one pass over memory."""

from __future__ import annotations

import numpy as np

from hrem_layers.alignment.cpu.arguments import Array
from hrem_layers.alignment.cpu.compiling import compiled


@compiled(fastmath={"reassoc", "contract"})
def unit_rows(values: Array, source: Array, least: float, most: float, out: Array, inverse: Array) -> bool:
    """Writes ``values[source]`` / length to ``out`` and 1 / length to ``inverse``; whether every length² lies between
    ``least`` and ``most``, which no NaN does. If not, what was written is of no use."""
    usual = True
    for row in range(len(out)):
        given, written = values[source[row]], out[row]
        square = values.dtype.type(0)
        for j in range(len(written)):
            square += given[j] * given[j]
        usual &= (square > least) & (square < most)
        scale = values.dtype.type(1) / np.sqrt(square)
        inverse[row] = scale
        for j in range(len(written)):
            written[j] = given[j] * scale
    return usual


@compiled(fastmath={"reassoc", "contract"})
def unit_rows_grad(unit: Array, grad: Array, inverse: Array, source: Array, out: Array) -> None:
    """Of x̂ = x / ‖x‖: writes (g − x̂ <x̂, g>) / ‖x‖ to ``out[source]``."""
    for row in range(len(unit)):
        x, g, written = unit[row], grad[row], out[source[row]]
        along = grad.dtype.type(0)
        for j in range(len(x)):
            along += x[j] * g[j]
        for j in range(len(x)):
            written[j] = (g[j] - x[j] * along) * inverse[row]
