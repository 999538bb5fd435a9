"""Temporary files for arrays that are too large for memory: mapped, with their disk space claimed in advance."""

from __future__ import annotations

import errno
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_formats import OutputError
from mpo_formats.writer import reserve


def mapped_file(
    file: Path, shape: tuple[int, ...], what: str = "calibration", remedy: str = "give another work folder"
) -> NDArray[np.float32]:
    """A new mapped file of float32 zeros.

    Args:
        what: the subject of the message when the disk is full.
        remedy: the end of that message.

    Raises:
        OutputError: as `claim` does.
    """
    size = 4 * math.prod(shape)
    with file.open("wb") as handle:
        handle.truncate(size)
    claim(file, f"{what} spills {size:,} bytes", remedy)
    return np.memmap(file, np.float32, "r+", shape=shape)


def spill(file: Path, matrix: NDArray[np.float32]) -> Tensor:
    """Moves a matrix to a mapped file, whose pages the system can drop from memory at any time."""
    mapped = mapped_file(file, matrix.shape)
    mapped[:] = matrix
    return torch.from_numpy(mapped)


def claim(file: Path, what: str, remedy: str) -> None:
    """Claims the disk space of a sparse file: writing to a mapped page without disk space would kill the process.

    Args:
        what: the subject of the message when the disk is full.
        remedy: the end of that message.

    Raises:
        OutputError: when the disk has too little space left; the file is removed.
    """
    size, free = file.stat().st_size, shutil.disk_usage(file.parent).free
    try:
        with file.open("r+b") as handle:
            if not reserve(handle.fileno(), size) and size > free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        file.unlink(missing_ok=True)
        raise OutputError(
            f"{file.parent}: {what}, the disk has {free:,} left ({error.strerror}); free some, or {remedy}"
        ) from None
