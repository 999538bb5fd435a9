"""Writes the tables of docs/results.md that follow a line `<!-- table: NAME -->` from the files of results.

    python benchmarks/tables.py            # writes them
    python benchmarks/tables.py --check    # ends with status 1 where one is not what the results say

A test checks them too, and demands that every other section with a table names a file of results. To add a table, write a
function that returns its lines, name it in TABLES, and put the line into the document.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "benchmarks" / "results"
MARKER = re.compile(r"^(<!-- table: ([\w-]+) -->\n\n)((?:\|.*\n)*)", re.MULTILINE)


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of a file of results."""
    return list(json.loads((RESULTS / name).read_text(encoding="utf-8"))["rows"])


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(line) + " |" for line in (head, *body)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


def plan_name(row: dict[str, Any]) -> str:
    """What a row of bench_plans.py is called."""
    if row["plan"] == "auto":
        return f"`auto`, {row['bits_per_weight']:.2f} bits"
    size = f", χ ≤ {row['chi']}" if row["plan"] in ("corrected", "paper") else ""
    return f"`{row['plan']}`{size}{', calibrated' if row['calibrated'] else ''}"


def plans() -> str:
    """The named plans."""
    rows = sorted(rows_of("2026-11-25-plans.json"), key=lambda row: -float(row["bits_per_weight"]))
    body = [
        (
            plan_name(row),
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['bits_per_weight']:.2f}",
            str(row["layers_with_cores"]),
            f"{row['model']['perplexity']:.2f} ± {row['model']['error']:.2f}",
            f"{row['kl_mean']:.4f}",
            f"{100 * row['same_top1']:.1f} %",
        )
        for row in rows
    ]
    return table(("plan", "MB", "bits per weight", "layers with cores", "perplexity", "KL", "same top token"), body)


def amx() -> str:
    """Decoding on a CPU with AMX, written down by hand."""
    rows = rows_of("2026-11-29-amx-by-hand.json")
    shown = [[row["name"], *(row.get(key, "") for key in ("gigabytes", "decode", "share", "prompt"))] for row in rows]
    body = [[str(cell) for cell in row] for row in shown]
    return table(("file", "GB", "decode tokens/s", "of the bandwidth", "prompt tokens/s"), body)


TABLES: dict[str, Callable[[], str]] = {"plans": plans, "amx": amx}


def written(text: str) -> str:
    """A document with its tables as the results have them; raises KeyError for a table that is not known."""
    return MARKER.sub(lambda found: found[1] + TABLES[found[2]](), text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    after = written(before)
    if not arguments.check:
        PAGE.write_text(after, encoding="utf-8")
    elif after != before:
        sys.exit(f"{PAGE}: a table is not what the results say; run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
