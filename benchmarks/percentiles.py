"""Figures in, columns of p50, p95, p99 and the largest out, as the benchmarks print them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

HEADER = "".join(f"{name:>9}" for name in ("p50", "p95", "p99", "max"))


def cells(values: Sequence[float]) -> str:
    """Dashes below two figures, which have no percentiles."""
    if len(values) < 2:
        return f"{'-':>9}" * 4
    cuts = statistics.quantiles(values, n=100)
    return "".join(f"{each:>9.1f}" for each in (cuts[49], cuts[94], cuts[98], max(values)))
