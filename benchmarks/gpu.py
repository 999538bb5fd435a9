"""The GPU backend in one command: does it agree, and how near is it to the memory and to the matrix units?

    python benchmarks/gpu.py --work DIR --out benchmarks/results/DATE-gpu.json          # under 8 minutes on an H200
    TRITON_INTERPRET=1 python benchmarks/gpu.py --size tiny --device cpu --tokens 0 --context 40 --prompt 33 --batch 2 \
        --rounds 1 --work DIR                                                          # does the script run? no figures

First granite-nano in 4 bits is compared with the reference on the same device, teacher-forced on held-out text: KL and the
share of the same top token. Then files of random weights are timed: steps of one token and of a batch at a context of
--context tokens, and a prompt, in turns with the dense bf16 model in the same backend; medians of --rounds rounds. Beside them
stand the measured copy bandwidth and the rate of a bf16 product of torch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from batch import prompts
from parts.machine import device_name
from parts.results import write_results
from synthetic import SyntheticPlan, write_synthetic

from mpo_exporter.export import ExportTask, export
from mpo_exporter.plan.options import Options
from mpo_exporter.source import data_folder, open_source
from mpo_runtime.engine.pages import PagePool
from mpo_runtime.engine.sequence import Part, Sequence, run_step
from mpo_runtime.loading import load_network, open_weights
from mpo_runtime.measure import compare
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.text.token_text import read_tokens


def seconds_of(action: Callable[[], object], device: str) -> float:
    """Seconds of an action, the device's work included."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        action()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    action()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def copy_bandwidth(device: str) -> float:
    """GB/s that a copy reads and writes, the best of 5."""
    source = torch.zeros((1 << 30 if device.startswith("cuda") else 1 << 24,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(seconds_of(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * source.numel() / best / 1e9


def matrix_rate(device: str) -> float:
    """Multiply-adds a second, in 10¹², of a bf16 product of torch, the best of 5."""
    size = 4096 if device.startswith("cuda") else 256
    a = torch.randn((size, size), device=device, dtype=torch.bfloat16)
    return size**3 / min(seconds_of(lambda: a @ a, device) for _ in range(5)) / 1e12


def agreement(folder: Path, device: str, tokens: int) -> dict[str, Any]:
    """granite-nano in 4 bits, this backend against the reference: KL and the same top token."""
    path = folder / "nano-int4.mpo"
    with open_source("demo") as source:
        export(source, ExportTask(path, Options("int4"), force=True))
        ids = read_tokens(data_folder() / "evaluation.jsonl", *source.text_files).ids[:tokens]
    networks = [load_network(open_weights(path), device=device, backend=name) for name in ("triton", "reference")]
    with torch.inference_mode():
        found = compare(networks[0], networks[1], ids)
    return {"kl_mean": found.kl_mean, "same_top1": found.same_top1, "tokens": int(ids.size)}


class Contestant:
    """A file of random weights, opened, with texts at the context that is timed."""

    def __init__(self, name: str, path: Path, arguments: argparse.Namespace) -> None:
        self.name, self.bytes, self.device = name, path.stat().st_size, arguments.device
        self.network: Decoder = load_network(open_weights(path), device=self.device, backend="triton")
        self.prompt_length = arguments.prompt
        self.times: dict[str, list[float]] = {}
        self.pool = PagePool(self.network.ops.new_pages(self.network.architecture))
        self.texts = {size: self.at_context(size, arguments.context) for size in (1, arguments.batch)}

    def at_context(self, count: int, length: int) -> list[Sequence]:
        """Texts whose KV cache holds `length` tokens."""
        texts = [Sequence(self.pool) for _ in range(count)]
        for text, ids in zip(texts, prompts(count, length, self.network.architecture.vocab_size), strict=True):
            run_step(self.network, [Part(text, ids, few=False)], together=True)
        return texts

    def measure(self) -> None:
        """One round: a step of each batch, and a prompt."""
        for size, texts in self.texts.items():
            parts = [Part(text, [1], few=True) for text in texts]
            self.add(f"step of {size}", lambda parts=parts: run_step(self.network, parts, together=True))
        ids = prompts(1, self.prompt_length, self.network.architecture.vocab_size)[0]
        text = Sequence(self.pool)
        self.add("prompt", lambda: run_step(self.network, [Part(text, ids, few=False)], together=True))

    def add(self, what: str, action: Callable[[], object]) -> None:
        """Times an action."""
        self.times.setdefault(what, []).append(seconds_of(action, self.device))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, as the results' fields."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    agrees = agreement(arguments.work, arguments.device, arguments.tokens) if arguments.tokens else None
    bandwidth, rate = copy_bandwidth(arguments.device), matrix_rate(arguments.device)
    contestants = []
    for name in arguments.plans.split(","):
        path = arguments.work / f"{arguments.size}-{name.replace('/', '-')}.mpo"
        if not path.exists():
            write_synthetic(arguments.size, SyntheticPlan.parse(name), path)
        contestants.append(Contestant(name, path, arguments))
    with torch.inference_mode():
        for index in range(arguments.rounds + 1):
            for one in contestants:
                one.measure()
                if index == 0:  # the first round compiles the kernels
                    one.times.clear()
    rows = []
    for one in contestants:
        medians = {what: statistics.median(times) for what, times in one.times.items()}
        single, batch = medians["step of 1"], medians[f"step of {arguments.batch}"]
        rows.append(
            {
                "name": one.name,
                "bytes": one.bytes,
                "decode_tokens_per_second": 1 / single,
                "share_of_bandwidth": one.bytes / single / 1e9 / bandwidth,
                "batch_tokens_per_second": arguments.batch / batch,
                "prompt_tokens_per_second": arguments.prompt / medians["prompt"],
                "rounds": one.times,
            }
        )
    return {
        "rows": rows,
        "device": device_name(arguments.device),
        "agreement": agrees,
        "copy_bandwidth": bandwidth,
        "matrix_rate": rate,
        "size": arguments.size,
        "context": arguments.context,
        "batch": arguments.batch,
        "prompt": arguments.prompt,
    }


def markdown(result: dict[str, Any]) -> str:
    """The rows as a table."""
    rows = result["rows"]
    dense = next((row["decode_tokens_per_second"] for row in rows if row["name"] == "dense"), None)
    head = ["file", "GB", "tokens/s", "of the copy bandwidth", "over dense", f"tokens/s, batch {result['batch']}"]
    lines = ["| " + " | ".join([*head, "over batch 1", "prompt tokens/s"]) + " |", "|" + "---|" * 8]
    for row in rows:
        speed = row["decode_tokens_per_second"]
        cells = [row["name"], f"{row['bytes'] / 1e9:.2f}", f"{speed:.1f}", f"{row['share_of_bandwidth']:.2f}"]
        cells += [f"{speed / dense:.2f}" if dense else "", f"{row['batch_tokens_per_second']:.0f}"]
        cells += [f"{row['batch_tokens_per_second'] / speed:.1f}", f"{row['prompt_tokens_per_second']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("8b", "2b", "tiny"), default="8b")
    parser.add_argument("--plans", default="4,2+3,4/chi32,dense")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, required=True, help="folder for the files")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--tokens", type=int, default=4096, help="of the text on which both backends are compared; 0: no comparison"
    )
    parser.add_argument("--out", type=Path, help="JSON")
    arguments = parser.parse_args()
    result = run(arguments)
    agrees = result["agreement"]
    print(
        f"\n{result['device']}: copies at {result['copy_bandwidth']:.0f} GB/s, {result['matrix_rate']:.1f}·10¹² multiply-adds/s"
    )
    print(
        f"granite-nano: KL to the reference {agrees['kl_mean']:.2e}, same top token {100 * agrees['same_top1']:.2f} %\n"
    )
    print(markdown(result))
    write_results(arguments.out, **result)


if __name__ == "__main__":
    main()
