"""llama.cpp's quantised types against ours at the same bytes: same model, same calibration text, one evaluation.

    python benchmarks/peers.py --llama-source DIR --llama-bin DIR --out benchmarks/results/peers-DATE.json

DIR of --llama-source is a source tree of llama.cpp (for its converter), --llama-bin holds its llama-imatrix and
llama-quantize; neither is part of this repository. The model is converted to GGUF, its importance matrix taken on the same
calibration text that our files are fitted to, quantised to each type, dequantised with the `gguf` package, and evaluated in
this runtime, so that only the weights differ. Beside each type: our file with as many bytes of tensors; with --whole-file
also one as large as their whole file (ours carries a larger tokenizer). Files in --work and rows in --rows are kept: a run
that was stopped continues when the command is repeated. Needs `pip install gguf transformers`.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from parts.judge import Judge
from parts.rows import COMPENSATED, Row, allocated, allocated_bytes
from parts.verdict import markdown
from quality import Bench, add_options, open_bench, save

from mpo_formats import LinearSpec, PlanError
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.loading import read_text_files
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint

TYPES = ("Q4_K_M", "Q3_K_M", "Q2_K", "IQ3_XXS", "IQ2_XS")
# The largest allowed ratio of our KL to theirs at the same bytes (issue 5).
BARS = {"Q4_K_M": 0.8, "Q3_K_M": 0.8, "Q2_K": 0.8, "IQ3_XXS": 1.0, "IQ2_XS": 0.85}
PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Its converter knows tokenizers by a hash of what they do to a text; ours splits as Qwen 2's does and is byte-level BPE.
CONVERT = """
import runpy, sys
source = sys.argv[1]
sys.path[:0] = [source, source + "/gguf-py"]
from conversion.base import TextModel
from conversion.granite import Decoder
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
Decoder.set_vocab = lambda self: self._set_vocab_gpt2()
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
runpy.run_path(source + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def call(*words: str | Path) -> None:
    """Runs a program; its output is shown only when it fails."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{words[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def calibration_file(source: Checkpoint, text: TokenText, path: Path) -> None:
    """Writes token ids as text whose special tokens are spelled out."""
    tokenizer, _ = read_text_files(source)
    if tokenizer is None:
        raise SystemExit("the model has no tokenizer.json")
    special = set(tokenizer.special_ids)
    pieces: list[str] = []
    run: list[int] = []
    for token in [*text.ids.tolist(), None]:
        if token is None or token in special:
            pieces += [tokenizer.decode(run)] if run else []
            run = []
            pieces += [] if token is None else [tokenizer.id_to_token(token)]
        else:
            run.append(token)
    path.write_text("".join(pieces), encoding="utf-8")


def require_same(path: Path, marker: str) -> None:
    """Ends the program if the files of a folder were made from another model or calibration text."""
    if path.exists() and path.read_text(encoding="utf-8") != marker:
        raise SystemExit(f"{path.parent}: made of another model or calibration text; give another --work")
    path.write_text(marker, encoding="utf-8")


def make_files(bench: Bench, arguments: argparse.Namespace) -> dict[str, Path]:
    """Converts, computes the importance matrix and quantises; files that exist already are kept."""
    work, binaries = arguments.work, arguments.llama_bin
    work.mkdir(parents=True, exist_ok=True)
    marker = f"{bench.source.sha256()} {bench.calibration.sha256}"
    require_same(work / "source.txt", marker)
    dense, matrix, text = work / "f32.gguf", work / "importance.gguf", work / "calibration.txt"
    if not dense.exists():
        part = work / "part.gguf"
        call(
            sys.executable,
            "-c",
            CONVERT,
            arguments.llama_source,
            bench.source.folder,
            "--outtype",
            "f32",
            "--outfile",
            part,
        )
        part.replace(dense)
    if not matrix.exists():
        calibration_file(bench.source, bench.calibration, text)
        context = str(min(512, bench.source.architecture.max_position_embeddings))
        part = work / "part-importance.gguf"
        call(
            binaries / "llama-imatrix",
            "-m",
            dense,
            "-f",
            text,
            "-o",
            part,
            "-c",
            context,
            "--parse-special",
            "--process-output",
            "-t",
            str(arguments.threads),
        )
        part.replace(matrix)
    files = {"F32": dense}
    for kind in TYPES:
        files[kind] = work / f"{kind}.gguf"
        if not files[kind].exists():
            part = work / "part.gguf"
            call(binaries / "llama-quantize", "--imatrix", matrix, dense, part, kind, str(arguments.threads))
            part.replace(files[kind])
    return files


def read_matrices(path: Path, source: Checkpoint) -> tuple[dict[str, NDArray[np.float32]], int]:
    """A GGUF file's matrices by our layer names, dequantised, and the bytes of all its tensors."""
    import gguf

    architecture = source.architecture
    heads = {"attn_q": architecture.num_attention_heads, "attn_k": architecture.num_key_value_heads}
    result, size = {}, 0
    for tensor in gguf.GGUFReader(path).tensors:
        size += int(tensor.n_bytes)
        part = tensor.name.split(".")
        if part[0] in ("token_embd", "output"):
            name = EMBEDDING if part[0] == "token_embd" else HEAD
        elif part[0] == "blk" and part[2] in PARTS:
            name = f"model.layers.{part[1]}.{PARTS[part[2]]}"
        else:
            continue
        shape = [int(length) for length in tensor.shape[::-1]]
        matrix = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if part[0] == "blk" and part[2] in heads:  # llama.cpp pairs the values that RoPE rotates in another order
            count = heads[part[2]]
            matrix = matrix.reshape(count, shape[0] // count // 2, 2, shape[1]).swapaxes(1, 2).reshape(shape)
        result[name] = np.ascontiguousarray(matrix, np.float32)
    return result, size


def measure_file(path: Path, source: Checkpoint, judge: Judge) -> tuple[dict[str, Any], int]:
    """The figures of a GGUF file's matrices in our runtime, norms as they were, and the bytes of its tensors."""
    matrices, size = read_matrices(path, source)
    ops = ReferenceOps(source, held=True)
    for linear in source.spec.linears:
        ops.replace(linear.name, torch.tensor(matrices[linear.name]))
    return judge.ops(ops), size


def theirs(bench: Bench, kind: str, path: Path) -> dict[str, Any]:
    """The row of a GGUF file, measured or kept."""
    with path.open("rb") as file:
        key = bench.key("llama.cpp", kind, hashlib.file_digest(file, "sha256").hexdigest())
    if key in bench.kept.rows:
        return bench.kept.rows[key]
    measured, size = measure_file(path, bench.source, bench.judge)
    parameters = bench.source.architecture.parameters()
    return bench.kept.add(
        key,
        {
            "family": "llama.cpp",
            "size": kind,
            "chi": 0,
            "tensor_bytes": size,
            "file_bytes": path.stat().st_size,
            "bits_per_weight": 8 * path.stat().st_size / parameters,
            "tensor_bits_per_weight": 8 * size / parameters,
            "layers_with_cores": 0,
            "measured": measured,
        },
    )


def same_bytes(
    bench: Bench, tensor_bytes: int, file_bytes: int, whole_file: bool
) -> Iterator[tuple[str, tuple[LinearSpec, ...]]]:
    """Our layers for the same bytes of tensors as theirs, and for a whole file of the same size, tokenizer included."""
    yield "tensor bytes", allocated_bytes(bench.source, bench.survey(), tensor_bytes)
    if whole_file:
        try:
            yield "file bytes", allocated(bench.source.spec, bench.survey(), file_bytes)
        except PlanError as error:
            print(f"no file of ours is as small: {error}")


def compare_types(
    bench: Bench, files: dict[str, Path], arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of all types and of our files at the same bytes, and the lines of the table that compares them."""
    rows, summary = [], []
    until = time.monotonic() + 60 * arguments.minutes
    for kind, path in files.items():
        if time.monotonic() > until:
            print(f"{kind} was not begun in time: run the command again")
            continue
        other = theirs(bench, kind, path)
        rows.append(other)
        for what, layers in same_bytes(bench, other["tensor_bytes"], other["file_bytes"], arguments.whole_file):
            ours = bench.measure(Row("compensated", f"{what} of {kind}", 0, layers, COMPENSATED))
            rows.append(ours)
            mine, its = ours["measured"]["all"], other["measured"]["all"]
            ratio, change = mine["kl_mean"] / its["kl_mean"], mine["perplexity"] - its["perplexity"]
            met = ratio <= BARS[kind] and change <= 0
            summary.append(
                f"| {what} of {kind} | {ours['tensor_bytes'] / 1e6:.3f} / {other['tensor_bytes'] / 1e6:.3f} | "
                f"{ours['file_bytes'] / 1e6:.3f} / {other['file_bytes'] / 1e6:.3f} | {ratio:.2f} | "
                f"{BARS[kind]} | {change:+.2f} | {'yes' if met else 'no'} |"
            )
            print(summary[-1], flush=True)
    return rows, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--llama-source", type=Path, required=True, help="source tree of llama.cpp")
    parser.add_argument("--llama-bin", type=Path, required=True, help="folder of llama-imatrix and llama-quantize")
    parser.add_argument("--whole-file", action="store_true", help="our file at the bytes of their whole file too")
    parser.add_argument("--work", type=Path, default=Path("build/peers"), help="folder of GGUF files, kept")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    bench = open_bench(arguments)
    files = make_files(bench, arguments)
    dense = theirs(bench, "F32", files.pop("F32"))["measured"]["all"]["kl_mean"]
    if dense > 1e-6:
        raise SystemExit(f"the converted model differs from its source: KL {dense:.2e}")
    rows, summary = compare_types(bench, files, arguments)
    print(markdown(rows))
    print(
        "\n| at the | MB of tensors, ours / theirs | MB of the file, ours / theirs | our KL over theirs | bar | "
        "our perplexity less theirs | met |\n|---|---|---|---|---|---|---|"
    )
    print("\n".join(summary))
    if arguments.out:
        save(arguments, bench, rows)


if __name__ == "__main__":
    main()
