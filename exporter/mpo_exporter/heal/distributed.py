"""Several processes under torchrun: torch's own process group and DistributedDataParallel, nothing home-made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mpo_formats import ConfigError

# The others wait while the first process runs the teacher.
PATIENCE = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Workers:
    """This process among `count`, and its device."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, whose gradients are averaged over the processes where there are several."""
        return module if self.count == 1 else DistributedDataParallel(module)

    def quiet(self, module: nn.Module) -> AbstractContextManager[None]:
        """Keeps gradients of a wrapped module to this process for a while."""
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.count > 1:
            torch.distributed.all_reduce(values)
        return values

    def agree(self, value: float) -> float:
        """The first process's value, in all of them."""
        if self.count == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(shared, 0)
        return float(shared)

    def copy(self, module: nn.Module) -> None:
        """Gives all processes the first one's parameters and buffers."""
        if self.count > 1:
            for tensor in module.state_dict().values():
                torch.distributed.broadcast(tensor, 0)

    def wait(self) -> None:
        """Waits until all processes are here."""
        self.agree(0.0)


@contextmanager
def joined(device: str) -> Iterator[Workers]:
    """Joins the processes that torchrun started; a single one where there is none.

    Raises:
        ConfigError: for a CUDA device that this machine lacks.
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
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    try:
        yield Workers(torch.distributed.get_rank(), count, device)
    finally:
        torch.distributed.destroy_process_group()
