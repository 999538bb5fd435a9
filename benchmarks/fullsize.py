"""The whole journey of a model of full size with random weights: time, memory and bytes of each step.

    python benchmarks/fullsize.py --size 8b --work DIR --out benchmarks/results/DATE-fullsize.json
    python benchmarks/fullsize.py --size neo -- --plan k-proj

Makes a checkpoint in bf16, in several shards, with the embedded tokenizer (so its vocabulary is padded); exports, verifies and
opens it, continues a text, and times it beside the dense model (--alone: without it, where memory does not hold both files).
Each step is a process of its own. Steps that are done are kept in --work: a run that was stopped goes on when the command is
repeated. What follows `--` goes to mpo-export. Random weights say nothing about quality, which needs the real ones. Peaks of
memory count the pages of mapped files, which the system takes back when others need them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from parts.results import write_results

from mpo_formats import Architecture
from mpo_runtime.weights.config import architecture_from_config
from mpo_runtime.weights.names import NEO, NEO_BLOCK

COMMON: dict[str, Any] = {"vocab_size": 49159, "max_position_embeddings": 131072, "tie_word_embeddings": True}
GRANITE = COMMON | {
    "model_type": "granite",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 40,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e7,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "8b": GRANITE
    | {"hidden_size": 4096, "intermediate_size": 12800, "attention_multiplier": 0.0078125, "logits_scaling": 16.0},
    "2b": GRANITE
    | {"hidden_size": 2048, "intermediate_size": 8192, "attention_multiplier": 0.015625, "logits_scaling": 8.0},
    "neo": COMMON
    | {
        "model_type": "gpt_neo",
        "vocab_size": 50257,
        "hidden_size": 2048,
        "num_layers": 24,
        "num_heads": 16,
        "max_position_embeddings": 2048,
        "attention_types": [[["global", "local"], 12]],
    },
}
CONFIGS["tiny"] = CONFIGS["2b"] | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
CONFIGS["tiny"] |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
SHARD = 4 << 30
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Step:
    """One process: its command, seconds on the wall, and the largest resident size."""

    name: str
    command: list[str]
    seconds: float
    peak_bytes: int
    output: str


def stored_name(kind: str, name: str) -> str:
    """A tensor's name in a checkpoint of transformers."""
    if kind != "gpt_neo":
        return name
    module, _, part = name.rpartition(".")
    if module.endswith("_bias"):
        module, part = module.removesuffix("_bias"), "bias"
    for theirs, ours in NEO.items():
        if module == ours:
            return f"transformer.{theirs}.{part}"
    _, _, block, inner = module.split(".", 3)
    theirs = next(theirs for theirs, ours in NEO_BLOCK.items() if ours == inner)
    return f"transformer.h.{block}.{theirs}.{part}"


def tensor_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Names in the checkpoint and shapes of all tensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rows, columns, bias in architecture.linear_sizes():
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)
    for name, size in architecture.vector_sizes():
        hidden = architecture.hidden_size
        shapes[f"{name}.weight"] = (size,) if size <= hidden else (size // hidden, hidden)
    return {stored_name(architecture.model_type, name): shape for name, shape in shapes.items()}


def write_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Writes random weights in bf16 in shards of about 4 GiB, one tensor in memory at a time."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in TOKENIZER:
        (folder / name).write_bytes((files("mpo_exporter") / "data" / "granite-nano" / name).read_bytes())
    shapes = tensor_shapes(architecture_from_config(config, {}, str(folder)))
    shards: list[list[str]] = [[]]
    for name, shape in shapes.items():
        if sum(2 * math.prod(shapes[other]) for other in shards[-1]) + 2 * math.prod(shape) > SHARD and shards[-1]:
            shards.append([])
        shards[-1].append(name)
    source, homes = np.random.default_rng(0), {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        homes |= dict.fromkeys(names, file)
        write_shard(folder / file, {name: shapes[name] for name in names}, source)
    index_file = {"metadata": {}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file), encoding="utf-8")


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], source: np.random.Generator) -> None:
    """Writes one safetensors file: normal matrices that keep the size of their input, norms of 1, biases of 0."""
    table, place = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, shape in shapes.items():
            if len(shape) == 1:
                values = np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
            else:
                values = source.standard_normal(shape, np.float32) * np.float32(shape[1] ** -0.5)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def run(name: str, command: list[str], kept: Path) -> Step:
    """Runs a step, or returns what is kept of it in a file of JSON lines; a failure ends the benchmark with what it printed."""
    done = [Step(**json.loads(line)) for line in kept.read_text(encoding="utf-8").splitlines()] if kept.exists() else []
    for step in done:
        if (step.name, step.command) == (name, command):
            print(f"{name}: {step.seconds} s, peak {step.peak_bytes / 1e9:.2f} GB, kept in {kept}", flush=True)
            return step
    print(f"{name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name} failed:\n{output}")
    unit = 1 if sys.platform == "darwin" else 1024
    step = Step(name, command, round(time.monotonic() - start, 1), usage.ru_maxrss * unit, output)
    with kept.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(step)) + "\n")
    print(f"{output.rstrip()}\n{name}: {step.seconds} s, peak {step.peak_bytes / 1e9:.2f} GB\n", flush=True)
    return step


def journey(folder: Path, file: Path, options: list[str], timed: tuple[int, int, int], *, alone: bool) -> list[Step]:
    """All steps on a checkpoint; `timed` are tokens of the prompt, tokens that are decoded, and rounds."""
    prompt, tokens, rounds = map(str, timed)
    beside = [] if alone else ["--baseline", "--dense", str(folder)]
    export, program = (str(Path(sys.executable).with_name(name)) for name in ("mpo-export", "mpo-run"))
    steps = {
        "export": [export, str(folder), "--out", str(file), "--force", *options],
        "verify": [program, "verify", str(file)],
        "info": [program, "info", str(file)],
        "generate": [program, "generate", str(file), "--prompt", "Once upon a time", "--max-tokens", "16"],
        "bench": [program, "bench", str(file), *beside, "--md", "-p", prompt, "-n", tokens, "-r", rounds],
    }
    kept = file.with_suffix(".steps.jsonl")
    return [run(name, command, kept) for name, command in steps.items()]


def shown(step: Step, work: Path) -> dict[str, Any]:
    """A step for the results, without the folders of this machine."""
    output = step.output.replace(f"{work}/", "").replace(f"{work.resolve()}/", "")
    return asdict(step) | {"command": [Path(word).name for word in step.command], "output": output}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=CONFIGS, default="8b")
    parser.add_argument("--work", type=Path, default=Path("fullsize"), help="folder for checkpoint and file; kept")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--timed", type=int, nargs=3, default=(128, 32, 3), help="prompt, decoded tokens, rounds")
    parser.add_argument("--alone", action="store_true", help="bench without the dense model")
    parser.add_argument("options", nargs="*", help="options of mpo-export, after --")
    arguments = parser.parse_args()
    folder, file = arguments.work / arguments.size, arguments.work / f"{arguments.size}.mpo"
    if not folder.exists():
        write_checkpoint(folder, CONFIGS[arguments.size])
    steps = journey(folder, file, arguments.options, tuple(arguments.timed), alone=arguments.alone)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    result = {
        "size": arguments.size,
        "checkpoint_bytes": weights,
        "file_bytes": file.stat().st_size,
        "rows": [shown(step, arguments.work) for step in steps],
    }
    print(f"checkpoint {weights / 1e9:.2f} GB, file {result['file_bytes'] / 1e9:.2f} GB")
    write_results(arguments.out, **result)


if __name__ == "__main__":
    main()
