"""Servers side by side at several numbers of clients: `mpo-run serve`, `llama-server`, vLLM, ONNX Runtime, the bare engine.

    python benchmarks/serving.py --clients 1 2 4 8 16 --engine model.mpo \\
        --server "mpo-run=mpo-run serve model.mpo --parallel 16 --port {port}" \\
        --server "llama-server=llama-server -m model.gguf -np 16 -c 16384 -t 2 --port {port}"

All servers are started and stay. In every round each of them is measured in turn at every number of clients, so that busy
moments hit all of them and all numbers; the figures are medians over rounds. A server speaks OpenAI's completions and takes
token ids; variables are set by `env NAME=VALUE` before its command. Each client sends one request: a prompt of random token
ids, and tokens drawn greedily (`--prompt`, `--tokens`). A rate is the tokens of all clients over the time from the first
request to the last answer. The time between tokens is that from a request's first token to its last, over the tokens after the
first. CPU seconds are those of the server's process and of all that it started, all threads. `--engine` measures the same
requests, one at a time, through the engine in a process of its own without a server.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from parts.results import write_results

FIRST_PORT = 8123
# Reads prompts from its input, one a line, and answers each with seconds and CPU seconds.
ENGINE = """
import json, sys, time
from mpo_runtime import load
from mpo_runtime.sampler import SamplingOptions
model = load(sys.argv[1])
for line in sys.stdin:
    ids, tokens = json.loads(line)
    begin, used = time.perf_counter(), time.process_time()
    first, count = 0.0, 0
    for step in model.engine.generate(ids, SamplingOptions(temperature=0), max_tokens=tokens, stop_ids=()):
        first, count = first or time.perf_counter() - begin, count + 1
    print(json.dumps([first, time.perf_counter() - begin, count, time.process_time() - used]), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A server at one number of clients: medians over rounds.

    tokens_per_second of all clients; first_token_s and between_tokens_s of one; cpu_s of the server for each token.
    """

    server: str
    clients: int
    tokens_per_second: float
    first_token_s: float
    between_tokens_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """One request: seconds to its first token and to its end, and the number of tokens."""

    first: float
    seconds: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Round:
    """All clients' requests at once: seconds until the last has ended, CPU seconds of the server."""

    answers: list[Answer]
    seconds: float
    cpu: float


class Served:
    """A running server."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], url: str) -> None:
        self.name, self.process, self.url, self.tokens = name, process, url, 64
        with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
            self.model = json.load(answer)["data"][0]["id"]

    def round(self, prompts: list[list[int]]) -> Round:
        """One request for each prompt, all at once."""
        begin, used = time.perf_counter(), cpu_seconds(self.process.pid)
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(self.complete, prompts))
        return Round(answers, time.perf_counter() - begin, cpu_seconds(self.process.pid) - used)

    def complete(self, prompt: list[int]) -> Answer:
        """Streams one completion."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        begin, first, count = time.perf_counter(), 0.0, 0
        with urllib.request.urlopen(request, timeout=600) as answer:
            for line in answer:
                data = line.decode().removeprefix("data:").strip()
                if not data or data == "[DONE]":
                    continue
                first = first or time.perf_counter() - begin
                if '"usage"' in data and (usage := json.loads(data).get("usage")):
                    count = usage["completion_tokens"]
        return Answer(first, time.perf_counter() - begin, count)


class Engine:
    """The engine in a process without a server."""

    name = "engine"

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.tokens = process, 64

    def round(self, prompts: list[list[int]]) -> Round:
        """The prompts one after another."""
        begin, answers, used = time.perf_counter(), [], 0.0
        for prompt in prompts:
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.write(json.dumps([prompt, self.tokens]) + "\n")
            self.process.stdin.flush()
            first, seconds, count, cpu = json.loads(self.process.stdout.readline())
            answers.append(Answer(first, seconds, count))
            used += cpu
        return Round(answers, time.perf_counter() - begin, used)


def cpu_seconds(process: int) -> float:
    """CPU seconds that a process and its children, and theirs, have used so far; 0 where the system does not tell."""
    parents: dict[int, int] = {}
    used: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        number = int(path.parent.name)
        parents[number] = int(fields[1])
        # its own time, and that of children that have ended
        used[number] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    family = {process}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(used.get(number, 0.0) for number in family)


@contextmanager
def served(name: str, command: list[str], url: str, seconds: float) -> Iterator[Served]:
    """Runs a server until the block ends; raises SystemExit where it does not answer in time, or another one does."""
    try:
        urllib.request.urlopen(f"{url}/v1/models", timeout=2).close()
    except (urllib.error.URLError, OSError):
        pass
    else:
        raise SystemExit(f"{url}: a server answers there already; end it first")
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
        yield Served(name, process, url)
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def bare(file: Path) -> Iterator[Engine]:
    """Runs the engine until the block ends."""
    command = [sys.executable, "-c", ENGINE, str(file)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Engine(process)
    finally:
        process.kill()
        process.wait()


def row(name: str, clients: int, rounds: list[Round]) -> Row:
    """The medians over rounds."""
    answers = [answer for one in rounds for answer in one.answers]
    counts = [sum(answer.tokens for answer in one.answers) for one in rounds]
    return Row(
        name,
        clients,
        statistics.median(count / one.seconds for count, one in zip(counts, rounds, strict=True)),
        statistics.median(answer.first for answer in answers),
        statistics.median((answer.seconds - answer.first) / max(answer.tokens - 1, 1) for answer in answers),
        statistics.median(one.cpu / count for count, one in zip(counts, rounds, strict=True)),
    )


def measure(contestants: list[Served | Engine], arguments: argparse.Namespace) -> list[Row]:
    """The rows of all servers."""
    source, rounds = random.Random(0), arguments.rounds

    def prompts(count: int) -> list[list[int]]:
        return [[source.randrange(10, arguments.vocabulary) for _ in range(arguments.prompt)] for _ in range(count)]

    for contestant in contestants:
        contestant.tokens = arguments.tokens
        contestant.round(prompts(1))
    found: dict[tuple[str, int], list[Round]] = {}
    for _ in range(rounds):
        for count in arguments.clients:
            asked = prompts(count)
            for one in contestants:
                if count == 1 or not isinstance(one, Engine):
                    found.setdefault((one.name, count), []).append(one.round(asked))
    rows = [row(name, count, results) for (name, count), results in sorted(found.items())]
    for line in rows:
        print(
            f"{line.server}, {line.clients} clients: {line.tokens_per_second:.1f} tokens/s, first token "
            f"{line.first_token_s:.3f} s, between tokens {line.between_tokens_s * 1e3:.2f} ms, "
            f"CPU {line.cpu_s * 1e3:.2f} ms a token"
        )
    return rows


def main() -> None:
    """Measures the servers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", action="append", default=[], metavar="NAME=COMMAND", help="{port} is its port")
    parser.add_argument("--engine", type=Path, help="a model for the engine without a server")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=4096, help="ids of prompts are drawn below it")
    parser.add_argument("--start-seconds", type=float, default=300)
    parser.add_argument("--model", default="", help="what the model is called in the results")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with ExitStack() as running:
        contestants: list[Served | Engine] = []
        for index, text in enumerate(arguments.server):
            name, _, command = text.partition("=")
            port = str(FIRST_PORT + index)
            words = shlex.split(command.replace("{port}", port))
            url = f"http://127.0.0.1:{port}"
            contestants.append(running.enter_context(served(name, words, url, arguments.start_seconds)))
        if arguments.engine:
            contestants.append(running.enter_context(bare(arguments.engine)))
        rows = measure(contestants, arguments)
    facts = {"model": arguments.model, "prompt": arguments.prompt, "tokens": arguments.tokens}
    # Paths inside the servers' commands are shortened, too: they say nothing of the machine.
    command = shlex.join(["python", *(re.sub(r"[^\s=]*/", "", word) for word in sys.argv)])
    write_results(arguments.out, [asdict(one) for one in rows], command=command, **facts)


if __name__ == "__main__":
    sys.exit(main())
