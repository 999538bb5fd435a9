"""Quality against bytes on held-out text: the whole file, embeddings included, nothing healed.

    python benchmarks/quality.py --quick --minutes 20
    python benchmarks/quality.py --out benchmarks/results/DATE-quality.json
    python benchmarks/quality.py --calib-domain web        # calibrated on one domain, measured on all three
    python benchmarks/quality.py --columns --heal-tokens 50k      # integers, rotated, with cores; before and after healing

At each of ten sizes from 2.3 to 8 bits a weight of the whole file: integers rounded to nearest and error-compensated, widths
allocated layer by layer, each without cores and with int8 cores of χ 8 to 64 beside every matrix; and cores alone (plain SVD,
whitened SVD, the published MPO, the MPO fitted on activations). Every row is a real file, written by the exporter and read by
the runtime. Its settings were chosen on valid text; the figures are one run on test text. A row is appended to --rows, a
file of JSON lines, as soon as it is measured, so a stopped run continues where it was, and --minutes, --family and --size do
parts. Rows of llama.cpp's types come from benchmarks/peers.py: give its result with --peers.

--columns makes another table, of any model that mpo-export takes: the plan `auto` at 2.0 to 3.0 bits without transforms, with
them, and with them and cores beside every matrix, each before and after the same healing (parts/columns.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from parts.columns import measure_columns
from parts.judge import DOMAINS, Judge, calibration_tokens, domain_texts
from parts.results import write_results
from parts.rows import Row, make_row, planned_rows, vector_bytes
from parts.verdict import divergence, markdown, where_cores_help

from mpo_exporter.calibrate.moments import Calibration
from mpo_exporter.calibrate.windows import cut_calibration
from mpo_exporter.export import ExportTask, export
from mpo_exporter.measure.survey import Survey, cached_survey
from mpo_exporter.plan.options import Options
from mpo_exporter.source import find_source, open_source
from mpo_exporter.terms import stored_bytes
from mpo_formats import MpoFile, PlanError
from mpo_runtime.evaluation.kept import Kept
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint


@dataclass(slots=True)
class Bench:
    """The source, its calibration, its judge, and the measured rows."""

    source: Checkpoint
    calibration: TokenText
    windows: int
    judge: Judge
    kept: Kept
    surveyed: Survey | None = field(default=None)

    @property
    def cache(self) -> Path:
        """The folder of the measured rows, where other files are kept too."""
        return self.kept.path.parent

    def survey(self) -> Survey:
        """The survey of the source: the cached one, or a new one, made when it is first needed."""
        if self.surveyed is None:
            ids = cut_calibration(self.calibration, self.source.architecture, count=self.windows)
            with tempfile.TemporaryDirectory() as folder:
                walk = Calibration(self.source, ids, Path(folder))
                self.surveyed = cached_survey(self.source, walk, self.calibration, log=print)
        return self.surveyed

    def key(self, *facts: Any) -> str:
        """A digest of everything that a row depends on besides the code: `facts`, the model and the texts."""
        texts = [(name, text.sha256, int(text.ids.size)) for name, text in self.judge.texts.items()]
        parts = [
            facts,
            texts,
            self.source.sha256(),
            self.calibration.sha256,
            int(self.calibration.ids.size),
            self.windows,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def key_of(self, row: Row) -> str:
        """The key under which a row is kept."""
        return self.key(row.family, row.chi, [asdict(layer) for layer in row.layers], asdict(row.method))

    def measure(self, row: Row) -> dict[str, Any]:
        """Makes a row's file and measures it; or returns the row if it was measured before."""
        key = self.key_of(row)
        names = {"family": row.family, "size": row.size, "chi": row.chi}
        if key in self.kept.rows:
            return {**self.kept.rows[key], **names}
        start = time.monotonic()
        table = self.survey() if row.calibrated else None
        with tempfile.TemporaryDirectory() as folder:
            task = ExportTask(
                Path(folder) / "row.mpo",
                Options("int4"),
                layers=row.layers,
                method=row.method,
                calibration=self.calibration if row.calibrated else None,
                windows=self.windows,
                surveyed=table,
            )
            with open_source(self.source.folder) as source:
                result = export(source, task)
            made = time.monotonic()
            with MpoFile(result.path) as file:
                measured = self.judge.weights(file)
        tensors = sum(stored_bytes(layer) for layer in row.layers) + vector_bytes(self.source)
        return self.kept.add(
            key,
            {
                **names,
                "tensor_bytes": tensors,
                "file_bytes": result.file_bytes,
                "bits_per_weight": result.bits_per_weight,
                "tensor_bits_per_weight": 8 * tensors / self.source.architecture.parameters(),
                "layers_with_cores": result.core_layers,
                "seconds": {"export": round(made - start, 1), "measure": round(time.monotonic() - made, 1)},
                "measured": measured,
            },
        )


def open_bench(arguments: argparse.Namespace) -> Bench:
    """Opens the model and the texts that the options name."""
    source = Checkpoint(find_source(arguments.model).folder)
    texts = domain_texts(source, arguments.corpus, arguments.split, arguments.tokens)
    calibration = calibration_tokens(source, arguments.calib, arguments.calib_domain)
    return Bench(source, calibration, arguments.windows, Judge.of(source, texts), Kept(arguments.rows))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that both benchmarks share."""
    parser.add_argument("--model", default="demo", help="as mpo-export takes it")
    parser.add_argument(
        "--corpus", type=Path, help="folder of the corpus; the embedded evaluation text where not given"
    )
    parser.add_argument(
        "--split", default="test", choices=["valid", "test"], help="valid: choose settings; test: report"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of each domain")
    parser.add_argument("--calib", type=Path, help="calibration text; the embedded one where not given")
    parser.add_argument("--calib-domain", choices=DOMAINS, help="only this domain of the calibration text")
    parser.add_argument("--windows", type=int, default=96, help="of calibration text, at most")
    parser.add_argument("--rows", type=Path, default=Path("build/quality.jsonl"), help="measured rows, kept")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="no row is begun after so many; 0: only what is kept"
    )
    parser.add_argument("--out", type=Path, help="the JSON to write")


def save(arguments: argparse.Namespace, bench: Bench, rows: list[dict[str, Any]], **more: Any) -> None:
    """Writes the rows and what they were measured with."""
    texts = {name: {"sha256": text.sha256, "tokens": int(text.ids.size)} for name, text in bench.judge.texts.items()}
    facts = {
        "source_sha256": bench.source.sha256(),
        "parameters": bench.source.architecture.parameters(),
        "calibration": {"text": bench.calibration.name, "sha256": bench.calibration.sha256, "windows": bench.windows},
        "split": arguments.split,
        "texts": texts,
        **more,
    }
    write_results(arguments.out, rows, **facts)


def measure_rows(bench: Bench, arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Measures the rows that were asked for until the time is up; returns them, and messages about sizes without a file."""
    until = time.monotonic() + 60 * arguments.minutes
    rows, missing, late = [], [], 0
    for family, size, chi in planned_rows(arguments.quick):
        if (arguments.family and family not in arguments.family) or (arguments.size and size not in arguments.size):
            continue
        try:
            row = make_row(bench.source, bench.survey(), family, size, chi)
        except PlanError:
            missing.append(f"{family} χ={chi} at {size} bits")
            continue
        if time.monotonic() > until and bench.key_of(row) not in bench.kept.rows:
            late += 1
            continue
        rows.append(bench.measure(row))
        print(f"{row.label}: KL {divergence(rows[-1]):.4f}, {rows[-1]['seconds']}", flush=True)
    if late:
        print(f"{late} rows were not begun in time: run the command again", flush=True)
    return rows, missing


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line, or of `words`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--quick", action="store_true", help="the part of the table that says most for its time")
    parser.add_argument("--family", action="append", help="only rows of this family; may be repeated")
    parser.add_argument("--size", type=float, action="append", help="only rows of this size; may be repeated")
    parser.add_argument("--peers", type=Path, help="result of benchmarks/peers.py, for the table")
    parser.add_argument("--columns", action="store_true", help="the other table: rotated, with cores; healed")
    parser.add_argument("--chi", type=int, action="append", help="--columns: χ of the cores; may be repeated; 8")
    parser.add_argument("--text", type=Path, help="--columns: held-out text; the embedded one where not given")
    parser.add_argument("--heal-tokens", default="0", help="--columns: tokens to heal each file on; 0: none")
    parser.add_argument("--heal-text", type=Path, help="--columns: the embedded healing text where not given")
    parser.add_argument("--threads", type=int, help="--columns: of torch")
    return parser.parse_args(words)


def main() -> None:
    arguments = parsed()
    if arguments.columns:
        measure_columns(arguments)
        return
    bench = open_bench(arguments)
    rows, missing = measure_rows(bench, arguments)
    if arguments.peers:
        found = json.loads(arguments.peers.read_text(encoding="utf-8"))["rows"]
        rows += [row for row in found if row["family"] == "llama.cpp"]
    rows.sort(key=lambda row: row["file_bytes"])
    print(f"\n{markdown(rows)}\n\n{where_cores_help(rows)}")
    if missing:
        print(f"\nNo such file is that small: {'; '.join(missing)}.")
    if arguments.out:
        save(arguments, bench, rows, no_such_file=missing, verdict=where_cores_help(rows))


if __name__ == "__main__":
    main()
