"""Checkpoints of a healing: one safetensors file with a JSON record, replaced atomically by renaming; no pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mpo_formats import ConfigError, OutputError
from mpo_formats.writer import sync_folder

NAME = "checkpoint.safetensors"
RECORD = "healing"


@dataclass(slots=True)
class Record:
    """How far a healing has come.

    Args:
        digest: of the settings and of everything they are applied to.
        blocks: single blocks that are finished.
        step: finished steps of the whole model.
        seconds, tokens: spent so far.
        began: the value of `seconds` when the training of the whole model began.
        rates: the optimizer's learning rates before the schedule.
        core_factor, walking_factor: what the rates of cores, and of integers and scales, were lowered by.
        matches: whether the outputs of blocks are matched.
        ordered: whether the bonds were already sorted once.
        block_curves, curve: the loss of every step, for each block and for the whole model.
    """

    digest: str
    blocks: int = 0
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    began: float = 0.0
    rates: list[float] = field(default_factory=list)
    core_factor: float = 1.0
    walking_factor: float = 1.0
    matches: bool = True
    ordered: bool = False
    block_curves: list[list[float]] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)


def save_checkpoint(folder: Path, record: Record, tensors: Mapping[str, Tensor]) -> None:
    """Replaces the folder's checkpoint.

    Raises:
        OutputError: when it cannot be written; the previous checkpoint then remains.
    """
    temporary = folder / f".{NAME}.partial"
    try:
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(kept, temporary, {RECORD: json.dumps(asdict(record))})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, folder / NAME)
        sync_folder(folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{folder / NAME}: cannot be written ({error}); free some space") from None


def load_checkpoint(
    folder: Path, digest: str, *, discard_other: bool = False
) -> tuple[Record, dict[str, Tensor]] | None:
    """The folder's checkpoint, or None where there is none.

    Args:
        digest: of this healing.
        discard_other: return None for a checkpoint of a different healing, so that the next one replaces it.

    Raises:
        ConfigError: when it belongs to a different healing, or is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            record = Record(**json.loads(file.metadata()[RECORD]))
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: is damaged ({error}); remove {folder} to start over") from None
    if record.digest != digest:
        if discard_other:
            return None
        raise ConfigError(
            f"{path}: is of a healing with other settings, data or models; give the same ones, "
            f"or remove {folder} to start over"
        )
    return record, tensors


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as a flat dictionary of tensors."""
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {f"optimizer.{index}.{key}": value for index, values in state.items() for key, value in values.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restores the state that `optimizer_tensors` returned."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
