"""Lanes: threads that take whole batches, each with one thread of torch and of the kernels.

A block on a small batch is a hundred short steps. Shared among threads each step ends with a wait, and many steps are not shared
at all. Batches side by side keep all cores busy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from functools import cache
from typing import TypeVar

import torch

from mpo_exporter.calibrate import precision
from mpo_runtime import native

Item = TypeVar("Item")
Found = TypeVar("Found")
# With more threads than this the steps themselves are shared: every lane has sums of its own in memory.
MOST = 4
# Lanes would wait for each other too long where so few items are left for the last round that there are more places than this
# times the items.
FULL = 1.25


def lane_count(device: torch.device | str = "cpu") -> int:
    """How many lanes there are for work on a device: on the CPU one for each thread, unless there are many; else one."""
    threads = torch.get_num_threads()
    # Torch's precision, by which matrix units are chosen, is one for all threads.
    return threads if torch.device(device).type == "cpu" and threads <= MOST and not precision.uses_tiles() else 1


def in_lanes(
    work: Callable[[int, Item], Found], items: Sequence[Item], device: torch.device | str = "cpu"
) -> list[Found]:
    """`work(lane, item)` for all items, in their order; lane k takes the items k, k + count, … one after the other.

    Gradients are recorded, and products fast, as in the calling thread. Where there is one lane, it is the calling thread.

    Raises:
        Exception: the first that `work` raises, when all lanes have ended.
    """
    count = min(lane_count(device), len(items))
    if count <= 1 or count * -(-len(items) // count) > FULL * len(items):
        return [work(0, item) for item in items]
    recorded, fast, stopped = torch.is_grad_enabled(), precision.are_fast(), threading.Event()

    def lane(number: int) -> list[Found]:
        found = []
        with torch.set_grad_enabled(recorded), precision.fast_products() if fast else nullcontext():
            try:
                for item in items[number::count]:
                    if stopped.is_set():
                        break
                    found.append(work(number, item))
            except BaseException:
                stopped.set()
                raise
        return found

    futures = [_threads(count).submit(lane, number) for number in range(count)]
    try:
        wait(futures)
    except BaseException:  # the user ends the program
        stopped.set()
        wait(futures)
        raise
    parts = [future.result() for future in futures]
    return [parts[place % count][place // count] for place in range(len(items))]


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "lane", initializer=_alone)


def _alone() -> None:
    torch.set_num_threads(1)  # of this thread
    native.run_alone()
