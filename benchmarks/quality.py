"""Quality against bytes on held-out text: the whole file, embeddings included, nothing healed.

    python benchmarks/quality.py --quick
    python benchmarks/quality.py --cache DIR --out benchmarks/results/quality-DATE.json --plot docs/quality.svg
    python benchmarks/quality.py --calib-domain web        # calibrated on one domain, measured on all three

Rows: integers of one width, rounded to nearest or error-compensated, each with and without int8 cores beside them; widths
allocated layer by layer; and cores alone at the same bytes (plain SVD, whitened SVD, the published MPO, the MPO fitted on
activations). Every row is a real file, written by the exporter and read by the runtime. Its settings were chosen on valid
text; the figures are one run on test text. A row is kept in the cache as soon as it is measured, so a stopped run goes on
where it was. Rows of llama.cpp's types come from benchmarks/peers.py: give its result with --peers.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from judge import DOMAINS, Judge, calibration_tokens, domain_texts
from machine import describe_machine

from mpo_exporter.allocate import choose
from mpo_exporter.build import Method
from mpo_exporter.calibrate.moments import Calibration
from mpo_exporter.calibrate.windows import cut_calibration
from mpo_exporter.export import export
from mpo_exporter.fit.shapes import balanced_shape, low_rank_shape
from mpo_exporter.plan import Options, operator
from mpo_exporter.quantize.rounding import fitting_group
from mpo_exporter.sources import find_source
from mpo_exporter.survey import Survey, stored_bytes, survey
from mpo_formats import Dense, LinearSpec, MpoFile, Quantized, Term
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_runtime.checkpoint import Checkpoint
from mpo_runtime.texts import TokenText

NEAREST, COMPENSATED = Method("nearest", "svd"), Method("compensated", "weighted")
# Bits of the embedding beside a body of so many bits: it takes part in every token twice, so it gets more.
TABLE_BITS = {2: 4, 3: 5, 4: 6, 5: 6, 6: 8, 8: 8}
UNIFORM = ((2, 128), (2, 64), (2, 32), (3, 128), (3, 64), (3, 32), (4, 128), (4, 32), (5, 64), (6, 64), (8, 128))
CHIS = (8, 16, 32, 64)
# Bits a weight over all tensors that widths are allocated for, and that cores alone have to make do with.
ALLOCATED = (2.3, 2.6, 3.0, 3.4, 3.8, 4.25, 4.8, 5.5, 6.5, 8.0)
ALONE = (2.3, 3.0, 4.25)


@dataclass(frozen=True, slots=True)
class Row:
    """One file to make: a family of the table, what tells it from its like, its layers, and how they are fitted."""

    family: str
    label: str
    layers: tuple[LinearSpec, ...]
    method: Method
    calibrated: bool


def integers(linear: LinearSpec, bits: int, group: int) -> Term:
    """A Quantized term of the largest group that fits, or bf16."""
    fitting = fitting_group(linear.in_features, group)
    return Dense("dense", "bf16") if fitting is None else Quantized("quantized", bits, fitting, False)


def uniform(linears: tuple[LinearSpec, ...], bits: int, group: int, chi: int = 0) -> tuple[LinearSpec, ...]:
    """One width for all matrices and more for the tables; beside the matrices int8 cores (O,1)×(1,I) where χ is given."""
    rows = []
    for linear in linears:
        table = linear.name in (EMBEDDING, HEAD)
        terms: tuple[Term, ...] = (integers(linear, TABLE_BITS[bits] if table else bits, 64 if table else group),)
        if chi and not table:
            terms += (operator(*low_rank_shape(linear.out_features, linear.in_features), chi, "int8"),)
        rows.append(replace(linear, terms=terms))
    return tuple(rows)


def alone(linears: tuple[LinearSpec, ...], balanced: bool, bits: float) -> tuple[LinearSpec, ...]:
    """int8 cores in the place of every matrix, of as many bonds as fit into `bits` a weight; tables in 4 bits."""
    rows = []
    for linear in linears:
        size = linear.out_features, linear.in_features
        if linear.name in (EMBEDDING, HEAD):
            rows.append(replace(linear, terms=(integers(linear, 4, 64),)))
            continue
        shape = balanced_shape(*size, 2) if balanced else low_rank_shape(*size)
        room, chi = bits * size[0] * size[1] / 8, 1
        while stored_bytes(replace(linear, terms=(operator(*shape, chi + 1, "int8"),))) <= room:
            chi += 1
        rows.append(replace(linear, terms=(operator(*shape, chi, "int8"),)))
    return tuple(rows)


def all_rows(source: Checkpoint, surveyed: Callable[[], Survey], quick: bool) -> Iterator[Row]:
    """The rows of the table, in its order."""
    linears = source.spec.linears
    grids = UNIFORM[1:8:3] if quick else UNIFORM
    for bits, group in grids:
        yield Row("nearest", f"{bits} bits g{group}", uniform(linears, bits, group), NEAREST, False)
        yield Row("compensated", f"{bits} bits g{group}", uniform(linears, bits, group), COMPENSATED, True)
    for bits in (2,) if quick else (2, 3, 4):
        for chi in CHIS[:1] if quick else CHIS:
            layers = uniform(linears, bits, 64, chi)
            yield Row("nearest + cores", f"{bits} bits g64 χ={chi}", layers, NEAREST, False)
            yield Row("compensated + cores", f"{bits} bits g64 χ={chi}", layers, COMPENSATED, True)
    for bits in ALLOCATED[1::4] if quick else ALLOCATED:
        yield Row("allocated", f"{bits} bits a weight", allocated(source, surveyed(), bits), COMPENSATED, True)
    for bits in ALONE[:1] if quick else ALONE:
        low_rank, balanced = alone(linears, False, bits), alone(linears, True, bits)
        yield Row("plain SVD", f"{bits} bits, tables 4", low_rank, NEAREST, False)
        yield Row("whitened SVD", f"{bits} bits, tables 4", low_rank, COMPENSATED, True)
        yield Row("naive MPO", f"{bits} bits, tables 4", balanced, NEAREST, False)
        yield Row("ALS MPO", f"{bits} bits, tables 4", balanced, COMPENSATED, True)


def allocated(source: Checkpoint, surveyed: Survey, bits: float) -> tuple[LinearSpec, ...]:
    """Widths by layer for so many bits a weight over all tensors."""
    return allocated_bytes(source, surveyed, int(bits * source.spec.architecture.parameters() / 8))


def allocated_bytes(source: Checkpoint, surveyed: Survey, tensor_bytes: int) -> tuple[LinearSpec, ...]:
    """Widths by layer for so many bytes of tensors (the norms among them)."""
    chosen = choose(surveyed.candidates, tensor_bytes - vector_bytes(source))
    return tuple(replace(linear, terms=chosen[linear.name].terms) for linear in source.spec.linears)


def vector_bytes(source: Checkpoint) -> int:
    """Bytes of the norms."""
    return sum(source.array(f"{vector.name}.weight").nbytes for vector in source.spec.vectors)


@dataclass(slots=True)
class Bench:
    """The source, its calibration, its judge, and the cache of measured rows."""

    source: Checkpoint
    calibration: TokenText
    windows: int
    judge: Judge
    cache: Path
    kept: Survey | None = None

    def survey(self) -> Survey:
        """The survey of the source, made when it is first wanted."""
        if self.kept is None:
            print("surveying the layers", flush=True)
            ids = cut_calibration(self.calibration, self.source.architecture, count=self.windows)
            with tempfile.TemporaryDirectory() as folder:
                self.kept = survey(self.source, Calibration(self.source, ids, Path(folder)))
        return self.kept

    def key(self, row: Row) -> str:
        """What a row depends on besides the code."""
        texts = [(name, text.sha256, int(text.ids.size)) for name, text in self.judge.texts.items()]
        parts = [row.family, row.label, [asdict(layer) for layer in row.layers], asdict(row.method), texts,
                 self.source.sha256(), self.calibration.sha256, int(self.calibration.ids.size), self.windows]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def measure(self, row: Row) -> dict[str, Any]:
        """Makes a row's file and measures it, or takes it from the cache."""
        place = self.cache / f"{self.key(row)}.json"
        if place.exists():
            found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
            return found
        table = self.survey() if row.calibrated else None
        with tempfile.TemporaryDirectory() as folder:
            result = export(
                self.source.folder, Path(folder) / "row.mpo", Options("int4"), layers=row.layers, method=row.method,
                calibration=self.calibration if row.calibrated else None, windows=self.windows, surveyed=table,
            )  # fmt: skip
            with MpoFile(result.path) as file:
                measured = self.judge.weights(file)
        tensors = sum(stored_bytes(layer) for layer in row.layers) + vector_bytes(self.source)
        entry = {
            "family": row.family,
            "label": row.label,
            "tensor_bytes": tensors,
            "file_bytes": result.file_bytes,
            "bits_per_weight": 8 * tensors / self.source.architecture.parameters(),
            "layers_with_cores": result.core_layers,
            "measured": measured,
        }
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(entry), encoding="utf-8")
        return entry


def open_bench(arguments: argparse.Namespace) -> Bench:
    """Opens what the options name."""
    source = Checkpoint(find_source(arguments.model).folder)
    texts = domain_texts(source, arguments.corpus, arguments.split, arguments.tokens)
    calibration = calibration_tokens(source, arguments.calib, arguments.calib_domain)
    return Bench(source, calibration, arguments.windows, Judge.of(source, texts), arguments.cache)


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
    parser.add_argument("--windows", type=int, default=256, help="of calibration text, at most")
    parser.add_argument("--cache", type=Path, default=Path("build/quality"), help="folder of measured rows")
    parser.add_argument("--out", type=Path, help="the JSON to write")


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| | | MB tensors | MB file | bits a weight | perplexity | KL to dense | stories / web / chat | same top token |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        whole = row["measured"]["all"]
        parts = " / ".join(f"{row['measured'][name]['kl_mean']:.4f}" for name in DOMAINS)
        lines.append(
            f"| {row['family']} | {row['label']} | {row['tensor_bytes'] / 1e6:.3f} | {row['file_bytes'] / 1e6:.3f} | "
            f"{row['bits_per_weight']:.2f} | {whole['perplexity']:.2f} ± {whole['perplexity_error']:.2f} | "
            f"{whole['kl_mean']:.4f} | {parts} | {100 * whole['same_top1']:.1f} % |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """KL against bits a weight, one line a family."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mpo"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for family in dict.fromkeys(row["family"] for row in rows):
        points = sorted(
            (row["bits_per_weight"], row["measured"]["all"]["kl_mean"]) for row in rows if row["family"] == family
        )
        style = "*" if family == "llama.cpp" else "o-"
        axes.plot(
            [x for x, _ in points], [y for _, y in points], style, label=family, markersize=4 + 5 * (style == "*")
        )
    axes.set(yscale="log", xlabel="bits per weight, all tensors", ylabel="KL to the dense model, nats a token")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def without_folder(word: str) -> str:
    """A word of the command line, a path shortened to its name: results say nothing of the machine's folders."""
    return Path(word).name if "/" in word else word


def write_results(arguments: argparse.Namespace, bench: Bench, rows: list[dict[str, Any]]) -> None:
    """Writes the rows and what they were measured with."""
    texts = {name: {"sha256": text.sha256, "tokens": int(text.ids.size)} for name, text in bench.judge.texts.items()}
    facts = {
        "date": datetime.date.today().isoformat(),
        "command": f"python {Path(sys.argv[0]).name} {shlex.join(map(without_folder, sys.argv[1:]))}".strip(),
        "machine": asdict(describe_machine()),
        "source_sha256": bench.source.sha256(),
        "calibration": {"text": bench.calibration.name, "sha256": bench.calibration.sha256, "windows": bench.windows},
        "split": arguments.split,
        "texts": texts,
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--quick", action="store_true", help="a few rows")
    parser.add_argument("--only", help="families whose name contains this")
    parser.add_argument("--peers", type=Path, help="result of benchmarks/peers.py, for the table and the plot")
    parser.add_argument("--plot", type=Path, help="the figure to write, .svg or .png (needs matplotlib)")
    arguments = parser.parse_args()
    bench = open_bench(arguments)
    rows = []
    for row in all_rows(bench.source, bench.survey, arguments.quick):
        if arguments.only is None or arguments.only in row.family:
            rows.append(bench.measure(row))
            print(f"{row.family}, {row.label}: KL {rows[-1]['measured']['all']['kl_mean']:.4f}", flush=True)
    if arguments.peers:
        rows += [
            row
            for row in json.loads(arguments.peers.read_text(encoding="utf-8"))["rows"]
            if row["family"] == "llama.cpp"
        ]
    print(markdown(rows))
    if arguments.plot:
        plot(rows, arguments.plot)
    if arguments.out:
        write_results(arguments, bench, rows)


if __name__ == "__main__":
    main()
