"""The dense model as a teacher: checked against the file; its largest logits and some blocks' outputs, kept on disk."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.calibrate.spill import claim
from mpo_exporter.heal.blocks import stream_fisher
from mpo_exporter.heal.ops import WindowOps, compute, run_block
from mpo_exporter.heal.progress import Progress
from mpo_exporter.heal.student import head_tokens
from mpo_formats import Architecture, CheckpointError
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.text.tokenizer import Tokenizer
from mpo_runtime.weights.protocol import Weights

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
            raise CheckpointError(
                f"teacher {name}: {key} is {teacher[key]}, the file has {value}; "
                "give the model that the file was made from"
            )
    first, second = tokenizers
    if first is None or second is None:
        return
    for token in range(ours.vocab_size):
        if first.id_to_token(token) != second.id_to_token(token):
            raise CheckpointError(
                f"teacher {name}: token {token} is {second.id_to_token(token)!r}, in the file "
                f"{first.id_to_token(token)!r}; give the model that the file was made from"
            )


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the dense model says of N windows of S tokens, in mapped files.

    Args:
        scores, chosen: its K largest log-probabilities [N, S, K] of each prediction and their token ids.
        states: the outputs [N, S, M, E] of M of its blocks, as bf16 bit patterns.
        felt: F [blocks, E], what an error of any block's output raises the divergence by: ½ Σ F e² (see stream_fisher);
            no rows where nothing is weighed by it.
    """

    scores: NDArray[np.float16]
    chosen: NDArray[np.unsignedinteger]
    states: NDArray[np.uint16]
    felt: Tensor


class TeacherFiles:
    """The files of a Lesson.

    `key` tells those of one teacher and text from others in the same folder; those of more windows serve fewer as well.

    Args:
        shape: N, S, K.
        blocks: whose outputs are kept.
    """

    def __init__(
        self, folder: Path, key: str, shape: tuple[int, int, int], of: Architecture, blocks: list[int]
    ) -> None:
        self.blocks, self.kept = blocks, shape[2]
        self.felt, self.done = folder / f"teacher-{key}-fisher.npy", folder / f"teacher-{key}-done.npy"
        self.span = shape[1]
        kinds: list[tuple[str, Any, tuple[int, ...]]] = [
            ("scores", np.float16, shape),
            ("tokens", np.uint16 if of.vocab_size <= 1 << 16 else np.uint32, shape),
            ("states", np.uint16, (*shape[:2], len(blocks), of.hidden_size)),
        ]
        self.files = [(folder / f"teacher-{key}-{name}.npy", kind, size) for name, kind, size in kinds if size[2]]

    def complete(self) -> int:
        """How many windows are there, from the first on; 0 where nothing usable is."""
        if not (self.done.exists() and self.felt.exists()):
            return 0
        return int(np.load(self.done, allow_pickle=False))

    def write(
        self,
        teacher: Weights,
        windows: NDArray[np.int64],
        weighed: NDArray[np.int64] | None,
        *,
        batch: int,
        device: str,
        progress: Progress,
        enough: Callable[[], bool] | None = None,
    ) -> int:
        """Runs the teacher on windows [N, W] until all are done or it is `enough`; returns how many are done.

        Those of an earlier run are taken where they suffice: where there is no `enough`, as many as are wanted.

        Args:
            weighed: windows that errors of the blocks' outputs are weighed by; None where none are.

        Raises:
            OutputError: when they would not fit on the disk.
        """
        count, total = self.complete(), len(windows)
        if count >= total or (count and enough):
            return min(count, total)
        self.done.unlink(missing_ok=True)
        files = self._claimed()
        model = decoder_for(teacher.spec.architecture, WindowOps(teacher, device=device))
        felt = torch.zeros(0, 0) if weighed is None else stream_fisher(model, weighed[:, :-1], batch, device)
        np.save(self.felt, felt.cpu().numpy())
        for start in range(0, total, batch):
            with compute(device):
                found = taught(model, windows[start : start + batch, :-1], self.kept, self.blocks)
            for file, array in zip(files, found, strict=False):
                file[start : start + batch] = array
            count = min(start + batch, total)
            progress("teacher", count / total, f"{count * self.span:,} tokens")
            if enough and enough():
                break
        for file in files:
            file.flush()
        temporary = self.done.with_suffix(".partial.npy")
        np.save(temporary, np.array(count))
        os.replace(temporary, self.done)
        return count

    def _claimed(self) -> list[np.memmap[Any, Any]]:
        needed = sum(math.prod(shape) * np.dtype(kind).itemsize for _, kind, shape in self.files)
        files = [np.lib.format.open_memmap(path, "w+", kind, shape) for path, kind, shape in self.files]
        for path, _, _ in self.files:
            claim(
                path,
                f"what the teacher says takes {needed:,} bytes",
                "lower --match-blocks, --top-k or the tokens of the text",
            )
        return files

    def open(self) -> Lesson:
        """The mapped files."""
        mapped = [np.load(path, mmap_mode="r", allow_pickle=False) for path, _, _ in self.files]
        felt = torch.from_numpy(np.load(self.felt, allow_pickle=False))
        states = mapped[2] if self.blocks else np.zeros((*mapped[0].shape[:2], 0, 0), np.uint16)
        return Lesson(mapped[0], mapped[1], states, felt)


def matched_blocks(blocks: int, count: int) -> list[int]:
    """`count` of a model's blocks, as far apart as they can be, the last one among them."""
    count = min(count, blocks)
    return [(place + 1) * blocks // count - 1 for place in range(count)]


@torch.no_grad()
def taught(
    model: Decoder, inputs: NDArray[np.int64], count: int, blocks: list[int]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.uint16]]:
    """What a model says of inputs [B, S].

    The `count` largest log-probabilities [B, S, K] after each token in float16, their token ids, and the outputs
    [B, S, M, E] of `blocks` as bf16 bit patterns.
    """
    x, states = model.embed(model.ops.ids(inputs.tolist())), list[Tensor]()
    for block in range(model.architecture.num_hidden_layers):
        x = run_block(model, x, block)
        if block in blocks:
            states.append(x)
    flat = model.normed(x).flatten(0, 1)
    size = head_tokens(model.architecture.vocab_size)
    parts = [
        model.logits(flat[start : start + size]).float().log_softmax(-1).topk(count, -1)
        for start in range(0, flat.shape[0], size)
    ]
    shape = (*inputs.shape, count)
    # Rounded where they are: a GPU would wait for four bytes a number and then for their rounding.
    scores = torch.cat([part.values for part in parts]).reshape(shape).half()
    chosen = torch.cat([part.indices for part in parts]).reshape(shape).int()
    kept = torch.stack(states, 2) if states else x.new_zeros(*inputs.shape, 0, 0)
    bits: NDArray[np.uint16] = kept.bfloat16().view(torch.int16).cpu().numpy().view(np.uint16)
    return scores.cpu().numpy(), chosen.cpu().numpy(), bits
