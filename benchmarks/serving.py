"""Servers at several numbers of clients: `mpo-run serve`, `vllm serve` and any other that speaks OpenAI's completions.

    python benchmarks/serving.py --name mpo-run --clients 1 4 16 -- mpo-run serve model.mpo --port 8123
    python benchmarks/serving.py --name vLLM --clients 1 4 16 -- vllm serve model-vllm --port 8123

The command after `--` is started, awaited and ended. Each client sends one request at a time: a prompt of 64 different token
ids, 64 tokens drawn greedily. Every number of clients is run once to warm up, with other prompts, and once to measure, two
requests for each client. Rates are tokens of all clients over the time from the first request to the last answer; the time to
the first token is the median over requests.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from parts.results import write_results

PROMPT, TOKENS, REQUESTS = 64, 64, 2


@dataclass(frozen=True, slots=True)
class Row:
    """One server at one number of clients: tokens per second of all clients, median seconds to the first token."""

    server: str
    clients: int
    tokens_per_second: float
    first_token_s: float


@contextmanager
def served(command: list[str], url: str, seconds: float) -> Iterator[None]:
    """Runs a server until the block ends; raises SystemExit where it does not answer in time."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + seconds
        while True:
            try:
                urllib.request.urlopen(f"{url}/v1/models", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{' '.join(command)}: does not answer at {url}") from None
                time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait(60)


def complete(url: str, model: str, prompt: list[int]) -> tuple[float, int]:
    """Streams one completion; returns the seconds to its first piece and the number of tokens drawn."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    begin, first, count = time.perf_counter(), 0.0, 0
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            data = line.decode().removeprefix("data:").strip()
            if not data or data == "[DONE]":
                continue
            first = first or time.perf_counter() - begin
            usage = json.loads(data).get("usage")
            count = usage["completion_tokens"] if usage else count
    return first, count


def measure(url: str, model: str, clients: int, vocabulary: int, seed: int) -> tuple[float, float]:
    """Tokens per second of all clients, and the median time to the first token."""
    source = random.Random(seed)
    prompts = [[source.randrange(10, vocabulary) for _ in range(PROMPT)] for _ in range(clients * REQUESTS)]
    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(lambda prompt: complete(url, model, prompt), prompts))
    seconds = time.perf_counter() - begin
    return sum(count for _, count in found) / seconds, statistics.median(first for first, _ in found)


def main() -> None:
    """Measures one server and adds its rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="what the server is called in the table")
    parser.add_argument("--url", default="http://127.0.0.1:8123")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--vocabulary", type=int, default=4096, help="ids of prompts are drawn below it")
    parser.add_argument("--start-seconds", type=float, default=300)
    parser.add_argument("--out", type=Path, help="JSON; rows of other servers in it are kept")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command that starts the server")
    arguments = parser.parse_args()
    command = [word for word in arguments.command if word != "--"]
    rows = []
    with served(command, arguments.url, arguments.start_seconds):
        with urllib.request.urlopen(f"{arguments.url}/v1/models", timeout=10) as answer:
            model = json.load(answer)["data"][0]["id"]
        for clients in arguments.clients:
            measure(arguments.url, model, clients, arguments.vocabulary, 1000 + clients)
            rate, first = measure(arguments.url, model, clients, arguments.vocabulary, clients)
            rows.append(Row(arguments.name, clients, rate, first))
            print(f"{arguments.name}, {clients} clients: {rate:.1f} tokens/s, first token {first:.3f} s", flush=True)
    if arguments.out:
        known = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
        kept = [row for row in known if row["server"] != arguments.name]
        write_results(arguments.out, [*kept, *(asdict(row) for row in rows)])


if __name__ == "__main__":
    sys.exit(main())
