"""bench: models timed side by side, against a dense baseline."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpo_formats import ConfigError
from mpo_runtime.bench import report
from mpo_runtime.bench.contestant import Contestant, open_contestant
from mpo_runtime.bench.densify import write_densified
from mpo_runtime.bench.run import Outcome, check_same_model, measure
from mpo_runtime.bench.settings import BenchSettings
from mpo_runtime.cli import console

INTERRUPTED = 130


def run_bench(
    files: Sequence[Path],
    dense: Path | None,
    baseline: bool,
    settings: BenchSettings,
    options: dict[str, Any],
    form: str,
) -> None:
    """Times the models and prints what was found.

    Args:
        dense: the baseline's file; with `baseline` and without it the first file's terms are densified.
        options: of `load_network`.
        form: `table`, `json`, `csv` or `md`.
    """
    labels = report.names_apart([file.name for file in files])
    given = [open_contestant(file, options["chi"], name=label) for file, label in zip(files, labels, strict=True)]
    for one in given:
        settings.check_context(one.name, one.spec.architecture)
    with with_baseline(given, dense, baseline) as contestants, console.progress("bench") as update:
        outcome = measure(contestants, settings, options, update)
    show(outcome, form)
    if not outcome.complete:
        print("mpo-run: interrupted; this is what was measured", file=sys.stderr)
        sys.exit(INTERRUPTED)


@contextmanager
def with_baseline(given: list[Contestant], dense: Path | None, baseline: bool) -> Iterator[list[Contestant]]:
    """The models with the baseline behind them; a densified one is a temporary file."""
    if dense is None and not baseline:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="mpo-bench-") as folder:
        if dense is None:
            print("note: writing the terms as dense bf16 matrices, for the baseline", file=sys.stderr)
            path = Path(folder) / "densified.mpo"
            write_densified(given[0].path, path)
            found = open_contestant(path, None, baseline=True, name="densified (bf16)")
        else:
            found = open_contestant(dense, None, baseline=True, name=f"{dense.name} (baseline)")
        check_same_model(given, found)
        yield [*given, found]


def show(outcome: Outcome, form: str) -> None:
    """Prints the outcome in one of the forms."""
    rows = report.records(outcome)
    verdicts = [row["text"] for row in report.verdicts(outcome)]
    if form == "json":
        command = shlex.join(["mpo-run", *(Path(word).name if "/" in word else word for word in sys.argv[1:])])
        print(console.json_text(report.document(outcome, command), indent=1))
    elif form == "csv":
        print(report.csv_text(rows))
    elif form == "md":
        print("\n\n".join([report.markdown(rows), report.conditions(outcome), *verdicts]))
    else:
        print_table(report.table(rows))
        print("\n".join([report.conditions(outcome), *verdicts]))


def print_table(lines: Sequence[Sequence[str]]) -> None:
    """Prints head and rows in columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    head, *body = lines
    shown = Table(box=None, pad_edge=False)
    for place, name in enumerate(head):
        shown.add_column(Text(name), justify="left" if place in (0, 4) else "right", no_wrap=True)
    for row in body:
        shown.add_row(*map(Text, row))
    width = max(sum(max(len(line[place]) for line in lines) + 2 for place in range(len(head))), 80)
    Console(width=width).print(shown)


def one_form(as_json: bool, as_csv: bool, as_markdown: bool) -> str:
    """The form of the output; raises ConfigError where several were asked for."""
    asked = [name for name, wanted in (("json", as_json), ("csv", as_csv), ("md", as_markdown)) if wanted]
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(f'--{name}' for name in asked)}: give one of them")
    return asked[0] if asked else "table"
