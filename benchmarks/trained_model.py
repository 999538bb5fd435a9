"""Every plan beside llama.cpp's types on a model that others trained: size, KL, perplexity, accuracy, before and after healing.

    python benchmarks/trained_model.py MODEL --llama-bin DIR --calibration C4.txt --text WIKITEXT --tasks FOLDER --out FILE.json

MODEL is a GGUF file, such as the one of `mpo-export smollm2`, or a Hugging Face folder. --llama-bin holds llama-imatrix and
llama-quantize; without it the rows of llama.cpp are left out. Its importance matrix and our fits see the same text. All files,
theirs too, are opened by this project and run through the reference backend in float32 (accuracy: bf16 products with --bf16), so
that only the weights differ. Beside
each type of llama.cpp stand a file of ours with at most as many bytes, and one with the type's nominal bits per weight. Files in
--work and rows in --rows are kept: a run that was stopped goes on when the command is repeated. Healing trains on the first
part of --heal-text, the calibration text where it is not given.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accuracy
import numpy as np
import torch
from numpy.typing import NDArray
from parts.heal_rows import core_parameters
from parts.results import write_results

from mpo_formats import LinearSpec, Mpo
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.evaluation.kept import Kept, weights_digest
from mpo_runtime.loading import load, open_weights, read_text_files
from mpo_runtime.measure import Logits, compare, cut_windows, window_logits
from mpo_runtime.models.registry import decoder_for

# llama.cpp's types, with the bits per weight that they have where rows are a multiple of 256.
TYPES = {"Q4_K_M": 4.5, "Q3_K_M": 3.4375, "IQ3_XXS": 3.0625, "Q2_K": 2.625, "IQ2_XS": 2.3125, "IQ4_NL": 4.5}
# Of these all matrices are of the type; of the others some are of a larger one.
PURE = ("IQ4_NL",)
SIZES = (4.25, 3.5, 3.0, 2.5)
# χ = 112 leaves SmolLM2's tensorized matrices 30 % of their parameters, which is what the paper reports.
PLANS: dict[str, tuple[str, ...]] = {"int4": (), "paper": ("--chi", "112"), "k-proj": ()}
# Beside `auto`, to tell what transforms of inputs give.
PLAIN, FITTED = "auto, no transforms", "auto, fitted"
WINDOW = 256
PROMPTS = ("What is the capital of France?", "Write two sentences about the sea.", "Why is the sky blue?")
EXPECTED = re.compile(r"predicted KL: ([0-9.e-]+)")


@dataclass(frozen=True, slots=True)
class Row:
    """A file to make and measure: whose, its name, the options of mpo-export, and whether it is healed too."""

    family: str
    name: str
    options: tuple[str, ...] = ()
    heal: bool = False

    @property
    def file_name(self) -> str:
        """The name of the file in the work folder."""
        return f"{self.family} {self.name}".replace(", ", " ").replace(" ", "-").replace("/", "-")


def call(*words: object) -> str:
    """Runs a program and returns what it printed; shows it only when the program fails."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{words[0]} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def program(name: str) -> Path:
    """One of this project's programs, beside the interpreter in use."""
    return Path(sys.executable).parent / name


def write_float_gguf(model: Path, target: Path) -> None:
    """Copies a GGUF file with all tensors as float32 (norms too), for llama-quantize to start from."""
    import gguf

    reader = gguf.GGUFReader(model)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        shape = [int(length) for length in tensor.shape[::-1]]
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_peers(arguments: argparse.Namespace) -> dict[str, Path]:
    """llama.cpp's files of the model, made where they are missing."""
    work, threads = arguments.work, arguments.threads
    dense, matrix = work / "dense-f32.gguf", work / "importance.gguf"
    if not dense.exists():
        write_float_gguf(arguments.model, work / "part.gguf")
        (work / "part.gguf").replace(dense)
    if not matrix.exists():
        words = ["-m", dense, "-f", arguments.calibration, "-o", work / "part.gguf", "-c", WINDOW, "--process-output"]
        chunks = arguments.calib_windows
        call(arguments.llama_bin / "llama-imatrix", *words, "--chunks", chunks, "-t", threads)
        (work / "part.gguf").replace(matrix)
    files = {}
    for kind in TYPES:
        files[kind] = work / f"{kind}.gguf"
        if not files[kind].exists():
            part = work / "part.gguf"
            pure = ["--pure"] if kind in PURE else []
            call(arguments.llama_bin / "llama-quantize", "--imatrix", matrix, *pure, dense, part, kind, threads)
            part.replace(files[kind])
    return files


def planned(peers: dict[str, Path], sizes: Sequence[int] = ()) -> Iterator[Row]:
    """All rows, the dense model first; `sizes` are files' bytes besides those of the peers."""
    yield Row("dense", "")
    yield from (Row("llama.cpp", kind) for kind in peers)
    families = {"auto": (), FITTED: ("--transforms", "fitted"), PLAIN: ("--transforms", "none")}
    for family, options in families.items():
        for kind, path in peers.items():
            yield Row(family, f"bytes of {kind}", ("--target-size", str(path.stat().st_size), *options))
        for size in sizes:
            yield Row(family, f"{size / 1e6:.2f} MB", ("--target-size", str(size), *options))
    for bits in SIZES:
        yield Row("auto", f"{bits} bits", ("--target-bpw", str(bits)), heal=True)
        for family in (FITTED, PLAIN):
            yield Row(family, f"{bits} bits", ("--target-bpw", str(bits), *families[family]))
    for kind in peers:
        yield Row("auto", f"{TYPES[kind]} bits, as {kind}", ("--target-bpw", str(TYPES[kind])), heal=True)
    for plan, options in PLANS.items():
        yield Row(plan, "", ("--plan", plan, *options), heal=True)


def make_ours(row: Row, arguments: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The file of a row of ours, and what its export said and cost; both are kept."""
    path = arguments.work / f"{row.file_name}.mpo"
    facts = path.with_suffix(".json")
    if not (path.exists() and facts.exists()):
        words = [program("mpo-export"), arguments.model, *row.options, "--calib", arguments.calibration]
        words += ["--calib-windows", arguments.calib_windows, "--threads", arguments.threads]
        predicted = EXPECTED.search(call(*words, "--dry-run"))
        start = time.perf_counter()
        call(*words, "--measure-tokens", 0, "--force", "--out", path)
        seconds = time.perf_counter() - start
        found = {"expected_kl": float(predicted[1]) if predicted else None, "export_seconds": round(seconds, 1)}
        facts.write_text(json.dumps(found), encoding="utf-8")
    return path, json.loads(facts.read_text(encoding="utf-8"))


def healed(row: Row, path: Path, arguments: argparse.Namespace) -> Path:
    """The healed file of a row."""
    target = path.with_name(f"{row.file_name}-healed.mpo")
    if not target.exists():
        words = [program("mpo-export"), "heal", path, "--teacher", arguments.model, "--threads", arguments.threads]
        words += ["--heal-tokens", arguments.heal_tokens, "--text", arguments.heal_text or arguments.calibration]
        call(*words, "--measure-tokens", 0, "--out", target)
    return target


def core_share(linears: Sequence[LinearSpec]) -> float | None:
    """Numbers in cores over those of the matrices that are cores alone; None where no matrix is."""
    replaced = [one for one in linears if one.terms and all(isinstance(term, Mpo) for term in one.terms)]
    if not replaced:
        return None
    return core_parameters(tuple(replaced)) / sum(one.out_features * one.in_features for one in replaced)


class Judge:
    """Compares models with the dense one, whose logits are computed once and kept in memory."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        with closing(open_weights(arguments.model)) as dense:
            tokenizer, _ = read_text_files(dense)
            if tokenizer is None:
                raise SystemExit(f"{arguments.model}: has no tokenizer")
            self.parameters = dense.spec.architecture.parameters()
            text = arguments.text.read_text(encoding="utf-8")
            self.ids = np.array(tokenizer.encode(text), np.int64)[: arguments.text_tokens]
        self.logits: dict[bytes, Logits] = {}

    def dense_logits(self, window: NDArray[np.int64]) -> Logits:
        """The dense model's logits [S − 1, vocabulary] of a window [S]."""
        if not self.logits:
            with closing(open_weights(self.arguments.model)) as dense, torch.inference_mode():
                model = decoder_for(dense.spec.architecture, ReferenceOps(dense, held=True))
                for part in cut_windows(self.ids, model, WINDOW):
                    self.logits[part.tobytes()] = window_logits(model, part).copy()
        return self.logits[window.tobytes()]

    def measure(self, path: Path) -> dict[str, Any]:
        """KL and perplexity on the text, accuracy on the tasks, and samples of one model."""
        arguments = self.arguments
        with closing(open_weights(path)) as weights, torch.inference_mode():
            model = decoder_for(weights.spec.architecture, ReferenceOps(weights, held=True))
            found = compare(model, self.dense_logits, self.ids, WINDOW)
            left = core_share(weights.spec.linears)
        return {
            "kl_mean": found.kl_mean,
            "kl_999": found.kl_999,
            "same_top1": found.same_top1,
            "cosine": found.cosine,
            "mse": found.mse,
            "core_share": left,
            "perplexity": found.model.perplexity,
            "perplexity_error": found.model.error,
            "samples": samples(path, arguments),
            **self.accuracy(path),
        }

    def accuracy(self, path: Path) -> dict[str, Any]:
        """The accuracy of one model on the tasks, where there are any."""
        arguments = self.arguments
        if arguments.tasks is None:
            return {}
        tasks = [arguments.tasks / f"{name}.jsonl" for name in accuracy.PROMPTS]
        torch.backends.mkldnn.matmul.fp32_precision = "bf16" if arguments.bf16 else "ieee"
        figures = accuracy.measure(str(path), tasks, arguments.limit, None, 0)
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"
        return {
            "accuracy": {name: task[accuracy.main_figure(name)] for name, task in figures["tasks"].items()},
            "accuracy_mean": figures["mean"],
            "right": {name: task["right"][accuracy.main_figure(name)] for name, task in figures["tasks"].items()},
        }


def samples(path: Path, arguments: argparse.Namespace) -> dict[str, str]:
    """The answers to the prompts, most likely token by token."""
    with load(path, threads=arguments.threads) as model:
        return {
            prompt: "".join(
                piece.text for piece in model.chat([{"role": "user", "content": prompt}], temperature=0, max_tokens=48)
            )
            for prompt in PROMPTS
        }


def measured(row: Row, path: Path, kept: Kept, judge: Judge, **facts: Any) -> dict[str, Any]:
    """The row with its figures, measured or kept."""
    arguments = judge.arguments
    setting = [arguments.tasks is not None, arguments.limit, arguments.text.name, arguments.text_tokens, arguments.bf16]
    key = f"{weights_digest(path)} {json.dumps(setting)}"
    if key not in kept.rows:
        kept.add(key, judge.measure(path))
    size = path.stat().st_size
    names = {"family": row.family, "name": row.name, "file_bytes": size, "bits_per_weight": 8 * size / judge.parameters}
    return names | facts | kept.rows[key]


def measure_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Makes and measures all rows until the time is up."""
    until = time.monotonic() + 60 * arguments.minutes
    arguments.work.mkdir(parents=True, exist_ok=True)
    peers = make_peers(arguments) if arguments.llama_bin else {}
    kept, judge = Kept(arguments.rows), Judge(arguments)
    rows: list[dict[str, Any]] = []
    for row in planned(peers, arguments.sizes):
        if arguments.only and row.family not in arguments.only:
            continue
        if row.family != "dense" and not re.search(arguments.names, row.name):
            continue
        if time.monotonic() > until:
            print(f"{row.family} {row.name}: not begun in time; repeat the command")
            continue
        if row.family in ("dense", "llama.cpp"):
            path = arguments.model if row.family == "dense" else peers[row.name]
            rows.append(measured(row, path, kept, judge))
        else:
            path, facts = make_ours(row, arguments)
            rows.append(measured(row, path, kept, judge, healed=False, **facts))
            if row.heal and arguments.heal_tokens != "0":
                facts = {"healed": True, "heal_tokens": arguments.heal_tokens}
                rows.append(measured(row, healed(row, path, arguments), kept, judge, **facts))
        print(line(rows[-1]), file=sys.stderr, flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    name = f"{row['family']} {row['name']}".strip() + (", healed" if row.get("healed") else "")
    expected = row.get("expected_kl")
    found = row.get("accuracy", {})
    cells = [f"{100 * found[task]:.1f}" if found else "" for task in accuracy.PROMPTS]
    return (
        f"| {name} | {row['file_bytes'] / 1e6:.2f} | {row['bits_per_weight']:.2f} | {row['kl_mean']:.4f} | "
        f"{'' if expected is None else f'{expected:.4f}'} | {100 * row['same_top1']:.1f} | {row['perplexity']:.2f} | "
        + " | ".join(cells)
        + (f" | {100 * row['accuracy_mean']:.2f} |" if found else " | |")
    )


def table(rows: list[dict[str, Any]]) -> str:
    """All rows as a Markdown table."""
    heads = ["file", "MB", "bits", "KL", "expected", "same top %", "perplexity", *accuracy.PROMPTS, "mean"]
    return "\n".join(["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *map(line, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--llama-bin", type=Path, help="folder of llama-imatrix and llama-quantize")
    parser.add_argument("--calibration", type=Path, required=True, help="text that all fits are calibrated on")
    parser.add_argument("--calib-windows", type=int, default=64, help="windows of 256 tokens of it")
    parser.add_argument("--text", type=Path, required=True, help="text to measure KL and perplexity on")
    parser.add_argument("--text-tokens", type=int, default=6_144)
    parser.add_argument("--tasks", type=Path, help="folder of the tasks' JSONL files; without it no accuracy")
    parser.add_argument("--limit", type=int, default=100, help="questions of each task; 0: all")
    parser.add_argument("--heal-tokens", default="200k", help="tokens to heal on; 0: no healing")
    parser.add_argument("--heal-text", type=Path, help="the calibration text where it is not given")
    parser.add_argument("--only", nargs="*", default=[], help="rows of these families: dense, llama.cpp, auto, int4, …")
    parser.add_argument("--names", default="", help="of these, rows whose name has this regular expression")
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="files of so many bytes, too")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no row after this time")
    parser.add_argument("--bf16", action="store_true", help="accuracy from bf16 products: faster on a CPU with AMX")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/trained-model"), help="folder of the files, kept")
    parser.add_argument("--rows", type=Path, default=Path("build/trained-model/rows.jsonl"), help="rows, kept")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = measure_rows(arguments)
    print(table(rows))
    write_results(arguments.out, rows, model=arguments.model.name)


if __name__ == "__main__":
    main()
