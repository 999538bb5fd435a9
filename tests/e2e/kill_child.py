"""Writes a tiny model over a target again and again, in children that are to be killed.

    python -m tests.e2e.kill_child TARGET

For every line `go ROUND` of its input it forks a child that writes rounds ROUND, ROUND + 1, … without end, prints the
child's process id once the first byte may be written, and after the child has died `dead`. Forking makes a child start
in a millisecond, with everything imported.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from mpo_formats import ModelSpec
from tests.formats import tiny


def round_spec(number: int) -> ModelSpec:
    """The tiny model, marked with the number of the round that wrote it."""
    spec = tiny.model()
    return dataclasses.replace(spec, provenance=dataclasses.replace(spec.provenance, options={"round": str(number)}))


def write_forever(target: Path, number: int, content: tiny.Arrays) -> None:
    """Writes round after round over the target."""
    while True:
        tiny.write(target, round_spec(number), content, lambda _: tiny.certificates())
        number += 1


def main(target: Path) -> None:
    """Serves `go` lines until the input ends."""
    content = tiny.arrays(tiny.model())
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            write_forever(target, int(line.split()[1]), content)
        print(child, flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
