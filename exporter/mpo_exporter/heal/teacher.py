"""The dense model as a teacher: checked against the file, and its largest logits kept on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpo_exporter.heal.ops import WindowOps, compute, run_block
from mpo_exporter.heal.progress import Progress
from mpo_exporter.heal.student import head_tokens
from mpo_exporter.spill import claim
from mpo_formats import Architecture, CheckpointError
from mpo_runtime.models.granite import GraniteModel
from mpo_runtime.tokenizer import Tokenizer
from mpo_runtime.weights import Weights

# What may differ between a file and its teacher: neither changes what the same ids mean.
FREE = ("max_position_embeddings", "bos_token_id", "pad_token_id", "eos_token_ids")


def check_teacher(
    name: str, ours: Architecture, theirs: Architecture, tokenizers: tuple[Tokenizer | None, Tokenizer | None]
) -> None:
    """Refuses a teacher of another architecture or vocabulary.

    Raises:
        CheckpointError: naming the first field that differs, or the first token.
    """
    file, teacher = asdict(ours), asdict(theirs)
    for key, value in file.items():
        if key not in FREE and teacher[key] != value:
            raise CheckpointError(f"teacher {name}: {key} is {teacher[key]}, the file has {value}; "
                                  "give the model that the file was made from")  # fmt: skip
    first, second = tokenizers
    if first is None or second is None:
        return
    for token in range(ours.vocab_size):
        if first.id_to_token(token) != second.id_to_token(token):
            raise CheckpointError(f"teacher {name}: token {token} is {second.id_to_token(token)!r}, in the file "
                                  f"{first.id_to_token(token)!r}; give the model that the file was made from")  # fmt: skip


class TeacherScores:
    """The K largest log-probabilities [N, S, K] of each prediction and their token ids, in mapped files.

    `key` tells those of one teacher and text from others in the same folder; those of more windows serve fewer as well.
    """

    def __init__(self, folder: Path, key: str, shape: tuple[int, int, int], vocabulary: int) -> None:
        self.paths = folder / f"teacher-{key}-scores.npy", folder / f"teacher-{key}-tokens.npy"
        self.done = folder / f"teacher-{key}-done.npy"
        self.shape = shape
        self.types: tuple[Any, Any] = (np.float16, np.uint16 if vocabulary <= 1 << 16 else np.uint32)

    def complete(self) -> int:
        """How many windows are there, from the first on; 0 where nothing usable is."""
        if not self.done.exists():
            return 0
        return int(np.load(self.done, allow_pickle=False))

    def write(self, teacher: Weights, windows: NDArray[np.int64], *, batch: int, device: str, progress: Progress,
              enough: Callable[[], bool] | None = None) -> int:  # fmt: skip
        """Runs the teacher on windows [N, W] until all are done or it is `enough`; returns how many are done.

        Those of an earlier run are taken where they suffice: where there is no `enough`, as many as are wanted.

        Raises:
            OutputError: when they would not fit on the disk.
        """
        count, total = self.complete(), len(windows)
        if count >= total or (count and enough):
            return min(count, total)
        self.done.unlink(missing_ok=True)
        needed = sum(int(np.prod(self.shape)) * np.dtype(kind).itemsize for kind in self.types)
        files = [np.lib.format.open_memmap(path, "w+", kind, self.shape)
                 for path, kind in zip(self.paths, self.types, strict=True)]  # fmt: skip
        for path in self.paths:
            claim(path, f"the teacher's logits take {needed:,} bytes", "lower --top-k or the tokens of the text")
        model = GraniteModel(teacher.spec.architecture, WindowOps(teacher, device=device))
        for start in range(0, total, batch):
            with compute(device):
                scores, chosen = largest(model, windows[start : start + batch, :-1], self.shape[2])
            for file, array in zip(files, (scores, chosen), strict=True):
                file[start : start + batch] = array
            count = min(start + batch, total)
            progress("teacher", count / total, f"{count * self.shape[1]:,} tokens")
            if enough and enough():
                break
        for file in files:
            file.flush()
        temporary = self.done.with_suffix(".partial.npy")
        np.save(temporary, np.array(count))
        os.replace(temporary, self.done)
        return count

    def open(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """The mapped scores and token ids."""
        scores, chosen = (np.load(path, mmap_mode="r", allow_pickle=False) for path in self.paths)
        return scores, chosen


@torch.no_grad()
def largest(model: GraniteModel, inputs: NDArray[np.int64], count: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The `count` largest log-probabilities [B, S, K] after each token of inputs [B, S], and their token ids."""
    x = model.embed(model.ops.ids(inputs.tolist()))
    for block in range(model.architecture.num_hidden_layers):
        x = run_block(model, x, block)
    flat = model.normed(x).flatten(0, 1)
    size = head_tokens(model.architecture.vocab_size)
    parts = [
        model.logits(flat[start : start + size]).float().log_softmax(-1).topk(count, -1)
        for start in range(0, flat.shape[0], size)
    ]
    shape = (*inputs.shape, count)
    scores = torch.cat([part.values for part in parts]).reshape(shape)
    chosen = torch.cat([part.indices for part in parts]).reshape(shape)
    return scores.cpu().numpy(), chosen.cpu().numpy()
