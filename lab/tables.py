"""Figures of many edits as tables in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from scipy.stats import bootstrap

Row = Mapping[str, Any]
# Of a column: its name, its digits, and how the figures of the edits come together.
Columns = Mapping[str, tuple[str, str, Callable[..., Any]]]


def table(rows: Iterable[Row], by: str, ways: Iterable[str], columns: Columns) -> str:
    """A line for each of the `ways`; figures that a row lacks, or that are not finite, are left out.

    Args:
        by: the key under which a row has its way.
    """
    rows = list(rows)
    lines = [f"| | {' | '.join(name for name, *_ in columns.values())} |", f"|---|{'---|' * len(columns)}"]
    for way in ways:
        cells = []
        for key, (_name, digits, together) in columns.items():
            values = [row[key] for row in rows if row[by] == way and np.isfinite(row.get(key, np.nan))]
            cells.append(f"{together(values):{digits}}" if values else "")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def beside(
    rows: Iterable[Row], by: str, ways: list[str], columns: Mapping[str, tuple[str, str]], less_is_more: set[str]
) -> str:
    """How every other way differs from the first on the same edits.

    Mean difference with its interval of 95 % (bootstrap over the edits), and in how many of them the other is better.

    Args:
        columns: name and digits of each figure.
    """
    rows = list(rows)
    by_way = {way: [row for row in rows if row[by] == way] for way in ways}
    first, *others = ways
    lines = [f"| beside {first} | {' | '.join(name for name, _ in columns.values())} |"]
    lines.append(f"|---|{'---|' * len(columns)}")
    for way in others:
        pairs = list(zip(by_way[first], by_way[way], strict=True))
        cells = []
        for key, (_name, digits) in columns.items():
            changes = np.array([theirs[key] - mine[key] for mine, theirs in pairs if key in mine])
            changes = changes[np.isfinite(changes)]
            better = int((changes < 0).sum() if key in less_is_more else (changes > 0).sum())
            low, high = interval(changes)
            cells.append(f"{changes.mean():+{digits}} ({low:+{digits}} … {high:+{digits}}), {better} of {len(changes)}")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Between which the mean lies with 95 % confidence, by bootstrap; NaN of fewer than two."""
    if len(values) < 2:
        return float("nan"), float("nan")
    low, high = bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return float(low), float(high)
