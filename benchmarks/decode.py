"""Decode and prompt speed, side by side in one run: our files, dense bf16 in this runtime, llama.cpp, transformers.

    python benchmarks/decode.py --size 2b --plans 4,3+4,2+3,2,dense --work /tmp/decode
    python benchmarks/decode.py --size 2b --llama-bench BIN --gguf a.gguf --gguf b.gguf --transformers --out results.json
    python benchmarks/decode.py --size 2b --llama-bench BIN --ik-bench BIN --gguf a.gguf --prompt 512 --no-start

Weights are random (benchmarks/synthetic.py); a `+` between widths mixes them block by block, `/chi32` adds int8 cores,
`/h` and `/t` transform the inputs.
Every round times each contestant once and the read bandwidth of this machine beside it, so that a busy moment hits all of
them; the table gives medians over rounds. GB/s counts the bytes of the weights that a step reads, which is the file
without its embedding where that is not the head. Afterwards each of our files is started a few times in a process of its own
(benchmarks/launch.py).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from launch import launch
from parts.results import write_results
from synthetic import SyntheticPlan, granite, write_synthetic

from mpo_runtime.bench.meters import read_bandwidth
from mpo_runtime.engine import Engine
from mpo_runtime.loading import load_network, open_weights
from mpo_runtime.residence import LOADS


@dataclass
class Contestant:
    """One file under one engine; `decode` gives tokens per second of one timed stretch, `prompt` those of a prompt."""

    name: str
    bytes: int
    decode: Callable[[], float]
    prompt: Callable[[], float] | None
    path: Path | None = None
    decoded: list[float] = field(default_factory=list)
    prompted: list[float] = field(default_factory=list)


def ours(path: Path, name: str, arguments: argparse.Namespace) -> Contestant:
    """A `.mpo` file in this runtime."""
    weights = open_weights(path)
    network = load_network(weights, threads=arguments.threads, load=arguments.load)
    engine = Engine(network, context=max(arguments.prompt, arguments.before) + arguments.tokens + 8)
    random = np.random.default_rng(0)
    vocabulary = network.architecture.vocab_size

    def decode() -> float:
        # Every step runs one new token.
        engine.prefill([int(token) for token in random.integers(0, vocabulary, arguments.before)])
        token = 1
        start = time.perf_counter()
        for _ in range(arguments.tokens):
            token = int(engine.advance([token]).argmax())
        return arguments.tokens / (time.perf_counter() - start)

    def prompt() -> float:
        ids = [int(token) for token in random.integers(0, vocabulary, arguments.prompt)]
        start = time.perf_counter()
        engine.prefill(ids)
        return arguments.prompt / (time.perf_counter() - start)

    return Contestant(name, path.stat().st_size, decode, prompt if arguments.prompt else None, path)


def peer_programs(arguments: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """The names of llama.cpp and of its fork, as far as they take part, and the beginnings of their commands."""
    found = []
    if arguments.llama_bench:
        found.append(("llama.cpp", [str(arguments.llama_bench)]))
    if arguments.ik_bench:
        found.append(("ik_llama.cpp", [str(arguments.ik_bench), "-rtr", "1"]))  # rows are interleaved while it loads
    return found


def llama_cpp(name: str, program: list[str], path: Path, arguments: argparse.Namespace) -> Contestant:
    """A GGUF file under llama-bench, in a new process each time; llama-bench does not count the loading."""

    def bench(prompt: int, tokens: int) -> float:
        command = [*program, "-m", str(path), "-p", str(prompt), "-n", str(tokens)]
        command += ["-t", str(arguments.threads), "-r", "1", "-o", "json"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(json.loads(done.stdout)[0]["avg_ts"])

    prompt = (lambda: bench(arguments.prompt, 0)) if arguments.prompt else None
    return Contestant(f"{name} {path.stem}", path.stat().st_size, lambda: bench(0, arguments.tokens), prompt)


def add_peers(parser: argparse.ArgumentParser) -> None:
    """The options that name other programs and their files."""
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's program")
    parser.add_argument("--ik-bench", type=Path, help="that of ik_llama.cpp, which interleaves rows (-rtr 1)")
    parser.add_argument("--gguf", type=Path, action="append", default=[], help="a file for both")
    parser.add_argument("--transformers", action="store_true")


def transformers_bf16(arguments: argparse.Namespace) -> Contestant:
    """The same architecture in transformers, bf16, random weights."""
    import torch
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.set_num_threads(arguments.threads)
    model = granite(arguments.size)
    config = GraniteConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        tie_word_embeddings=True,
    )
    torch.set_default_dtype(torch.bfloat16)
    network = GraniteForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)

    @torch.inference_mode()
    def decode() -> float:
        ids = torch.randint(0, model.vocab_size, (1, arguments.before))
        out = network(ids, use_cache=True)
        start = time.perf_counter()
        for _ in range(arguments.tokens):
            token = out.logits[:, -1:].argmax(-1)
            out = network(token, past_key_values=out.past_key_values, use_cache=True)
        return arguments.tokens / (time.perf_counter() - start)

    @torch.inference_mode()
    def prompt() -> float:
        ids = torch.randint(0, model.vocab_size, (1, arguments.prompt))
        start = time.perf_counter()
        network(ids, use_cache=True, logits_to_keep=1)
        return arguments.prompt / (time.perf_counter() - start)

    size = sum(parameter.numel() * 2 for parameter in network.parameters())
    return Contestant("transformers bf16", size, decode, prompt if arguments.prompt else None)


def contestants(arguments: argparse.Namespace) -> list[Contestant]:
    """All contestants; files that are missing are made."""
    result = []
    arguments.work.mkdir(parents=True, exist_ok=True)
    for text in arguments.plans.split(","):
        plan = SyntheticPlan.parse(text.replace("+", ",").replace("/", "+"))
        path = arguments.work / f"{arguments.size}-{text.replace('/', '-')}.mpo"
        if not path.exists():
            write_synthetic(arguments.size, plan, path)
        result.append(ours(path, f"mpo {text}", arguments))
    for name, program in peer_programs(arguments):
        result += [llama_cpp(name, program, path, arguments) for path in arguments.gguf]
    if arguments.transformers:
        result.append(transformers_bf16(arguments))
    return result


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs all rounds; returns their figures."""
    from mpo_runtime import native

    entrants, bandwidths = contestants(arguments), []
    for entrant in entrants:
        entrant.decode()  # warms the page cache
    for index in range(arguments.rounds):
        bandwidths.append(read_bandwidth(arguments.threads))
        for entrant in entrants:
            entrant.decoded.append(entrant.decode())
            if entrant.prompt:
                entrant.prompted.append(entrant.prompt())
            gc.collect()
        print(f"round {index + 1} of {arguments.rounds}: reads at {bandwidths[-1]:.1f} GB/s", flush=True)
    bandwidth = statistics.median(bandwidths)
    rows = []
    for entrant in entrants:
        speed = statistics.median(entrant.decoded)
        shares = [speed * entrant.bytes / 1e9 / read for speed, read in zip(entrant.decoded, bandwidths, strict=True)]
        rows.append(
            {
                "name": entrant.name,
                "bytes": entrant.bytes,
                "decode_tokens_per_second": speed,
                "decode_rounds": entrant.decoded,
                "prompt_tokens_per_second": statistics.median(entrant.prompted) if entrant.prompted else None,
                "gigabytes_per_second": speed * entrant.bytes / 1e9,
                "share_of_bandwidth": statistics.median(shares),
                "launch": asdict(launch(entrant.path, arguments.threads)) if entrant.path and arguments.start else None,
            }
        )
    return {
        "threads": arguments.threads,
        "size": arguments.size,
        "tokens": arguments.tokens,
        "read_bandwidth": bandwidth,
        "kernels": native.active(),
        "rows": rows,
    }


def markdown(result: dict[str, Any]) -> str:
    """The rows as a table, with each one's decode speed relative to every peer at equal bytes."""
    rows = result["rows"]
    dense = next((row for row in rows if row["name"] == "mpo dense"), None)
    peers = [row for row in rows if "llama.cpp" in row["name"]]
    head = ["file", "GB", "decode tok/s", "GB/s", "of bandwidth", "prompt tok/s", "over dense"]
    head += ["opens in ms", "first token s", "peak MB beyond file and KV cache"]
    head += [f"over {row['name'].removeprefix('llama.cpp ')}, at equal bytes" for row in peers]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        speed = row["decode_tokens_per_second"]
        cells = [row["name"], f"{row['bytes'] / 1e9:.3f}", f"{speed:.2f}", f"{row['gigabytes_per_second']:.1f}"]
        cells += [f"{row['share_of_bandwidth']:.2f}"]
        cells += [f"{row['prompt_tokens_per_second']:.1f}" if row["prompt_tokens_per_second"] else ""]
        cells += [f"{speed / dense['decode_tokens_per_second']:.2f}" if dense else ""]
        started = row["launch"]
        cells += [f"{started['open_ms']:.0f}", f"{started['first_token_s']:.2f}"] if started else ["", ""]
        cells += [f"{started['over_file_and_cache'] / 1e6:.0f}"] if started else [""]
        for peer in peers:
            cells.append(f"{row['gigabytes_per_second'] / peer['gigabytes_per_second']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("8b", "2b", "tiny"), default="2b")
    parser.add_argument("--plans", default="4,4/chi32,3+4,2+3,2,dense")
    parser.add_argument("--work", type=Path, required=True, help="folder for the synthetic files")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16, help="decoded in a stretch")
    parser.add_argument("--before", type=int, default=32, help="tokens that are read before a stretch")
    parser.add_argument(
        "--start", action=argparse.BooleanOptionalAction, default=True, help="time starting the files too"
    )
    parser.add_argument("--prompt", type=int, default=0, help="length of the timed prompt; 0: none")
    parser.add_argument("--rounds", type=int, default=5)
    add_peers(parser)
    parser.add_argument(
        "--load", choices=LOADS, default="auto", help="map: for files that are together larger than memory"
    )
    parser.add_argument("--out", type=Path, help="JSON")
    arguments = parser.parse_args()
    result = run(arguments)
    print(f"\nread bandwidth {result['read_bandwidth']:.1f} GB/s; kernels {result['kernels']}\n")
    print(markdown(result))
    write_results(arguments.out, **result)


if __name__ == "__main__":
    main()
