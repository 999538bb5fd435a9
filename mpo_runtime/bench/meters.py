"""What is read beside the clock: the machine's read bandwidth, and the energy counters of the CPU (RAPL)."""

from __future__ import annotations

import threading
import time
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpo_runtime import native

# Larger than any CPU cache.
BUFFER_BYTES = 1 << 29
POWERCAP = Path("/sys/class/powercap")


@cache
def buffer() -> NDArray[np.uint64]:
    """Half a gigabyte of memory, written once so that every page exists."""
    return np.ones(BUFFER_BYTES // 8, np.uint64)


def read_bandwidth(threads: int, passes: int = 3) -> float:
    """GB/s of reading memory in order: the best of `passes`, each summing half a gigabyte in `threads` threads."""
    if native.available():
        return max(native.read_bandwidth(buffer(), threads) for _ in range(passes))
    parts = np.array_split(buffer(), threads)
    best = 0.0
    for _ in range(passes):
        workers = [threading.Thread(target=part.sum) for part in parts]  # numpy sums without the GIL
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, BUFFER_BYTES / 1e9 / (time.perf_counter() - start))
    return best


class Energy:
    """Joules that the CPU packages have taken, from Linux's powercap interface; absent where it cannot be read.

    The counters are those of whole packages: everything else that the machine does meanwhile is in them.
    """

    def __init__(self, folder: Path = POWERCAP) -> None:
        self._counters: list[tuple[Path, int]] = []
        for zone in sorted(folder.glob("intel-rapl:*")):
            # intel-rapl:0 is a package; intel-rapl:0:0 is a part of it, which must not be counted twice.
            if zone.name.count(":") != 1:
                continue
            try:
                int((zone / "energy_uj").read_text())
                self._counters.append((zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())))
            except (OSError, ValueError):  # only root may read it, or a virtual machine has none
                continue

    @property
    def readable(self) -> bool:
        """Whether there is a counter."""
        return bool(self._counters)

    def now(self) -> list[int]:
        """The counters in microjoules."""
        return [int(path.read_text()) for path, _ in self._counters]

    def since(self, before: list[int]) -> float | None:
        """Joules since `before`, None without a counter; a counter that began again at 0 is taken into account."""
        if not self._counters:
            return None
        spent = zip(before, self.now(), self._counters, strict=True)
        return sum((after - start) % (limit + 1) for start, after, (_, limit) in spent) / 1e6
