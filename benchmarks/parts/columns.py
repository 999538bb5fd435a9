"""The columns of benchmarks/quality.py --columns: at equal bytes integers, rotated integers, and these with cores beside them.

Each column is the plan `auto` with other options, so that its widths are chosen for what it may use. Every file is measured
before and after the same healing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpo_exporter.effort import NORMAL
from mpo_exporter.export import ExportTask, export
from mpo_exporter.heal.run import heal
from mpo_exporter.heal.settings import HealJob, Settings, parse_tokens
from mpo_exporter.plan.options import Options, Target
from mpo_exporter.source import Source, open_source
from mpo_exporter.terms import Transforms
from mpo_exporter.texts import calibration_text, held_out_text
from mpo_formats import MpoFile, PlanError
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.evaluation.kept import Kept
from mpo_runtime.measure import Logits, compare, window_logits
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.text.token_text import TokenText
from parts.quality_tables import columns_table
from parts.results import write_results

# Sizes of the whole file in bits per weight.
SIZES = (2.0, 2.25, 2.5, 3.0)
# The transforms of inputs that `auto` may use, and whether every matrix gets cores.
COLUMNS: dict[str, tuple[Transforms, bool]] = {
    "integers": ("none", False),
    "rotated": ("hadamard", False),
    "rotated, fitted": ("fitted", False),
    "with cores": ("hadamard", True),
}
# χ of the cores where none is given: the smallest was the best beside integers (docs/results.md).
CHI = 8
WINDOW = 256


@dataclass(slots=True)
class Columns:
    """The model, its texts, what the dense model says, and the rows that are kept."""

    source: Source
    calibration: TokenText
    text: TokenText
    arguments: argparse.Namespace
    kept: Kept
    logits: dict[bytes, Logits]

    def options(self, column: str, size: float, chi: int) -> Options:
        """The options of one file."""
        transforms, _ = COLUMNS[column]
        return Options(target=Target(bits_per_weight=size), transforms=transforms, chi=chi or None)

    def row(self, column: str, size: float, chi: int) -> dict[str, Any]:
        """Makes, heals and measures one file; or returns what is kept of it."""
        arguments = self.arguments
        facts = [column, size, chi, self.source.weights.sha256(), self.calibration.sha256, self.text.sha256]
        facts += [int(self.text.ids.size), arguments.windows, arguments.heal_tokens, str(arguments.heal_text)]
        key = json.dumps(facts)
        if key in self.kept.rows:
            return self.kept.rows[key]
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            task = ExportTask(
                Path(folder) / "row.mpo",
                self.options(column, size, chi),
                calibration=self.calibration,
                windows=arguments.windows,
            )
            try:
                result = export(self.source, task)
            except PlanError as error:
                return self.kept.add(key, {"column": column, "size": size, "chi": chi, "no_such_file": str(error)})
            found: dict[str, Any] = {
                "column": column,
                "size": size,
                "chi": chi,
                "file_bytes": result.file_bytes,
                "bits_per_weight": result.bits_per_weight,
                "layers_with_cores": result.core_layers,
                "export_seconds": round(time.process_time() - start, 1),
                "before": self.measure(result.path),
            }
            if arguments.heal_tokens != "0":
                target = Path(folder) / "healed.mpo"
                settings = Settings(tokens=parse_tokens(arguments.heal_tokens))
                heal(self.source, HealJob(result.path, target, settings, text=arguments.heal_text))
                found["after"] = self.measure(target)
        return self.kept.add(key, found | {"seconds": round(time.process_time() - start, 1)})

    def measure(self, path: Path) -> dict[str, float]:
        """KL, perplexity and equal top tokens of a file on the text."""
        with MpoFile(path) as file:
            model = decoder_for(file.spec.architecture, ReferenceOps(file, held=True))
            window = min(WINDOW, file.spec.architecture.max_position_embeddings)
            found = compare(model, self.dense, self.text.ids, window)
        return {"kl_mean": found.kl_mean, "same_top1": found.same_top1, "perplexity": found.model.perplexity}

    def dense(self, window: Any) -> Logits:
        """The dense model's logits of a window."""
        key = window.tobytes()
        if key not in self.logits:
            weights = self.source.weights
            model = decoder_for(weights.spec.architecture, ReferenceOps(weights))
            self.logits[key] = window_logits(model, window).copy()
        return self.logits[key]


def planned(arguments: argparse.Namespace) -> Iterator[tuple[str, float, int]]:
    """Column, size and χ of every file."""
    for size in arguments.size or SIZES:
        for column, (_, cores) in COLUMNS.items():
            for chi in (arguments.chi or [CHI]) if cores else (0,):
                yield column, size, chi


def measure_columns(arguments: argparse.Namespace) -> None:
    """Measures all files until the time is up, prints the table, and writes the results."""
    until = time.monotonic() + 60 * arguments.minutes
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows, late = [], 0
    with open_source(arguments.model) as source:
        text, reason = held_out_text(source, arguments.text, arguments.tokens)
        if text is None:
            raise SystemExit(f"--columns needs a text to measure on: {reason}")
        calibration = calibration_text(source, arguments.calib)
        kept = Kept(arguments.rows)
        bench = Columns(source, calibration, text, arguments, kept, {})
        for column, size, chi in planned(arguments):
            if time.monotonic() > until:
                late += 1
                continue
            rows.append(bench.row(column, size, chi))
            print(json.dumps(rows[-1]), flush=True)
        facts: dict[str, Any] = {"model": source.name, "calibration": calibration.name, "text": text.name}
        facts |= {"tokens": int(text.ids.size), "heal_tokens": arguments.heal_tokens}
    if late:
        print(f"{late} files were not begun in time: run the command again", flush=True)
    print(columns_table({source.name: rows}))
    write_results(arguments.out, rows, windows=arguments.windows, effort=NORMAL.name, **facts)
