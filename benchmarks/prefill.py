"""Speed of prompts, side by side in one run: our files, llama.cpp, transformers in bf16.

    python benchmarks/prefill.py --size 2b --plans 4,2,3+4,dense --lengths 512,8192 --work /tmp/prefill
    python benchmarks/prefill.py --work /tmp/prefill --llama-bench BIN --gguf a.gguf --transformers --out results.json

Weights are random (benchmarks/synthetic.py). Every round times each contestant once at each length, so that a busy moment hits
all of them; figures are medians over rounds, and the best round is given too. Where other programs take part of the cores,
`--by cpu` counts processor time: tokens per second of it, times the threads. llama.cpp's is that of its process without that of
a process with a prompt of one token. The table has the ratios to the best type of llama.cpp and ik_llama.cpp, to
transformers, to our 4 bits, and of each longer prompt to the shortest. Peers run the shortest length only. A prompt of 8,192
tokens takes minutes: with `--add` the rounds join those that `--out` has, so that a run can be cut into several.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from decode import add_peers, peer_programs, transformers_bf16
from parts.results import write_results
from synthetic import SyntheticPlan, write_synthetic

from mpo_runtime import native
from mpo_runtime.engine import Engine
from mpo_runtime.loading import load_network, open_weights

# How a program is told to leave out its warm-up run.
COLD = {"llama.cpp": ("--no-warmup",), "ik_llama.cpp": ("-w", "0")}


@dataclass
class Entrant:
    """One file under one engine; `run(length)` gives the seconds of one prompt, by the clock and of processor time."""

    name: str
    bytes: int
    run: Callable[[int], tuple[float, float]]
    rounds: dict[int, list[float]] = field(default_factory=dict)  # tokens/s of each length
    by_processor: dict[int, list[float]] = field(default_factory=dict)  # tokens for a second of one thread


def ours(path: Path, name: str, arguments: argparse.Namespace) -> Entrant:
    """A `.mpo` file in this runtime, with the chunks that it cuts prompts into."""
    network = load_network(open_weights(path), threads=arguments.threads, load="map", kv_type=arguments.kv_type)
    engine = Engine(network, context=max(arguments.lengths) + 8)
    random = np.random.default_rng(0)

    def run(length: int) -> tuple[float, float]:
        ids = [int(token) for token in random.integers(0, network.architecture.vocab_size, length)]
        start, processor = time.perf_counter(), time.process_time()
        engine.prefill(ids)
        return time.perf_counter() - start, time.process_time() - processor

    return Entrant(name, path.stat().st_size, run)


def llama_bench(name: str, program: list[str], path: Path, arguments: argparse.Namespace) -> Entrant:
    """A GGUF file under llama-bench, without its warm-up run; the process of one token is what loading takes."""

    def seconds(length: int) -> tuple[float, float]:
        command = [*program, "-m", str(path), "-p", str(length), "-n", "0"]
        command += ["-t", str(arguments.threads), "-r", "1", *COLD[name], "-o", "json"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        speed = float(json.loads(done.stdout)[0]["avg_ts"])
        return length / speed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def run(length: int) -> tuple[float, float]:
        clock, processor = seconds(length)
        return clock, processor - seconds(1)[1]

    return Entrant(f"{name} {path.stem}", path.stat().st_size, run)


def peers(arguments: argparse.Namespace) -> list[Entrant]:
    """llama.cpp's types and transformers, at the shortest length."""
    arguments.prompt = min(arguments.lengths)
    result = [
        llama_bench(name, program, path, arguments)
        for name, program in peer_programs(arguments)
        for path in arguments.gguf
    ]
    if arguments.transformers:
        peer = transformers_bf16(arguments)
        assert peer.prompt is not None

        def run(length: int, prompt: Callable[[], float] = peer.prompt) -> tuple[float, float]:
            processor = time.process_time()
            return length / prompt(), time.process_time() - processor

        result.append(Entrant(peer.name, peer.bytes, run))
    return result


def entrants(arguments: argparse.Namespace) -> list[Entrant]:
    """All of them; files that are missing are made."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    result = []
    for text in arguments.plans.split(",") if arguments.plans else []:
        path = arguments.work / f"{arguments.size}-{text.replace('/', '-')}.mpo"
        if not path.exists():
            write_synthetic(arguments.size, SyntheticPlan.parse(text.replace("+", ",").replace("/", "+")), path)
        result.append(ours(path, f"mpo {text}", arguments))
    return result + peers(arguments)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs all rounds; returns their figures."""
    found, shortest = entrants(arguments), min(arguments.lengths)
    earlier = json.loads(arguments.out.read_text())["rows"] if arguments.add else []
    for entrant in found:
        entrant.run(1)  # warms the page cache
        for row in earlier:
            if row["name"] == entrant.name:
                for name in ("rounds", "by_processor"):
                    setattr(entrant, name, {int(length): speeds for length, speeds in row[name].items()})
    for index in range(arguments.rounds):
        for entrant in found:
            for length in arguments.lengths if entrant.name.startswith("mpo") else [shortest]:
                clock, processor = entrant.run(length)
                seconds = processor / arguments.threads if arguments.by == "cpu" else clock
                entrant.rounds.setdefault(length, []).append(length / seconds)
                entrant.by_processor.setdefault(length, []).append(length / processor)
            gc.collect()
        print(f"round {index + 1} of {arguments.rounds}", flush=True)
    rows = [
        {
            "name": entrant.name,
            "bytes": entrant.bytes,
            "rounds": entrant.rounds,
            "by_processor": entrant.by_processor,
            "tokens_per_second": {length: statistics.median(speeds) for length, speeds in entrant.rounds.items()},
            "best": {length: max(speeds) for length, speeds in entrant.rounds.items()},
        }
        for entrant in found
    ]
    return {
        "threads": arguments.threads,
        "by": arguments.by,
        "size": arguments.size,
        "kv_type": arguments.kv_type,
        "kernels": native.active(),
        "rows": rows,
    }


def ratio(speed: float, other: float | None) -> str:
    """One over the other, or nothing."""
    return f"{speed / other:.2f}" if other else ""


def markdown(result: dict[str, Any]) -> str:
    """The rows as a table with their ratios."""
    rows = result["rows"]
    lengths = sorted({length for row in rows for length in row["tokens_per_second"]})
    shortest, longer = lengths[0], lengths[1:]
    speeds = {row["name"]: row["tokens_per_second"][shortest] for row in rows}
    best = max((speed for name, speed in speeds.items() if "llama.cpp" in name), default=None)
    head = ["file", "GB", *(f"{length} tokens: tok/s" for length in lengths)]
    head += ["over the best peer", "over transformers bf16", "over 4 bits"]
    head += [f"{length} over {shortest}" for length in longer]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        found = row["tokens_per_second"]
        cells = [row["name"], f"{row['bytes'] / 1e9:.3f}"]
        cells += [f"{found[length]:.1f}" if length in found else "" for length in lengths]
        cells += [
            ratio(found[shortest], other) for other in (best, speeds.get("transformers bf16"), speeds.get("mpo 4"))
        ]
        cells += [ratio(found[length], found[shortest]) if length in found else "" for length in longer]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("8b", "2b", "tiny"), default="2b")
    parser.add_argument("--plans", default="4,2,3+4,4/chi32,dense")
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], default=[512])
    parser.add_argument("--work", type=Path, required=True, help="folder for the synthetic files")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv-type", choices=("auto", "f32", "f16", "bf16", "int8"), default="auto")
    parser.add_argument("--by", choices=("clock", "cpu"), default="clock")
    add_peers(parser)
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--add", action="store_true", help="to the rounds that --out has")
    arguments = parser.parse_args()
    if arguments.add and not (arguments.out and arguments.out.exists()):
        parser.error("--add: expected --out to name the results of an earlier run; leave out --add for the first one")
    result = run(arguments)
    print(f"\nkernels {result['kernels']}\n")
    print(markdown(result))
    write_results(arguments.out, **result)


if __name__ == "__main__":
    main()
