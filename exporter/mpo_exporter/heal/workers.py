"""The processes that share a healing under torchrun, and the progress that the first of them shows.

Several devices use torch's own process group and DistributedDataParallel.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed

# Its functions keep the process group that there is when they are imported, and DistributedDataParallel imports them. A group
# that is kept is not ended with the others: its threads run on while Python ends, and now and then that aborts the process.
import torch.distributed.nn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mpo_formats import ConfigError

# How long a process waits for the others: they all wait while the first one runs the teacher.
TIMEOUT = timedelta(hours=24)
# Seconds between two lines of progress where standard error is not a terminal.
LINE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Workers:
    """This process (`rank`) among `count` processes, and the device it computes on."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module; with several processes wrapped so that its gradients are averaged over them."""
        return module if self.count == 1 else DistributedDataParallel(module)

    def unsynchronised(self, module: nn.Module) -> AbstractContextManager[None]:
        """While this is open, gradients of a wrapped module are accumulated here and not exchanged."""
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes."""
        if self.count > 1:
            torch.distributed.all_reduce(values)
        return values

    def agree(self, value: float) -> float:
        """The first process's `value`, returned in every process."""
        if self.count == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(shared, 0)
        return float(shared)

    def copy(self, module: nn.Module) -> None:
        """Copies the first process's parameters and buffers to all processes."""
        if self.count > 1:
            for tensor in module.state_dict().values():
                torch.distributed.broadcast(tensor, 0)

    def wait(self) -> None:
        """Returns when every process has called it."""
        self.agree(0.0)


@contextmanager
def joined(device: str) -> Iterator[Workers]:
    """Joins the processes that torchrun started; yields a single worker where it started none.

    Raises:
        ConfigError: for a CUDA device that this machine does not have.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Workers(device=device)
        return
    if device.startswith("cuda"):
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local}: this machine has {torch.cuda.device_count()} CUDA devices; "
                "start as many processes with torchrun --nproc-per-node"
            )
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    try:
        yield Workers(torch.distributed.get_rank(), count, device)
    finally:
        torch.distributed.destroy_process_group()


class Progress(Protocol):
    """Is called with a stage, the share of it that is done (0 to 1), and figures to show beside it."""

    def __call__(self, stage: str, done: float, detail: str = "") -> None:
        """Shows them."""
        ...


def silent(stage: str, done: float, detail: str = "") -> None:
    """Discards the progress."""


@contextmanager
def shown(description: str) -> Iterator[Progress]:
    """Shows progress on standard error: a bar for each stage, or a line every ten seconds where it is not a terminal."""
    if not sys.stderr.isatty():
        yield _Lines(description)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def update(stage: str, done: float, detail: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=1.0, detail=detail)
            bars.update(tasks[stage], completed=done, detail=detail)

        yield update


class _Lines:
    def __init__(self, description: str) -> None:
        self.description = description
        self.last = time.monotonic()

    def __call__(self, stage: str, done: float, detail: str = "") -> None:
        now = time.monotonic()
        if now - self.last >= LINE_SECONDS:
            self.last = now
            print(f"{self.description}: {stage} {100 * done:.0f} % {detail}".rstrip(), file=sys.stderr, flush=True)
