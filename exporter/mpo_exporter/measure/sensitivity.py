"""Sensitivity, measured: what the model loses when one layer alone is compressed.

Every layer is fitted as an export would fit it on the dense upstream, put in the dense model's place, and judged on windows
of the calibration text that nothing is fitted to. The states between the dense model's blocks are kept, so that a layer costs
the blocks after it only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.calibrate.moments import Calibration, Moment
from mpo_exporter.calibrate.upstream import block_cache
from mpo_exporter.calibrate.windows import cut_calibration
from mpo_exporter.fit.layer import Built, build_linear
from mpo_exporter.measure.cache import Kept, Shelf, Tell, untold
from mpo_exporter.measure.layerwise import replaced
from mpo_exporter.progress import Progress, silent
from mpo_formats import LinearSpec
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_formats.codec import to_json
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.cli.inspect import layer_text
from mpo_runtime.layers.linear import Linear
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint

# Changes whenever the same layer would be measured differently.
VERSION = 1
# Windows that layers are judged on; those of the calibration text that it is not fitted to, where there are any.
CHECKED_WINDOWS = 8
# Tokens whose logits are held at a time.
HEAD_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Measured:
    """One layer compressed alone.

    `kl_mean` is KL(dense ‖ compressed) in nats a token and `perplexity_increase` the relative change of perplexity. Of the
    layer's own outputs `output_cosine` is the mean cosine to the dense ones and `norm_drift` the mean change of their norm;
    `activation_drift` is the mean relative distance of the last hidden state, which the head is given. `error` is the
    relative Frobenius error of the matrix.
    """

    layer: str
    terms: str
    kl_mean: float
    perplexity_increase: float
    same_top1: float
    output_cosine: float
    norm_drift: float
    activation_drift: float
    error: float


class Probe(ReferenceOps):
    """The reference ops, that compare the outputs of one layer with those of another in its place."""

    def __init__(self, source: Checkpoint) -> None:
        super().__init__(source)
        self.watched, self.dense = "", self.linears[EMBEDDING]
        self.forget("")

    def forget(self, name: str) -> None:
        """Starts anew with the layer of that name."""
        self.watched = name
        self.dense = self.linears[name or EMBEDDING]
        self.cosine, self.drift, self.tokens = 0.0, 0.0, 0

    def see(self, ours: Tensor, theirs: Tensor) -> None:
        """Adds outputs [..., O] of the layer that is looked at."""
        norms, dense = ours.norm(dim=-1), theirs.norm(dim=-1).clamp(min=1e-20)
        cosine = (ours * theirs).sum(-1) / (norms.clamp(min=1e-20) * dense)
        self.cosine += float(cosine.sum())
        self.drift += float((norms / dense - 1).sum())
        self.tokens += norms.numel()

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """Σ_t term_t(x) + bias, compared where it is that layer."""
        y = super().linear(layer, x)
        if layer.spec.name == self.watched:
            self.see(y, self.dense.apply(x))
        return y

    def embed(self, table: Linear, ids: Tensor, multiplier: float) -> Tensor:
        """The looked up rows, compared where it is that table."""
        y = super().embed(table, ids, multiplier)
        if table.spec.name == self.watched:
            self.see(y, super().embed(self.dense, ids, multiplier))
        return y

    def logits(self, head: Linear, x: Tensor, scaling: float) -> Tensor:
        """The logits, compared where the head is not the embedding."""
        y = super().logits(head, x, scaling)
        if head.spec.name == self.watched == HEAD:
            self.see(y, super().logits(self.dense, x, scaling))
        return y


class Judge:
    """The dense model on some windows [N, W], with its states between blocks, and how a changed layer alters what it says."""

    @torch.no_grad()
    def __init__(self, source: Checkpoint, windows: NDArray[np.int64]) -> None:
        self.ops = Probe(source)
        self.model = decoder_for(source.architecture, self.ops)
        self.windows = windows
        self.ids = self.ops.ids(windows.tolist())
        self.states = [self.model.embed(self.ids)]
        for block in range(source.architecture.num_hidden_layers):
            self.states.append(self.block(self.states[-1], block))
        self.last = self.model.normed(self.states[-1])
        self.nats = self.losses(self.last)

    def block(self, x: Tensor, block: int) -> Tensor:
        """One block on all windows [N, W, E]."""
        y: Tensor = self.model.block(x, block_cache(self.model.architecture, x.shape[0], x.shape[1], x.device), block)
        return y

    def losses(self, hidden: Tensor) -> float:
        """Nats a token of the windows themselves, given the last hidden state [N, W, E]."""
        total, flat = 0.0, self.ids[:, 1:].reshape(-1)
        states = hidden[:, :-1].reshape(flat.numel(), -1)
        for start in range(0, flat.numel(), HEAD_TOKENS):
            scores = self.model.logits(states[start : start + HEAD_TOKENS]).log_softmax(-1)
            total -= float(scores.gather(-1, flat[start : start + HEAD_TOKENS, None]).sum())
        return total / flat.numel()

    @torch.no_grad()
    def measure(self, linear: LinearSpec, built: Built, dense: NDArray[np.float64]) -> Measured:
        """The dense model with that one layer replaced."""
        name = linear.name
        self.ops.forget(name)
        first = first_block(name, self.model.architecture.num_hidden_layers)
        original = self.ops.linears[HEAD if HEAD in self.ops.linears else EMBEDDING]
        with replaced(self.ops, name, built.matrix):
            x = self.model.embed(self.ids) if name == EMBEDDING else self.states[first]
            for block in range(first, self.model.architecture.num_hidden_layers):
                x = self.block(x, block)
            hidden = self.model.normed(x)
            nats = self.losses(hidden)
            divergence, same = self.divergence(hidden, original)
        drift = ((hidden - self.last).norm(dim=-1) / self.last.norm(dim=-1).clamp(min=1e-20)).mean()
        error = float(np.linalg.norm(dense - built.matrix)) / max(float(np.linalg.norm(dense)), 1e-300)
        count = max(self.ops.tokens, 1)
        return Measured(
            name,
            layer_text(linear),
            divergence,
            math.exp(nats - self.nats) - 1,
            same,
            self.ops.cosine / count,
            self.ops.drift / count,
            float(drift),
            error,
        )

    def divergence(self, hidden: Tensor, head: Linear) -> tuple[float, float]:
        """KL(dense ‖ changed) in nats a token and the share of equal top tokens; `head` is the dense model's."""
        total, same, scaling = 0.0, 0, self.model.architecture.logits_scaling
        ours, theirs = (x.reshape(-1, x.shape[-1]) for x in (hidden, self.last))
        for start in range(0, len(ours), HEAD_TOKENS):
            part = slice(start, start + HEAD_TOKENS)
            q = self.model.logits(ours[part]).log_softmax(-1)
            p = (head.apply(theirs[part]) / scaling).log_softmax(-1)
            total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
        return total / len(ours), same / len(ours)


def first_block(name: str, blocks: int) -> int:
    """The first block whose output a layer changes: its own, all of them for the embedding, none for the head."""
    return blocks if name == HEAD else 0 if name == EMBEDDING else int(name.split(".")[2])


def check_windows(text: TokenText, walk: Calibration, count: int = CHECKED_WINDOWS) -> NDArray[np.int64]:
    """Windows [N, W] of a calibration text that nothing is fitted to; of a text that was used up, some that were."""
    whole = cut_calibration(text, walk.architecture, count=text.ids.size)
    used = {window.tobytes() for window in walk.windows}
    unused = [window for window in whole if window.tobytes() not in used] or list(whole)
    picks = np.linspace(0, len(unused) - 1, min(count, len(unused))).round().astype(np.int64)
    return np.stack([unused[pick] for pick in picks])


def sensitivity_shelf(source: Checkpoint, text: TokenText, walk: Calibration, windows: NDArray[np.int64]) -> Shelf:
    """Where measured layers are kept: one file for a model and a text, whatever the layers were compressed to."""
    key = {
        "version": VERSION,
        "architecture": hashlib.sha256(to_json(source.architecture).encode()).hexdigest(),
        "fitted to": hashlib.sha256(walk.windows.tobytes()).hexdigest(),
        "measured on": hashlib.sha256(windows.tobytes()).hexdigest(),
    }
    return Shelf("sensitivity", source.folder.resolve().name, (source.sha256(), text.sha256), key)


def measured_alone(
    source: Checkpoint,
    text: TokenText,
    walk: Calibration,
    layers: Sequence[LinearSpec],
    *,
    progress: Progress = silent,
    tell: Tell = untold,
) -> list[Measured]:
    """Compresses one layer after the other, alone, and compares the model's output with the dense model's.

    What was measured before is read from the cache; what is new is kept there as soon as it is measured.

    Args:
        layers: what each is to be stored as; several of one layer may be given.

    Raises:
        ConfigError: naming the layer that cannot be fitted.
    """
    windows = check_windows(text, walk)
    shelf = sensitivity_shelf(source, text, walk, windows)
    kept = shelf.read(tell)
    rows: dict[str, dict[str, Any]] = {} if kept is None else kept.content
    keys = {layer_key(linear): linear for linear in layers}
    missing = {key: linear for key, linear in keys.items() if key not in rows}
    if len(missing) < len(keys):
        tell(f"sensitivity: {len(keys) - len(missing)} of {len(keys)} measured before, read from {shelf.path.name}")
    if missing:
        judge, done = Judge(source, windows), 0
        for names, moment in with_lookups(walk):
            found = [(key, linear) for key, linear in missing.items() if linear.name in names]
            for key, linear in found:
                weight = f"{linear.name}.0.weight"
                raw, kind = source.array(weight), source.dtype(weight)
                dense = build_linear(source.spec.linear(linear.name), raw, kind).matrix
                rows[key] = asdict(judge.measure(linear, build_linear(linear, raw, kind, moment), dense))
                done += 1
                progress("measuring layers", done, len(missing))
            if found:
                shelf.write(Kept(rows), tell)
    return [Measured(**rows[key]) for key in keys]


def with_lookups(walk: Calibration) -> Iterator[tuple[tuple[str, ...], Moment | None]]:
    """The groups of layers with their moments, and an embedding that is only looked up without one."""
    if not walk.architecture.tie_word_embeddings:
        yield (EMBEDDING,), None
    yield from walk.dense()


def layer_key(linear: LinearSpec) -> str:
    """A layer and its terms as a key."""
    return f"{linear.name} {to_json([asdict(term) for term in linear.terms])}"
