"""Resident memory of a model, in a process of its own: `python -m mpo_exporter.report.footprint MODEL TOKENS THREADS`.

The process prints one line of JSON: the largest resident memory in bytes before the model is loaded, and after it has decoded
some tokens. Pages of the mapped file count if they were read. At module level only light modules are imported, so that the
first figure is small.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from mpo_runtime.memory import peak_memory

# Seconds after which the process is stopped.
LONGEST = 120.0


def measure(model: str, tokens: int, threads: int | None) -> tuple[int, int]:
    """Loads a model and decodes some tokens; returns the largest resident memory before and after, in bytes."""
    from mpo_runtime.loading import load
    from mpo_runtime.sampler import SamplingOptions

    base = peak_memory()
    with load(model, threads=threads) as loaded:
        start = loaded.network.architecture.bos_token_id or 0
        for _ in loaded.engine.generate([start], SamplingOptions(temperature=0), max_tokens=tokens, stop_ids=()):
            pass
        return base, peak_memory()


def in_child(model: Path, tokens: int, threads: int | None) -> tuple[int, int] | str:
    """As `measure`, in a new process; or the reason why that failed."""
    command = [sys.executable, "-m", __name__, str(model), str(tokens), str(threads or 0)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, env=environment, check=False)
        facts = json.loads(done.stdout)
        return int(facts["base"]), int(facts["peak"])
    except subprocess.TimeoutExpired:
        return f"loading {model.name} and decoding {tokens} tokens took more than {LONGEST:.0f} s"
    except (OSError, ValueError, KeyError):
        return f"the process that measures {model.name} failed"


if __name__ == "__main__":
    before, after = measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) or None)
    print(json.dumps({"base": before, "peak": after}))
