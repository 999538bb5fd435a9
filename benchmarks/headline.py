"""The headline table from scratch, in some minutes on 2 cores: size, quality and speed of granite-nano's files (`make bench`).

    python benchmarks/headline.py [--out benchmarks/results/DATE-headline.json] [--compare FILE]
    python benchmarks/headline.py --model smollm2 --plans k-proj --out benchmarks/results/DATE-k-proj-smollm2.json
    python benchmarks/headline.py --geometry neo --plans k-proj --out benchmarks/results/DATE-k-proj-neo.json

The model, the embedded one unless --model names another, is exported by each plan, each file is measured on the embedded
evaluation text beside the dense model, and all are timed in turns with `mpo-run bench` (64 decoded tokens, a prompt of 256).
--geometry makes a model of full size with random weights (benchmarks/fullsize.py) for memory and speed; quality needs real
weights and is not measured then. --compare reads earlier results: bytes must agree within 1 % and KL within 10 % (fits run in
another order of additions on another number of threads), else the script ends with status 1. Speed belongs to the machine and is
printed, not compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fullsize
from bench_plans import row
from parts.results import write_results

from mpo_exporter.export import ExportTask, Result, export
from mpo_exporter.plan.options import Options, Target
from mpo_exporter.source import data_folder, open_source
from mpo_exporter.texts import calibration_text
from mpo_formats import ModelSpec, Mpo
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


def quality(model: str, plans: Mapping[str, Options], folder: Path, tokens: int) -> dict[str, dict[str, Any]]:
    """Exports every plan into `folder`; the rows by plan, measured unless `tokens` is 0: then the weights are random."""
    rows = {}
    with open_source(model) as source:
        text = calibration = None
        if tokens:
            text = read_tokens(data_folder() / "evaluation.jsonl", *source.text_files)
            text, calibration = replace(text, ids=text.ids[:tokens]), calibration_text(source)
        for number, (name, options) in enumerate(plans.items()):
            found = export(
                source, ExportTask(folder / f"{number}.mpo", options, text=text, calibration=calibration, force=True)
            )
            rows[name] = facts(options, found)
            print(f"exported{' and measured' if tokens else ''}: {name}", flush=True)
    return rows


def facts(options: Options, found: Result) -> dict[str, Any]:
    """What an export says of a file: quality where it was measured, and of `k-proj` the rank of each block."""
    measured = row(options, True, found) if found.comparison else {}
    return {"ranks": key_ranks(found.spec), **measured} if options.named.replaces_keys else measured


def key_ranks(spec: ModelSpec) -> list[int]:
    """The rank of each block's key projection that is stored as cores."""
    keys = [linear.terms for linear in spec.linears if linear.name.endswith(".self_attn.k_proj")]
    return [term.bonds[0] for terms in keys for term in terms if isinstance(term, Mpo)]


def speed(plans: Mapping[str, Options], dense: Path, folder: Path, repetitions: int) -> list[dict[str, Any]]:
    """The records of `mpo-run bench` on the exported files and the dense model."""
    files = [open_contestant(folder / f"{number}.mpo", None, name=name) for number, name in enumerate(plans)]
    unchanged = open_contestant(dense, None, name="dense", baseline=True)
    settings = BenchSettings(prompt=(256,), tokens=(64,), repetitions=repetitions)
    return report.records(measure([*files, unchanged], settings, LOADED, lambda stage, done, total: None))


def joined(rows: dict[str, dict[str, Any]], speeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each plan, and one for the dense model."""
    first = next(iter(rows.values()))
    unchanged = {"kl_mean": 0.0, "same_top1": 1.0, "model": first["reference"]} if "reference" in first else {}
    found = []
    for name in [*rows, "dense"]:
        timed = {one["kind"]: one for one in speeds if one["model"] == name}
        measured = rows.get(name, unchanged)
        entry: dict[str, Any] = {"name": name, **{key: timed["decode"][key] for key in ("bytes", "peak_bytes")}}
        entry |= {key: measured[key] for key in ("kl_mean", "same_top1", "cosine", "mse") if key in measured}
        if measured.get("ranks"):
            entry["ranks"] = measured["ranks"]
        if "model" in measured:
            entry["perplexity"] = measured["model"]["perplexity"]
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
        known = "kl_mean" in one
        cells = [one["name"], f"{one['bytes'] / 1e6:.2f}", f"{one['perplexity']:.2f}" if known else ""]
        cells += [f"{one['kl_mean']:.4f}", f"{100 * one['same_top1']:.1f} %"] if known else ["", ""]
        cells += [
            f"{one[f'{kind}_tokens_per_second']:.1f} ± {one[f'{kind}_deviation']:.1f}" for kind in ("decode", "prompt")
        ]
        lines.append("| " + " | ".join([*cells, f"{one['peak_bytes'] / 1e6:.0f}"]) + " |")
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


def key_lines(rows: list[dict[str, Any]]) -> list[str]:
    """What a plan did that replaces key projections, before and after."""
    dense, found = rows[-1], []
    for one in rows[:-1]:
        if "ranks" not in one:
            continue
        found.append(f"{one['name']}, before → after; ranks of the blocks {one['ranks']}")
        if "cosine" in one:
            found.append(f"  logits: cosine {one['cosine']:.5f}, mean squared error {one['mse']:.4f}")
        else:
            found.append("  logits: not measured; the weights are random, and quality needs real ones")
        pairs = {"resident memory, MB": "peak_bytes", "tokens/s": "decode_tokens_per_second"}
        for name, key in pairs.items():
            scale = 1e-6 if key == "peak_bytes" else 1.0
            before, after = dense[key] * scale, one[key] * scale
            found.append(f"  {name}: {before:.1f} → {after:.1f} ({100 * (after / before - 1):+.1f} %)")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a name, GGUF file, or folder, as mpo-export takes it")
    parser.add_argument("--geometry", choices=fullsize.CONFIGS, help="a model of this size with random weights")
    parser.add_argument("--plans", nargs="+", help="those whose names begin so; all where none is given")
    parser.add_argument("--tokens", type=int, default=8192, help="of the evaluation text")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder for the files; they are kept")
    parser.add_argument("--compare", type=Path, help="earlier results")
    parser.add_argument("--out", type=Path, help="JSON")
    arguments = parser.parse_args()
    plans = {name: options for name, options in PLANS.items() if name.startswith(tuple(arguments.plans or ("",)))}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        model, dense = arguments.model, data_folder() / "granite-nano"
        if arguments.geometry:
            dense = folder / arguments.geometry
            model, arguments.tokens = str(dense), 0
            if not dense.exists():
                fullsize.write_checkpoint(dense, fullsize.CONFIGS[arguments.geometry])
        elif model != "demo":
            dense = folder / "dense.mpo"
            with open_source(model) as source:
                export(source, ExportTask(dense, Options("dense"), force=True))
        rows = joined(
            quality(model, plans, folder, arguments.tokens), speed(plans, dense, folder, arguments.repetitions)
        )
    print("\n".join([markdown(rows), *key_lines(rows)]))
    name = arguments.geometry or Path(arguments.model).name
    write_results(arguments.out, rows, model=name, tokens=arguments.tokens)
    if arguments.compare:
        found = differences(rows, json.loads(arguments.compare.read_text(encoding="utf-8"))["rows"])
        print("\n".join(found) or f"within the spread of {arguments.compare.name}")
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
