"""The headline table from scratch, in some minutes on 2 cores: size, quality and speed of granite-nano's files (`make bench`).

    python benchmarks/headline.py [--out benchmarks/results/DATE-headline.json] [--compare FILE]

The embedded model is exported by five plans, each file is measured on the embedded evaluation text beside the dense model, and
all are timed in turns with `mpo-run bench` (64 decoded tokens, a prompt of 256). --compare reads earlier results: bytes must
agree within 1 % and KL within 10 % (fits run in another order of additions on another number of threads), else the script
ends with status 1. Speed belongs to the machine and is printed, not compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_plans import row
from parts.results import write_results

from mpo_exporter.export import ExportTask, export
from mpo_exporter.plan.options import Options, Target
from mpo_exporter.source import data_folder, open_source
from mpo_exporter.texts import calibration_text
from mpo_runtime.bench import report
from mpo_runtime.bench.contestant import open_contestant
from mpo_runtime.bench.run import measure
from mpo_runtime.bench.settings import BenchSettings
from mpo_runtime.text.token_text import read_tokens

PLANS = {
    "auto, 4.25 bits": Options("auto", target=Target(bits_per_weight=4.25)),
    "auto, 3 bits": Options("auto", target=Target(bits_per_weight=3.0)),
    "int4": Options("int4"),
    "paper, χ ≤ 32": Options("paper", chi=32),
    "k-proj, rank 128": Options("k-proj"),
}
SPREAD = {"bytes": 0.01, "kl_mean": 0.10}
LOADED = {"chi": None, "device": "cpu", "backend": "auto", "kv_type": "auto", "activations": "int8"}


def quality(folder: Path, tokens: int) -> dict[str, dict[str, Any]]:
    """Exports every plan into `folder`; the measured rows by plan."""
    rows = {}
    with open_source("demo") as source:
        text = read_tokens(data_folder() / "evaluation.jsonl", *source.text_files)
        text = replace(text, ids=text.ids[:tokens])
        for number, (name, options) in enumerate(PLANS.items()):
            task = ExportTask(folder / f"{number}.mpo", options, text=text, calibration=calibration_text(source))
            rows[name] = row(options, True, export(source, task))
            print(f"exported and measured: {name}", flush=True)
    return rows


def speed(folder: Path, repetitions: int) -> list[dict[str, Any]]:
    """The records of `mpo-run bench` on the exported files and the dense model."""
    files = [open_contestant(folder / f"{number}.mpo", None, name=name) for number, name in enumerate(PLANS)]
    dense = open_contestant(data_folder() / "granite-nano", None, name="dense", baseline=True)
    settings = BenchSettings(prompt=(256,), tokens=(64,), repetitions=repetitions)
    return report.records(measure([*files, dense], settings, LOADED, lambda stage, done, total: None))


def joined(quality_rows: dict[str, dict[str, Any]], speeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each plan, and one for the dense model."""
    reference = next(iter(quality_rows.values()))["reference"]
    unchanged = {"kl_mean": 0.0, "same_top1": 1.0, "model": reference}
    found = []
    for name in [*quality_rows, "dense"]:
        timed = {one["kind"]: one for one in speeds if one["model"] == name}
        measured = quality_rows.get(name, unchanged)
        entry: dict[str, Any] = {"name": name, **{key: timed["decode"][key] for key in ("bytes", "peak_bytes")}}
        entry |= {"kl_mean": measured["kl_mean"], "same_top1": measured["same_top1"]}
        entry["perplexity"] = measured["model"]["perplexity"]
        entry |= {key: measured[key] for key in ("cosine", "mse") if key in measured}
        for kind, one in timed.items():
            entry[f"{kind}_tokens_per_second"] = one["tokens_per_second"]
            entry[f"{kind}_deviation"] = one["tokens_per_second_deviation"]
        found.append(entry)
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = [
        "| file | MB | perplexity | KL | same top token | decoding, tokens/s | prompt, tokens/s | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        lines.append(
            f"| {one['name']} | {one['bytes'] / 1e6:.2f} | {one['perplexity']:.2f} | {one['kl_mean']:.4f} | "
            f"{100 * one['same_top1']:.1f} % | {one['decode_tokens_per_second']:.0f} ± {one['decode_deviation']:.0f} | "
            f"{one['prompt_tokens_per_second']:.0f} ± {one['prompt_deviation']:.0f} | {one['peak_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def differences(rows: list[dict[str, Any]], earlier: list[dict[str, Any]]) -> list[str]:
    """What differs from earlier rows by more than SPREAD, in words."""
    found = []
    known = {one["name"]: one for one in earlier}
    for one in rows:
        if one["name"] not in known:
            found.append(f"{one['name']}: the earlier results have no such row")
            continue
        for figure, most in SPREAD.items():
            then, now = known[one["name"]][figure], one[figure]
            if abs(now - then) > most * max(abs(then), 1e-9):
                found.append(f"{one['name']}: {figure} is {now:.6g}, was {then:.6g} (spread {100 * most:.0f} %)")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of the evaluation text")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder for the files; they are kept")
    parser.add_argument("--compare", type=Path, help="earlier results")
    parser.add_argument("--out", type=Path, help="JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = joined(quality(folder, arguments.tokens), speed(folder, arguments.repetitions))
    print(markdown(rows))
    write_results(arguments.out, rows, tokens=arguments.tokens)
    if arguments.compare:
        found = differences(rows, json.loads(arguments.compare.read_text(encoding="utf-8"))["rows"])
        print("\n".join(found) or f"within the spread of {arguments.compare.name}")
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
