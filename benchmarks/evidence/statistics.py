"""Paired differences with t intervals and power, without SciPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Summary(NamedTuple):
    """Of n values: their mean and its standard error (NaN where n is 1)."""

    n: int
    mean: float
    error: float


class Difference(NamedTuple):
    """Paired difference to the base: mean, half of its 95% t interval, and the smallest true difference that an
    experiment of this size and scatter finds at 5% with probability 0.8. NaN where fewer than 2 pairs are there."""

    n: int
    mean: float
    half: float
    detectable: float


def summarize(values: Sequence[float]) -> Summary:
    """Mean and standard error.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("values: expected at least one, got none")
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Summary(1, mean, math.nan)
    variance = math.fsum((x - mean) ** 2 for x in values) / (n - 1)
    return Summary(n, mean, math.sqrt(variance / n))


def paired(ours: Sequence[float], base: Sequence[float]) -> Difference:
    """ours − base, pair by pair.

    Raises:
        ValueError: the two differ in length or are empty.
    """
    if len(ours) != len(base):
        raise ValueError(f"ours and base: expected equal lengths, got {len(ours)} and {len(base)}")
    n, mean, error = summarize([a - b for a, b in zip(ours, base, strict=True)])
    if n == 1:
        return Difference(1, mean, math.nan, math.nan)
    t = t_quantile(0.975, n - 1)
    return Difference(n, mean, t * error, (t + t_quantile(0.8, n - 1)) * error)


def number(x: float, sign: bool = False) -> str:
    """One decimal; empty for NaN."""
    return "" if math.isnan(x) else f"{x:+.1f}" if sign else f"{x:.1f}"


def t_quantile(p: float, df: int) -> float:
    """The p-quantile of Student's t with ``df`` degrees of freedom, by bisection on :func:`t_cdf`."""
    if not 0 < p < 1 or df < 1:
        raise ValueError(f"expected 0 < p < 1 and df >= 1, got {p} and {df}")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def t_cdf(t: float, df: int) -> float:
    """P(T <= t), by the finite sums for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    theta = math.atan2(abs(t), math.sqrt(df))
    sine, cosine = math.sin(theta), math.cos(theta)
    if df % 2:
        total, term = 0.0, cosine
        for k in range(1, (df - 1) // 2 + 1):
            total += term
            term *= cosine**2 * 2 * k / (2 * k + 1)
        inside = 2 / math.pi * (theta + sine * total)
    else:
        total, term = 0.0, 1.0
        for k in range(1, df // 2 + 1):
            total += term
            term *= cosine**2 * (2 * k - 1) / (2 * k)
        inside = sine * total
    return 0.5 + math.copysign(inside, t) / 2 if t else 0.5
