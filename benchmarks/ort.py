"""Decoding in ONNX Runtime: our int4 folder beside the fp32 graph, onnxruntime-genai's own int4 export, and this runtime.

    python benchmarks/ort.py demo-int4.mpo --dense DENSE_FOLDER --work /tmp/ort --out results.json

FILE is a `.mpo` file of int4 (`mpo-export MODEL --plan int4`), DENSE_FOLDER the same model as a Hugging Face folder. What is
missing in the work folder is made. Every figure comes from a process of its own; the contestants take turns, so that a busy
moment hits all of them. Needs the extra `genai`, and onnx_ir and tqdm for the builder. (The script is not called onnx.py: in its
own folder that name would hide the package.)
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from parts.results import write_results

PROMPT, SEED = 256, 0


def native(path: Path, context: int, threads: int) -> tuple[Callable[[list[int]], Any], Callable[[int], int]]:
    """A `.mpo` file in this runtime, with its defaults."""
    from mpo_runtime.engine import Engine
    from mpo_runtime.loading import load_network, open_weights

    engine = Engine(load_network(open_weights(path), threads=threads), context=context)
    return engine.prefill, lambda token: int(engine.advance([token]).argmax())


def session(path: Path, context: int, threads: int) -> tuple[Callable[[list[int]], Any], Callable[[int], int]]:
    """A folder in ONNX Runtime through IOBinding, as `mpo-run generate --engine onnx` runs it."""
    from mpo_runtime.onnx.session import Session

    run = Session(path, capacity=context, threads=threads)

    def prefill(ids: list[int]) -> Any:
        run.rewind(0)
        return run.run(ids)

    return prefill, lambda token: int(run.run([token]).argmax())


def genai(path: Path, context: int, threads: int) -> tuple[Callable[[list[int]], Any], Callable[[int], int]]:
    """A folder in onnxruntime-genai."""
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(path))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = onnxruntime_genai.Model(config)
    held: list[Any] = []

    def prefill(ids: list[int]) -> None:
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=context, min_length=context, do_sample=False)
        held[:] = [onnxruntime_genai.Generator(model, parameters)]
        held[0].append_tokens(np.array(ids, np.int32))

    def step(token: int) -> int:
        held[0].generate_next_token()
        return 0

    return prefill, step


RUNNERS = {"native": native, "session": session, "genai": genai}


def measure(runner: str, path: Path, tokens: int, threads: int) -> dict[str, float]:
    """Tokens/s of a prompt and of decoding after it, CPU milliseconds of a token, and the peak of memory, in this process."""
    from mpo_runtime.memory import peak_memory

    prefill, step = RUNNERS[runner](path, PROMPT + tokens + 8, threads)
    ids = [int(token) for token in np.random.default_rng(SEED).integers(0, 4000, PROMPT)]
    prefill(ids[::-1])
    step(1)  # warm; the other prompt shares no beginning with it
    start = time.perf_counter()
    prefill(ids)
    middle, used = time.perf_counter(), time.process_time()
    token = 1
    for _ in range(tokens):
        token = step(token)
    end, used = time.perf_counter(), time.process_time() - used
    speed = {"prompt": PROMPT / (middle - start), "decode": tokens / (end - middle)}
    return {**speed, "cpu_ms": used / tokens * 1e3, "peak_bytes": peak_memory()}


def build(dense: Path, folder: Path, manifest_of: Path) -> None:
    """onnxruntime-genai's own int4 export of the dense folder, with an mpo.json so that our session runs it too."""
    from dataclasses import replace

    from mpo_runtime.onnx.manifest import DATA, MANIFEST, MODEL, read_manifest

    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(dense.resolve()),
        "-o",
        str(folder.resolve()),
    ]
    subprocess.run(
        [*command, "-p", "int4", "-e", "cpu", "-c", str(folder.resolve().parent / "cache")],
        check=True,
        cwd=folder.parent,
    )
    sizes = {"graph_bytes": (folder / MODEL).stat().st_size, "data_bytes": (folder / DATA).stat().st_size}
    (folder / MANIFEST).write_bytes(replace(read_manifest(manifest_of), **sizes).to_bytes())


def contestants(file: Path, dense: Path, work: Path) -> dict[str, tuple[str, Path]]:
    """Names of the rows with their runner and path; folders that are missing are made."""
    from mpo_runtime.onnx.export import OnnxRequest, export_onnx

    work.mkdir(parents=True, exist_ok=True)
    exact, fast, full, built = (work / name for name in ("int4-level0", "int4-level4", "fp32", "builder-int4"))
    for source, folder, level in ((file, exact, 0), (file, fast, 4), (dense, full, 0)):
        if not folder.exists():
            export_onnx(OnnxRequest(source, folder, level=level))
    if not built.exists():
        build(dense, built, fast)
    return {
        "this runtime, int4": ("native", file),
        "ONNX Runtime, our int4, level 4": ("session", fast),
        "ONNX Runtime, our int4, level 0": ("session", exact),
        "ONNX Runtime, fp32": ("session", full),
        "ONNX Runtime, the builder's int4": ("session", built),
        "onnxruntime-genai, our int4, level 4": ("genai", fast),
        "onnxruntime-genai, the builder's int4": ("genai", built),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds and their medians."""
    import onnxruntime
    import onnxruntime_genai

    entrants = contestants(arguments.file, arguments.dense, arguments.work)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in entrants}
    for index in range(arguments.rounds):
        for name, (runner, path) in entrants.items():
            words = ["--one", runner, "--tokens", str(arguments.tokens), "--threads", str(arguments.threads)]
            command = [sys.executable, __file__, str(path), *words]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
        print(f"round {index + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    rows = []
    for name, rounds in found.items():
        row: dict[str, Any] = {"name": name, "decode_rounds": [one["decode"] for one in rounds]}
        row |= {
            key: statistics.median(one[key] for one in rounds) for key in ("decode", "prompt", "cpu_ms", "peak_bytes")
        }
        rows.append(row)
    return {
        "versions": {"onnxruntime": onnxruntime.__version__, "onnxruntime-genai": onnxruntime_genai.__version__},
        "model": arguments.file.name,
        "threads": arguments.threads,
        "tokens": arguments.tokens,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dense", type=Path)
    parser.add_argument("--work", type=Path, default=Path("ort"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prepare", action="store_true", help="make the folders and measure nothing")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=RUNNERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.file, arguments.tokens, arguments.threads)))
        return
    if arguments.prepare:
        contestants(arguments.file, arguments.dense, arguments.work)
        return
    result = run(arguments)
    for row in result["rows"]:
        print(
            f"{row['name']}: {row['decode']:.1f} tokens/s, {row['cpu_ms']:.2f} CPU ms a token, prompt {row['prompt']:.0f}, "
            f"{row['peak_bytes'] / 1e6:.0f} MB"
        )
    write_results(arguments.out, **result)


if __name__ == "__main__":
    main()
