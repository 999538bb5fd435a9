"""The plan auto against one bit width for all layers at equal bytes, the default against int4, predictions against results.

    python benchmarks/allocation.py --model demo --out benchmarks/results/allocation-DATE.json
    python benchmarks/allocation.py --bits 2.5,3,3.5 --tokens 8192 --corpus CORPUS --split valid

Every row is a real file. Uniform ones give all layers one width and group, tables included; those by hand give tables more
bits. Of either, the best on the measured text of those that come nearest to the bytes from below takes part, and `auto` gets
its bytes. Bits are of the whole file per weight, as in --target-bpw. Bars: at 2.5, 3 and 3.5 bits `auto` reaches at most 0.9
of uniform's KL; the default is within 2 % of the dense perplexity and not worse than int4 at int4's bytes. Exit code 1 where
one is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from parts.judge import Judge, calibration_tokens, domain_texts
from parts.results import write_results

from mpo_exporter.export import ExportTask, Listener, export, planned_spec, planner_for
from mpo_exporter.plan.budget import default_bytes, file_bytes
from mpo_exporter.plan.options import Options, Target
from mpo_exporter.plan.predict import predict
from mpo_exporter.source import find_source, open_source
from mpo_exporter.terms import integers, stored_bytes
from mpo_formats import LinearSpec, MpoFile, Quantized
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_runtime import native
from mpo_runtime.engine import Engine
from mpo_runtime.loading import load_network, open_weights
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint

BAR, DEFAULT_BAR = 0.9, 1.02
# Widths and groups that one would choose by hand for all matrices, and additional bits of embedding and head.
WIDTHS = tuple((bits, group, zeros) for bits in (2, 3, 4) for group in (32, 64, 128) for zeros in (False, True))
TABLES = (1, 2, 3)
# How many candidates, those nearest below the target in bytes, are measured.
TRIED = 2
STEPS, ROUNDS = 32, 5


@dataclass(slots=True)
class Bench:
    """The source, its calibration text and judge, and a folder for files."""

    source: Checkpoint
    calibration: TokenText
    windows: int
    judge: Judge
    folder: Path

    def task(self, options: Options) -> ExportTask:
        """The export of a file by these options."""
        target = self.folder / "row.mpo"
        return ExportTask(target, options, force=True, calibration=self.calibration, windows=self.windows)

    def file(self, options: Options, layers: tuple[LinearSpec, ...] | None = None) -> dict[str, Any]:
        """Makes a file and measures it: its layers, sizes, seconds and quality."""
        start = time.perf_counter()
        with open_source(self.source.folder) as source:
            result = export(source, replace(self.task(options), layers=layers))
        seconds = time.perf_counter() - start
        with MpoFile(result.path) as file:
            measured = self.judge.weights(file)
        return {
            "bytes": result.file_bytes,
            "bits_per_weight": result.bits_per_weight,
            "layers_with_cores": result.core_layers,
            "seconds": seconds,
            **{key: measured["all"][key] for key in ("kl_mean", "perplexity", "dense_perplexity", "same_top1")},
        }

    def uniform(self, target: int, tables: tuple[int, ...]) -> dict[str, Any]:
        """The best of the files of one width that come nearest below the target; tables have `more` additional bits."""
        spec = self.source.spec
        plans = [one_width(spec.linears, *width, more) for width in WIDTHS for more in tables]
        sizes = sorted(
            ((file_bytes(replace(spec, linears=layers)), index) for index, layers in enumerate(plans)), reverse=True
        )
        fitting = [(size, index) for size, index in sizes if size <= target][:TRIED]
        if not fitting:
            raise SystemExit(f"no uniform file is as small as {target:,} bytes")
        rows = [self.file(Options("int4"), plans[index]) | {"terms": terms_text(plans[index])} for _, index in fitting]
        return min(rows, key=lambda row: row["kl_mean"])


def one_width(linears: tuple[LinearSpec, ...], bits: int, group: int, zeros: bool, more: int) -> tuple[LinearSpec, ...]:
    """All matrices in one width, the tables in `more` bits more."""
    planned = []
    for linear in linears:
        wide = min(bits + more, 6) if linear.name in (EMBEDDING, HEAD) else bits
        term = integers(linear.in_features, wide, group)
        if isinstance(term, Quantized) and zeros:
            term = replace(term, zeros=True)
        planned.append(replace(linear, terms=(term,)))
    return tuple(planned)


def terms_text(layers: tuple[LinearSpec, ...]) -> str:
    """Such as `3/64z, tables 5`."""
    table, body = layers[0].terms[0], layers[1].terms[0]
    if not isinstance(table, Quantized) or not isinstance(body, Quantized):
        return "dense"
    return f"{body.bits}/{body.group}{'z' if body.zeros else ''}, tables {table.bits}"


def at_equal_bytes(bench: Bench, bits: float, by_hand: bool = True) -> dict[str, Any]:
    """The best uniform file and the best by hand within so many bits of the whole file per weight, and auto at their bytes."""
    target = int(bits * bench.source.spec.architecture.parameters() / 8)
    found: dict[str, Any] = {"bits": bits}
    for name, tables in (("uniform", (0,)), ("by_hand", TABLES))[: 1 + by_hand]:
        other = bench.uniform(target, tables)
        ours = bench.file(Options("auto", target=Target(size=other["bytes"])))
        found[name] = {"other": other, "auto": ours, "kl_ratio": ours["kl_mean"] / other["kl_mean"]}
    return found | {"holds": found["uniform"]["kl_ratio"] <= BAR}


def default_row(bench: Bench) -> dict[str, Any]:
    """The default plan with its predictions, and int4 in groups of 32 against auto at its bytes."""
    spec = bench.source.spec
    options = Options("auto", target=Target(size=default_bytes(spec)))
    with open_source(bench.source.folder) as source:
        planner = planner_for(source, bench.task(options), bench.folder, Listener())
        planned = planned_spec(source, bench.task(options), planner)
        predicted = asdict(predict(planner, planned))
    row = bench.file(options)
    row["tokens_per_second"] = tokens_per_second(bench.folder / "row.mpo")
    int4 = bench.file(Options("int4"))
    same = bench.file(Options("auto", target=Target(size=int4["bytes"])))
    row |= {"predicted": predicted, "perplexity_ratio": row["perplexity"] / row["dense_perplexity"]}
    row |= {"tensor_bytes": sum(stored_bytes(linear) for linear in planned.linears)}
    holds = row["perplexity_ratio"] <= DEFAULT_BAR and same["kl_mean"] <= int4["kl_mean"]
    return {"default": row, "int4": int4, "auto_at_int4_bytes": same, "holds": holds}


def tokens_per_second(path: Path) -> float | None:
    """The fastest of some stretches of decoding in the native backend."""
    if not native.available():
        return None
    engine = Engine(load_network(open_weights(path), backend="native"), context=128)
    best = 0.0
    for _ in range(ROUNDS):
        engine.prefill([1] * 56)
        start = time.perf_counter()
        for _ in range(STEPS):
            engine.advance([1])
        best = max(best, STEPS / (time.perf_counter() - start))
    return best


def markdown(rows: list[dict[str, Any]], default: dict[str, Any]) -> str:
    """The tables."""
    lines = ["| bits | one width | MB | KL | KL auto | auto / it | bar 0.9 |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        for name in ("uniform", "by_hand")[: 1 + ("by_hand" in row)]:
            ours, other = row[name]["auto"], row[name]["other"]
            bar = "" if name == "by_hand" else "met" if row["holds"] else "missed"
            lines.append(
                f"| {row['bits']} | {other['terms']} | {other['bytes'] / 1e6:.2f} | {other['kl_mean']:.4f} | "
                f"{ours['kl_mean']:.4f} | {row[name]['kl_ratio']:.2f} | {bar} |"
            )
    lines += ["", "| file | MB | bits | KL | perplexity / dense |", "|---|---|---|---|---|"]
    for name in ("default", "int4", "auto_at_int4_bytes"):
        row = default[name]
        lines.append(
            f"| {name.replace('_', ' ')} | {row['bytes'] / 1e6:.2f} | {row['bits_per_weight']:.2f} | "
            f"{row['kl_mean']:.4f} | {row['perplexity'] / row['dense_perplexity']:.4f} |"
        )
    row, predicted = default["default"], default["default"]["predicted"]
    pairs = (
        ("bytes", predicted["file_bytes"], row["bytes"]),
        ("KL", predicted["kl"], row["kl_mean"]),
        ("tokens/s", predicted["tokens_per_second"], row["tokens_per_second"]),
        ("seconds of the export", sum(predicted["costs"]["normal"]["stages"].values()), row["seconds"]),
    )
    lines += ["", "| of the default | predicted | found |", "|---|---|---|"]
    lines += [f"| {name} | {before:.6g} | {after:.6g} |" for name, before, after in pairs if before and after]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="as mpo-export takes it")
    parser.add_argument("--bits", default="2.5,3,3.5")
    parser.add_argument(
        "--corpus", type=Path, help="folder of the corpus; the embedded evaluation text where not given"
    )
    parser.add_argument("--split", default="test", choices=["valid", "test"])
    parser.add_argument("--tokens", type=int, default=8192, help="of each domain")
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--uniform-only", action="store_true", help="leave out the files made by hand")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    source = Checkpoint(find_source(arguments.model).folder)
    judge = Judge.of(source, domain_texts(source, arguments.corpus, arguments.split, arguments.tokens))
    with tempfile.TemporaryDirectory() as folder:
        calibration = calibration_tokens(source, arguments.calib, None)
        bench = Bench(source, calibration, arguments.windows, judge, Path(folder))
        rows = []
        for bits in map(float, arguments.bits.split(",")):
            rows.append(at_equal_bytes(bench, bits, not arguments.uniform_only))
            print(f"{bits} bits: auto / uniform {rows[-1]['uniform']['kl_ratio']:.3f}", flush=True)
        default = default_row(bench)
    print("\n" + markdown(rows, default))
    write_results(arguments.out, rows, kernels=native.active(), **default)
    sys.exit(not (default["holds"] and all(row["holds"] for row in rows)))


if __name__ == "__main__":
    main()
