"""Steps of several texts at once: time of a step and tokens per second by batch, and the memory of a long context.

    python benchmarks/batch.py --file granite-2b-4bit.mpo --out results.json

The file comes from benchmarks/synthetic.py. Every text has a prompt of its own of 32 tokens; then each step runs one token of
every text. Batches take turns in every round; the table gives medians over rounds. The memory is that of the pages of the KV
cache after a prompt of 8,192 tokens, and the growth of the process beside it, against 2 · blocks · key-value heads · head
size · positions · bytes of an element.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from parts.results import write_results

from mpo_runtime import native
from mpo_runtime.engine.pages import PagePool
from mpo_runtime.engine.sequence import Part, Sequence, run_step
from mpo_runtime.loading import load_network, open_weights
from mpo_runtime.models.decoder import Decoder

PROMPT = 32
ELEMENT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}


def prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    """Random prompts [count, length]."""
    found: list[list[int]] = np.random.default_rng(0).integers(0, vocabulary, (count, length)).tolist()
    return found


class Batch:
    """Some texts that are generated together."""

    def __init__(self, network: Decoder, size: int) -> None:
        self.network, pool = network, PagePool(network.ops.new_pages(network.architecture))
        self.texts = [Sequence(pool) for _ in range(size)]
        for text, ids in zip(self.texts, prompts(size, PROMPT, network.architecture.vocab_size), strict=True):
            run_step(network, [Part(text, ids, few=False)], together=True)

    def seconds(self, steps: int) -> float:
        """Seconds of a step, the mean over `steps`."""
        start = time.perf_counter()
        for step in range(steps):
            run_step(self.network, [Part(text, [step + 1], few=True) for text in self.texts], together=True)
        return (time.perf_counter() - start) / steps


def resident() -> int:
    """Resident bytes of this process."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(rows["VmRSS"].split()[0]) * 1024


def context_memory(network: Decoder, length: int) -> dict[str, int]:
    """Bytes of the KV cache of one text of `length` tokens: by the formula, in pages, as growth of the process.

    The pages are written directly: what is computed does not matter here.
    """
    a, pool = network.architecture, PagePool(network.ops.new_pages(network.architecture))
    element = ELEMENT_BYTES[str(vars(network.ops)["kv_type"])]
    text, before = Sequence(pool), resident()
    text.reserve(length)
    content = bytes(pool.store.page_bytes)
    for page in text.pages:
        pool.store.write(page, content)
    grown = resident() - before - len(content)
    formula = 2 * a.num_hidden_layers * a.num_key_value_heads * a.head_dim * length * element
    return {"positions": length, "formula": formula, "pages": pool.used_bytes, "grown": grown}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs all rounds; returns their figures."""
    network = load_network(open_weights(arguments.file), backend="native", threads=arguments.threads)
    batches = {size: Batch(network, size) for size in arguments.batch}
    found: dict[int, list[float]] = {size: [] for size in batches}
    for batch in batches.values():
        batch.seconds(1)
    for _ in range(arguments.rounds):
        for size, batch in batches.items():
            found[size].append(batch.seconds(arguments.steps))
    medians = {size: statistics.median(seconds) for size, seconds in found.items()}
    single = medians[min(medians)] / min(medians)
    rows = [
        {
            "batch": size,
            "step_ms": 1e3 * seconds,
            "step_ms_rounds": [1e3 * each for each in found[size]],
            "tokens_per_second": size / seconds,
            "step_over_1": seconds / single,
            "tokens_per_second_over_1": size * single / seconds,
        }
        for size, seconds in medians.items()
    ]
    return {
        "threads": arguments.threads,
        "kernels": native.active(),
        "row_exact": network.ops.row_exact,
        "file_bytes": arguments.file.stat().st_size,
        "rows": rows,
        "context": context_memory(network, arguments.context),
    }


def markdown(result: dict[str, Any]) -> str:
    """The rows as a table."""
    lines = ["| batch | step ms | tokens/s | step / batch 1 | tokens/s / batch 1 |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        cells = [str(row["batch"]), f"{row['step_ms']:.1f}", f"{row['tokens_per_second']:.1f}"]
        cells += [f"{row['step_over_1']:.2f}", f"{row['tokens_per_second_over_1']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    context = result["context"]
    share = context["pages"] / context["formula"]
    grown = context["grown"] / context["formula"]
    lines.append(
        f"\n{context['positions']} positions: pages {share:.3f} of the formula, the process grew by {grown:.3f}"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, required=True, help="a .mpo file")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="of a stretch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--out", type=Path, help="JSON")
    arguments = parser.parse_args()
    result = run(arguments)
    print(markdown(result))
    write_results(arguments.out, **result)


if __name__ == "__main__":
    main()
