"""Exports a folder over a target again and again, in children that are to be killed; see kill_child.

python -m tests.e2e.export_child FOLDER TARGET
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mpo_exporter.plan.options import Options
from tests.helpers import export_folder


def export_forever(folder: Path, target: Path, number: int) -> None:
    """Exports round after round; the round is told by χ, of which the file keeps a record."""
    while True:
        export_folder(folder, target, Options("paper", chi=number), force=True)
        number += 1


def main(folder: Path, target: Path) -> None:
    """Serves `go` lines until the input ends."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            export_forever(folder, target, int(line.split()[1]))
        print(child, flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
