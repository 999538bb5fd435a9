"""The dense model as the teacher: checked against the file, then run once; what it says is kept on disk.

For each token its largest log-probabilities, the outputs of the matched blocks, and how much the loss depends on each block's
output.
"""

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

from mpo_exporter.calibrate.fisher import Squares, head_gradient
from mpo_exporter.calibrate.spill import claim
from mpo_exporter.heal.ops import WindowOps, autocast, head_tokens, in_cache, run_block
from mpo_exporter.heal.student import size_of_outputs
from mpo_exporter.heal.workers import Progress
from mpo_exporter.source import Source
from mpo_formats import Architecture, CheckpointError
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.text.tokenizer import Tokenizer
from mpo_runtime.weights.protocol import Weights

# Fields in which a file and its teacher may differ: they do not change what token ids mean or how logits are computed.
MAY_DIFFER = ("max_position_embeddings", "bos_token_id", "pad_token_id", "eos_token_ids")


def check_teacher(source: Source, architecture: Architecture, tokenizer: Tokenizer | None) -> None:
    """Refuses a teacher whose architecture or vocabulary differs from the file's.

    Args:
        source: the teacher.
        architecture, tokenizer: of the file; tokenizers are compared if both have one.

    Raises:
        CheckpointError: naming the first field or the first token that differs.
    """
    name, file, teacher = source.folder.name, asdict(architecture), asdict(source.architecture)
    for key, value in file.items():
        if key not in MAY_DIFFER and teacher[key] != value:
            raise CheckpointError(
                f"teacher {name}: {key} is {teacher[key]}, the file has {value}; "
                "give the model that the file was made from"
            )
    theirs = source.tokenizer
    if tokenizer is None or theirs is None:
        return
    for token in range(architecture.vocab_size):
        if tokenizer.id_to_token(token) != theirs.id_to_token(token):
            raise CheckpointError(
                f"teacher {name}: token {token} is {theirs.id_to_token(token)!r}, in the file "
                f"{tokenizer.id_to_token(token)!r}; give the model that the file was made from"
            )


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the teacher says about N windows of S predictions, in memory-mapped files.

    Args:
        scores, chosen: its K largest log-probabilities [N, S, K] for each prediction, and their token ids.
        states: the outputs [N, S, M, E] of M of its blocks, as bf16 bit patterns.
        fisher: F [blocks, E] of every block's output (see `output_fisher`); no rows where it is not needed.
    """

    scores: NDArray[np.float16]
    chosen: NDArray[np.unsignedinteger]
    states: NDArray[np.uint16]
    fisher: Tensor


class TeacherFiles:
    """The files that hold a Lesson.

    Args:
        folder: where they lie.
        key: a digest of everything that the contents depend on except the number of windows; part of the file names.
            Files of more windows also serve a healing of fewer.
        shape: N, S, K.
        of: the teacher's architecture.
        blocks: the blocks whose outputs are kept.
    """

    def __init__(
        self, folder: Path, key: str, shape: tuple[int, int, int], of: Architecture, blocks: list[int]
    ) -> None:
        self.blocks, self.kept = blocks, shape[2]
        self.fisher, self.done = folder / f"teacher-{key}-fisher.npy", folder / f"teacher-{key}-done.npy"
        self.span = shape[1]
        kinds: list[tuple[str, Any, tuple[int, ...]]] = [
            ("scores", np.float16, shape),
            ("tokens", np.uint16 if of.vocab_size <= 1 << 16 else np.uint32, shape),
            ("states", np.uint16, (*shape[:2], len(blocks), of.hidden_size)),
        ]
        self.files = [(folder / f"teacher-{key}-{name}.npy", kind, size) for name, kind, size in kinds if size[2]]

    def complete(self) -> int:
        """How many windows, counted from the first, the files hold; 0 where they are missing or incomplete."""
        if not (self.done.exists() and self.fisher.exists()):
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
        """Runs the teacher on windows [N, W]; returns how many windows the files then hold.

        Files of an earlier run are used again if they hold all N windows; with `enough`, if they hold any.

        Args:
            weighed: the windows on which `output_fisher` is measured; None where it is not needed.
            batch: windows that are run at once.
            enough: asked after each batch whether to stop early.

        Raises:
            OutputError: when the disk has no room for them.
        """
        count, total = self.complete(), len(windows)
        if count >= total or (count and enough):
            return min(count, total)
        self.done.unlink(missing_ok=True)
        files = self._reserved()
        model = decoder_for(teacher.spec.architecture, WindowOps(teacher, device=device))
        fisher = torch.zeros(0, 0) if weighed is None else output_fisher(model, weighed[:, :-1], batch, device)
        np.save(self.fisher, fisher.cpu().numpy())
        for start in range(0, total, batch):
            with autocast(device):
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

    def _reserved(self) -> list[np.memmap[Any, Any]]:
        """The files, newly created, with their disk space reserved."""
        needed = sum(math.prod(shape) * np.dtype(kind).itemsize for _, kind, shape in self.files)
        files = [np.lib.format.open_memmap(path, "w+", kind, shape) for path, kind, shape in self.files]
        for path, _, _ in self.files:
            claim(
                path,
                f"the teacher's outputs take {needed:,} bytes",
                "lower --match-blocks, --top-k or the tokens of the text",
            )
        return files

    def open(self) -> Lesson:
        """Maps the files into memory."""
        mapped = [np.load(path, mmap_mode="r", allow_pickle=False) for path, _, _ in self.files]
        fisher = torch.from_numpy(np.load(self.fisher, allow_pickle=False))
        states = mapped[2] if self.blocks else np.zeros((*mapped[0].shape[:2], 0, 0), np.uint16)
        return Lesson(mapped[0], mapped[1], states, fisher)


def matched_blocks(blocks: int, count: int) -> list[int]:
    """`count` of a model's blocks, evenly spread, the last block among them."""
    count = min(count, blocks)
    return [(place + 1) * blocks // count - 1 for place in range(count)]


@torch.no_grad()
def taught(
    model: Decoder, inputs: NDArray[np.int64], count: int, blocks: list[int]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.uint16]]:
    """What a model over WindowOps says about token ids [B, S].

    Returns:
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
    parts = []
    for start in range(0, flat.shape[0], size):
        logits = model.logits(flat[start : start + size])
        parts += [logits[some].float().log_softmax(-1).topk(count, -1) for some in in_cache(logits)]
    shape = (*inputs.shape, count)
    # Rounded on the device: copying four bytes a number and rounding them on the CPU would keep a GPU waiting.
    scores = torch.cat([part.values for part in parts]).reshape(shape).half()
    chosen = torch.cat([part.indices for part in parts]).reshape(shape).int()
    kept = torch.stack(states, 2) if states else x.new_zeros(*inputs.shape, 0, 0)
    bits: NDArray[np.uint16] = kept.bfloat16().view(torch.int16).cpu().numpy().view(np.uint16)
    return scores.cpu().numpy(), chosen.cpu().numpy(), bits


def output_fisher(model: Decoder, ids: NDArray[np.int64], batch: int, device: str) -> Tensor:
    """F [blocks, E] = E[(r ∂L/∂h)²] at each block's output h, L the loss in nats of labels drawn from the model itself.

    r is the root mean square of h at its token. An error r·e of that output raises the KL from the unchanged model by about
    ½ Σ F e² (Martens 2020, section 9).

    Args:
        model: over WindowOps.
        ids: token ids [N, S].
        batch: windows that are run at once.
    """
    blocks = model.architecture.num_hidden_layers
    generator, squares = torch.Generator().manual_seed(0), Squares()
    for start in range(0, ids.shape[0], batch):
        with torch.no_grad():
            states = [model.embed(torch.from_numpy(ids[start : start + batch]).to(device))]
            for block in range(blocks):
                states.append(run_block(model, states[-1], block))
        size = size_of_outputs(states[-1].float())
        last = states.pop()
        drawn = torch.rand(*last.shape[:-1], 1, generator=generator)
        gradient = head_gradient(model, squares, last, drawn)
        for block in reversed(range(blocks)):
            squares.add(str(block), (size * gradient).square())
            size = size_of_outputs(states[-1].float())
            x = states.pop().requires_grad_()
            (gradient,) = torch.autograd.grad(run_block(model, x, block), x, gradient)
    return torch.stack([squares.sums[str(block)] for block in range(blocks)]).float() / ids.size
