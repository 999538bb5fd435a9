"""Cells of tables: the rows of a file of results, figures in words, and a Markdown table of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "results"
Row = dict[str, Any]


def rows_of(name: str) -> list[Row]:
    """The rows of a file of results."""
    return list(json.loads((RESULTS / name).read_text(encoding="utf-8"))["rows"])


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(line) + " |" for line in (head, *body)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


def digits(value: float, count: int = 2) -> str:
    """A figure with `count` digits that count, and none behind the point from 10 on where two are enough."""
    if value == 0:
        return "0"
    whole = len(str(int(abs(value))))
    behind = count - whole if abs(value) >= 1 else count - 1 - int(f"{value:e}".split("e")[1])
    return f"{value:.{max(behind, 0)}f}"


def kl(value: float) -> str:
    """A divergence with as many places as count."""
    places = 4 if value < 0.2 else 3 if value < 2 else 2 if value < 10 else 1
    return f"{value:.{5 if 0 < value < 1e-4 else places}f}"


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{100 * share:.1f} %"


def before_and_after(before: float, after: float, digits: int) -> str:
    """Both figures and the relative change."""
    return f"{before:.{digits}f} → {after:.{digits}f} ({100 * (after / before - 1):+.1f} %)"
