"""What starting a file costs, in processes of their own: time to open it, to its first token, and memory at its most.

    python benchmarks/launch.py FILE.mpo FILE2.mpo --threads 2

The file is warm: its pages are in the system's cache. The first token is that after a prompt of 16, counted from the
launch of the interpreter. Memory is the peak resident set while 64 tokens are decoded, the mapped file included, from Linux's
/proc (getrusage also counts what the parent had when it forked).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from parts.results import write_results

PROMPT, TOKENS, CONTEXT, ROUNDS = 16, 64, 512, 5
# Runs in the child; argv: file, threads.
CHILD = f"""
import json, sys, time
from pathlib import Path
from mpo_runtime.engine import Engine
from mpo_runtime.loading import load_network
from mpo_runtime.loading import open_weights
begin = time.perf_counter()
network = load_network(open_weights(Path(sys.argv[1])), threads=int(sys.argv[2]))
opened = time.perf_counter() - begin
engine = Engine(network, context={CONTEXT})
token = int(engine.prefill(list(range(1, {PROMPT} + 1))).argmax())
first = time.time()
for _ in range({TOKENS}):
    token = int(engine.advance([token]).argmax())
[peak] = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")]
a = network.architecture
cache = 2 * a.num_hidden_layers * a.num_key_value_heads * a.head_dim * {CONTEXT} * 4
print(json.dumps(dict(opened=opened, first=first, peak=peak * 1024, cache=cache, torch="torch" in sys.modules)))
"""


@dataclass(frozen=True, slots=True)
class Launch:
    """Medians over launches: milliseconds to open, seconds to the first token; bytes of the largest peak."""

    open_ms: float
    first_token_s: float
    peak_bytes: int
    over_file_and_cache: int
    imports_torch: bool


def launch(path: Path, threads: int, rounds: int = ROUNDS) -> Launch:
    """Starts the file in `rounds` new processes, after one that warms it."""
    found = []
    for _ in range(rounds + 1):
        begin = time.time()
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(path), str(threads)], check=True, capture_output=True, text=True
        )
        row = json.loads(done.stdout)
        found.append(row | {"first": row["first"] - begin})
    warm = found[1:]
    peak = max(row["peak"] for row in warm)
    return Launch(
        1e3 * statistics.median(row["opened"] for row in warm),
        statistics.median(row["first"] for row in warm),
        peak,
        peak - path.stat().st_size - warm[0]["cache"],
        any(row["torch"] for row in warm),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON")
    arguments = parser.parse_args()
    rows = {path.name: launch(path, arguments.threads) for path in arguments.files}
    print(
        "| file | MB | open, ms | first token, s | peak MB | of that beyond file and KV cache |\n|---|---|---|---|---|---|"
    )
    for path, row in zip(arguments.files, rows.values(), strict=True):
        print(
            f"| {path.name} | {path.stat().st_size / 1e6:.1f} | {row.open_ms:.0f} | {row.first_token_s:.2f} | "
            f"{row.peak_bytes / 1e6:.0f} | {row.over_file_and_cache / 1e6:.0f} |"
        )
    write_results(arguments.out, [{"file": name} | asdict(row) for name, row in rows.items()])


if __name__ == "__main__":
    main()
