"""Where a model's weights are read from while it runs: the mapped file, or memory of the process's own.

On some machines, virtual ones above all, a mapped file is read more slowly than other memory, on others it is faster; which
of the two holds depends on where the pages came to lie, so it is measured. Weights are moved in the background, a piece at a
time: a copy takes the place of the file's pages at the same addresses, so whoever reads them, before or after, sees the same
bytes, and nobody waits.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_formats import ConfigError
from mpo_formats.layout import linear_tensors
from mpo_runtime import native
from mpo_runtime.memory import available_memory
from mpo_runtime.weights.protocol import Weights

LOADS = ("auto", "map", "copy")

PAGE = mmap.PAGESIZE
PIECE = 16 << 20  # moved at a time
WINDOW, WINDOWS = 8 << 20, 3  # read to find out how fast the file is
LARGEST_GAP = 1 << 16  # between tensors that are moved together
WORTH_COPYING = 1.15  # times faster
SMALLEST = 256 << 20  # smaller models are read from the CPU's caches as much as from memory
ROOM = 1.2  # memory that must be available, over the bytes that are copied

# Of Linux (asm-generic/mman-common.h, linux/mman.h).
MADV_POPULATE_READ = 22
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2


@dataclass(frozen=True, slots=True)
class Run:
    """A stretch of whole pages of one mapped file; `owner` keeps it mapped."""

    begin: int
    end: int
    owner: Any

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, and why in a few words."""

    load: str
    reason: str


def check_load(load: str) -> None:
    """Raises ConfigError unless it is `auto`, `map` or `copy`."""
    if load not in LOADS:
        raise ConfigError(f"load {load}: expected one of {', '.join(LOADS)}")


def mapped_runs(weights: Weights) -> list[Run]:
    """The pages that hold the tensors of linear layers, as far as these are views of mapped files."""
    found: list[tuple[int, int, Any]] = []
    for linear in weights.spec.linears:
        for tensor in linear_tensors(linear):
            array = weights.array(tensor.name)
            owner = mapping_of(array)
            if owner is not None and array.nbytes:
                begin = array.ctypes.data
                found.append((begin, begin + array.nbytes, owner))
    merged: list[tuple[int, int, Any]] = []
    for begin, end, owner in sorted(found, key=lambda item: item[0]):
        if merged and merged[-1][2] is owner and begin - merged[-1][1] <= LARGEST_GAP:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]), owner)
        else:
            merged.append((begin, end, owner))
    pages = [Run(-(-begin // PAGE) * PAGE, end // PAGE * PAGE, owner) for begin, end, owner in merged]
    return [run for run in pages if run.size > 0]


def mapping_of(array: NDArray[Any]) -> mmap.mmap | None:
    """The mapped file that an array is a view of, or None."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return base if isinstance(base, mmap.mmap) else None


def choose(weights: Weights, load: str) -> Choice:
    """`map` or `copy` for a wish; `auto` reads a little of the file and of other memory, in a few milliseconds.

    Raises:
        ConfigError: for another wish, or for a copy that this system cannot make.
    """
    check_load(load)
    if load == "map":
        return Choice("map", "as asked")
    possible = sys.platform == "linux" and native.available()
    if load == "copy":
        if not possible:
            raise ConfigError("load copy: needs Linux and the native kernels; use --load map")
        return Choice("copy", "as asked")
    if not possible:
        return Choice("map", "not measured: needs Linux and the native kernels")
    runs = mapped_runs(weights)
    size = sum(run.size for run in runs)
    if size < SMALLEST:
        return Choice("map", f"not measured: less than {SMALLEST >> 20} MiB")
    if available_memory() < ROOM * size:
        return Choice("map", f"a copy of {size / 1e9:.1f} GB has no room in memory")
    windows = [view(window) for window in spread_windows(runs)]
    if not all(map(is_cached, windows)):
        return Choice("map", "not measured: the file is not in memory yet")
    mapped, own = read_speed(windows), read_speed([np.ones(WINDOW // 8, np.uint64) for _ in windows])
    reason = f"reads {mapped:.1f} GB/s from the file, {own:.1f} from other memory"
    return Choice("copy" if own >= WORTH_COPYING * mapped else "map", reason)


def spread_windows(runs: list[Run]) -> list[Run]:
    """A few windows far apart."""
    large = [run for run in runs if run.size >= WINDOW]
    chosen = [large[len(large) * i // WINDOWS] for i in range(WINDOWS)] if large else []
    result = []
    for i, run in enumerate(chosen):
        begin = run.begin + (run.size - WINDOW) * (i + 1) // (WINDOWS + 1) // PAGE * PAGE
        result.append(Run(begin, begin + WINDOW, run.owner))
    return result


def view(run: Run) -> NDArray[np.uint64]:
    """The words of a run."""
    words = (ctypes.c_uint64 * (run.size // 8)).from_address(run.begin)
    return np.ctypeslib.as_array(words)


def read_speed(windows: list[NDArray[np.uint64]]) -> float:
    """GB/s of reading windows that are not in the CPU's caches: the median."""
    speeds = sorted(native.read_bandwidth(window, None, evict=True) for window in windows)
    return float(speeds[len(speeds) // 2])  # np.median loads modules that nothing else needs: 25 ms of every start


def is_cached(window: NDArray[np.uint64]) -> bool:
    """Whether all pages of a window of a mapped file are in memory; makes them readable without page faults if so."""
    library = ctypes.CDLL(None, use_errno=True)
    pages = window.nbytes // PAGE
    states = (ctypes.c_ubyte * pages)()
    address = ctypes.c_void_p(window.ctypes.data)
    if library.mincore(address, ctypes.c_size_t(window.nbytes), states) != 0:
        return False
    if not np.all(np.frombuffer(bytes(states), np.uint8) & 1):
        return False
    library.madvise(address, ctypes.c_size_t(window.nbytes), MADV_POPULATE_READ)  # Linux 5.14; a hint before
    return True


class Residence:
    """Moves runs of mapped pages into the process's own memory, in a thread of its own.

    Raises:
        ConfigError: where the system is not Linux.
    """

    def __init__(self, runs: list[Run]) -> None:
        if sys.platform != "linux":
            raise ConfigError("load copy: needs Linux; use --load map")
        self.size = sum(run.size for run in runs)
        self.moved = 0
        self._stopped = False
        held = [np.frombuffer(run.owner, np.uint8) for run in runs]  # a file with views cannot be closed
        self._thread = threading.Thread(target=self._move_all, args=(runs, held), name="weights", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when the thread has ended."""
        self._thread.join()

    def stop(self) -> None:
        """Ends it after the present piece; the rest stays mapped."""
        self._stopped = True
        self._thread.join()

    def _move_all(self, runs: list[Run], held: list[NDArray[np.uint8]]) -> None:
        """Piece by piece; `held` keeps the files mapped meanwhile."""
        for address, size in pieces(runs):
            if self._stopped or not move(address, size):
                return
            self.moved += size


def pieces(runs: list[Run]) -> Iterator[tuple[int, int]]:
    """Addresses and sizes of what is moved at a time."""
    for run in runs:
        for begin in range(run.begin, run.end, PIECE):
            yield begin, min(PIECE, run.end - begin)


def move(address: int, size: int) -> bool:
    """Puts a copy of mapped pages in their place, read-only as they were; false where the system refuses.

    The kernel replaces the pages in one step: a thread that reads them meanwhile waits for it.
    """
    library = ctypes.CDLL(None, use_errno=True)
    pointer, length = ctypes.c_void_p, ctypes.c_size_t
    library.mmap.restype = library.mremap.restype = pointer
    library.mmap.argtypes = (pointer, length, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    library.mremap.argtypes = (pointer, length, length, ctypes.c_int, pointer)
    library.mprotect.argtypes = (pointer, length, ctypes.c_int)
    library.munmap.argtypes = (pointer, length)
    failed = ctypes.c_void_p(-1).value
    copy = library.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if copy == failed:
        return False
    ctypes.memmove(copy, address, size)
    library.mprotect(copy, size, mmap.PROT_READ)
    if library.mremap(copy, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, address) == failed:
        library.munmap(copy, size)
        return False
    return True


def start(weights: Weights, load: str) -> tuple[Choice, Residence | None]:
    """Chooses, and starts the move where it was chosen. Raises ConfigError as `choose` does."""
    choice = choose(weights, load)
    return choice, Residence(mapped_runs(weights)) if choice.load == "copy" else None
