"""What a benchmark found, as records, a table, CSV, and a verdict in words."""

from __future__ import annotations

import csv
import datetime
import io
import statistics
from collections.abc import Sequence
from typing import Any

from mpo_runtime import __version__
from mpo_runtime.bench.run import Outcome, Series
from mpo_runtime.bench.settings import Case
from mpo_runtime.machine import cpu_name, system_name, usable_cpus

Row = dict[str, Any]


def spread(values: Sequence[float]) -> float:
    """The sample standard deviation, 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def record(series: Series, outcome: Outcome) -> Row:
    """One row: a model at a test, with means over repetitions; GB/s for decoding on the native backend alone."""
    one, test = series.contestant, series.test
    facts = outcome.facts[one.name]
    rates, bandwidth = series.rates, outcome.bandwidth(test.threads)
    moved = series.moved_bytes() if facts["backend"] == "native" else None
    rate = statistics.fmean(rates)
    speed = None if moved is None else moved * rate / test.batch / 1e9
    tokens = test.tokens * test.batch
    return {
        "model": one.name,
        "baseline": one.baseline,
        "bytes": one.bytes,
        "parameters": one.parameters,
        "peak_bytes": facts.get("peak_bytes"),
        "load_seconds": facts["load_seconds"],
        "backend": facts["backend"],
        "kernels": facts["kernels"]["native"],
        "threads": test.threads,
        "batch": test.batch,
        "depth": test.depth,
        "test": test.name,
        "kind": test.kind,
        "tokens": test.tokens,
        "repetitions": len(rates),
        "tokens_per_second": rate,
        "tokens_per_second_deviation": spread(rates),
        "samples": rates,
        "first_token_seconds": statistics.fmean(series.seconds) if test.kind == "prompt" else None,
        "gigabytes_per_second": speed,
        "read_bandwidth": bandwidth,
        "share_of_bandwidth": None if speed is None or not bandwidth else speed / bandwidth,
        "joules_per_token": statistics.fmean(series.joules) / tokens if series.joules else None,
    }


def records(outcome: Outcome) -> list[Row]:
    """All rows, model by model."""
    order = {one.name: place for place, one in enumerate(outcome.contestants)}
    measured = [series for series in outcome.series.values() if series.seconds]
    return [record(series, outcome) for series in sorted(measured, key=lambda one: order[one.contestant.name])]


def speed_ratio(ours: Series, theirs: Series) -> tuple[float, float]:
    """How many times as fast ours is: mean and deviation of the rounds' ratios."""
    ratios = [a / b for a, b in zip(ours.rates, theirs.rates, strict=False)]
    return statistics.fmean(ratios), spread(ratios)


def verdicts(outcome: Outcome) -> list[Row]:
    """For each model beside the baseline: its ratios of parameters, file bytes, memory and speed (test by test)."""
    base = next((one for one in outcome.contestants if one.baseline), None)
    if base is None:
        return []
    found = []
    for one in outcome.contestants:
        if one.baseline:
            continue
        speeds = []
        for test in outcome.settings.tests():
            ours, theirs = outcome.find(one, test), outcome.find(base, test)
            if ours.seconds and theirs.seconds:
                ratio, deviation = speed_ratio(ours, theirs)
                speeds.append({"test": test_label(test), "kind": test.kind, "ratio": ratio, "deviation": deviation})
        ours_peak, theirs_peak = (outcome.facts[model.name].get("peak_bytes") for model in (one, base))
        row: Row = {
            "model": one.name,
            "baseline": base.name,
            "parameters": one.parameters / base.parameters,
            "bytes": one.bytes / base.bytes,
            "memory": ours_peak / theirs_peak if ours_peak and theirs_peak else None,
            "speed": speeds,
        }
        found.append(row | {"text": verdict_text(row)})
    return found


def test_label(test: Case) -> str:
    """A test's name with its batch and threads where they are not plain."""
    batch = f", batch {test.batch}" if test.batch > 1 else ""
    return f"{test.name}{batch}, {test.threads} thread{'s' * (test.threads > 1)}"


def verdict_text(row: Row) -> str:
    """The four ratios in a sentence, and a plain word where the compressed model is slower."""
    parts = [f"{row['parameters']:.2f} x the parameters", f"{row['bytes']:.2f} x the bytes"]
    parts.append("memory unknown" if row["memory"] is None else f"{row['memory']:.2f} x the memory")
    for kind, what in (("decode", "decoding"), ("prompt", "with prompts")):
        found = [item for item in row["speed"] if item["kind"] == kind]
        ratios = sorted(item["ratio"] for item in found)
        if len(found) == 1:
            parts.append(f"{ratios[0]:.2f} ± {found[0]['deviation']:.2f} x the speed {what}")
        elif found:
            parts.append(f"{ratios[0]:.2f} to {ratios[-1]:.2f} x the speed {what}")
    text = f"{row['model']} beside {row['baseline']}: {', '.join(parts)}."
    level = [item["test"] for item in row["speed"] if abs(item["ratio"] - 1) <= item["deviation"]]
    slower = [item["test"] for item in row["speed"] if item["ratio"] < 1 and item["test"] not in level]
    if slower:
        text += f" SLOWER than the baseline at {'; '.join(slower)}."
    if level:
        text += f" No difference in speed beyond the spread at {'; '.join(level)}."
    return text


HEAD = ("model", "MB", "numbers", "peak MB", "test", "batch", "threads", "tokens/s", "first token", "GB/s", "of reads")


def cells(row: Row, energy: bool) -> list[str]:
    """A row of the table as text."""

    def shown(value: float | None, form: str, unit: float = 1.0) -> str:
        return "" if value is None else format(value / unit, form)

    first = row["first_token_seconds"]
    found = [
        row["model"],
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['parameters'] / 1e6:.1f} M",
        shown(row["peak_bytes"], ".0f", 1e6),
        row["test"],
        str(row["batch"]),
        str(row["threads"]),
        f"{row['tokens_per_second']:.2f} ± {row['tokens_per_second_deviation']:.2f}",
        "" if first is None else f"{1e3 * first:.0f} ms",
        shown(row["gigabytes_per_second"], ".2f"),
        shown(row["share_of_bandwidth"], ".2f"),
    ]
    return [*found, shown(row["joules_per_token"], ".2f")] if energy else found


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Head and rows of the table; energy has a column where it was measured."""
    energy = any(row["joules_per_token"] is not None for row in rows)
    return [[*HEAD, *(["J/token"] if energy else [])], *(cells(row, energy) for row in rows)]


def markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    head, *body = table(rows)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def csv_text(rows: Sequence[Row]) -> str:
    """The records as CSV, without the single repetitions."""
    out = io.StringIO()
    names = [name for name in rows[0] if name != "samples"]
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def conditions(outcome: Outcome) -> str:
    """What the figures were measured on, in a line."""
    reads = "; ".join(
        f"reads at {statistics.median(values):.1f} GB/s with {threads} thread{'s' * (threads > 1)} "
        f"({min(values):.1f} to {max(values):.1f})"
        for threads, values in outcome.bandwidths.items()
    )
    kernels = dict.fromkeys(f"{facts['backend']} ({facts['kernels']['native']})" for facts in outcome.facts.values())
    return f"{cpu_name()}, {usable_cpus()} usable CPUs; {reads or 'read bandwidth not measured'}; runs on {', '.join(kernels)}"


def document(outcome: Outcome, command: str) -> dict[str, Any]:
    """Everything as plain data, in the form of benchmarks/results: date, machine, commit, command, rows."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {"cpu": cpu_name(), "cores": usable_cpus(), "system": system_name()},
        "commit": __version__,
        "command": command,
        "complete": outcome.complete,
        "read_bandwidth": {str(threads): values for threads, values in outcome.bandwidths.items()},
        "rows": records(outcome),
        "verdicts": verdicts(outcome),
    }


def names_apart(files: Sequence[str]) -> list[str]:
    """Names of the models in the table: the files' own, with a number where several are called the same."""
    seen: dict[str, int] = {}
    found = []
    for file in files:
        seen[file] = seen.get(file, 0) + 1
        found.append(file if seen[file] == 1 else f"{file} ({seen[file]})")
    return found
