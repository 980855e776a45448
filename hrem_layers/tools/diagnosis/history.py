"""What was logged: its form, and what can be seen in it alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from torch import Tensor

from hrem_layers._core.checks import said
from hrem_layers.loss import HREMTerms
from hrem_layers.tools.diagnosis.findings import Finding

Record = dict[str, float]
KNOWN = (*HREMTerms._fields, "grad_norm")
ENOUGH = 10
"""So many steps say something of a habit."""
ALWAYS = 0.95
"""Share of the steps."""


def read_history(history: object) -> list[Record]:
    """Numbers from whatever was logged; raises TypeError that says which entry is no terms."""
    if history is None:
        return []
    if isinstance(history, (str, bytes, HREMTerms, Mapping)) or not isinstance(history, Sequence):
        raise TypeError(f"history must be a sequence of HREMTerms or mappings, one per step, got {said(history)}")
    records = []
    for step, entry in enumerate(history):
        if isinstance(entry, HREMTerms):
            entry = entry._asdict()
        if not isinstance(entry, Mapping):
            raise TypeError(f"history[{step}] must be HREMTerms or a mapping of {', '.join(KNOWN)}, got {said(entry)}")
        try:
            records.append({name: _number(entry[name]) for name in KNOWN if name in entry})
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"history[{step}] must hold numbers or tensors of one element, got {said(entry)}"
            ) from error
    return records


def _number(value: object) -> float:
    if isinstance(value, Tensor):
        return float(value.detach().float())
    return float(value)  # type: ignore[arg-type]


def series(history: Sequence[Record], name: str) -> list[float]:
    return [record[name] for record in history if name in record]


def look_at_history(history: Sequence[Record], max_grad_norm: float | None) -> list[Finding]:
    """Clipping that is always active."""
    norms = series(history, "grad_norm")
    if max_grad_norm is None or len(norms) < ENOUGH:
        return []
    clipped = sum(norm > max_grad_norm for norm in norms)
    if clipped < ALWAYS * len(norms):
        return []
    middle = statistics.median(norms)
    seen = (
        f"The gradient was longer than max_grad_norm = {max_grad_norm:g} in {clipped} of {len(norms)} "
        "steps; its median "
        f"length is {middle:.3g}, {middle / max_grad_norm:.3g} times as much."
    )
    remedy = (
        "Each step then has the same length whatever the loss, and its sum or mean, its weights and "
        "the batch size change "
        f"nothing but the direction. Clip at outliers only: max_grad_norm above {_quantile(norms, 0.9):.2g} (the 90th "
        'percentile), or make the gradient smaller by reduction="mean" in the pair loss.'
    )
    return [Finding("clipping always active", seen, remedy)]


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]
