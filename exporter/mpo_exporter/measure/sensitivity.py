"""Sensitivity, measured: what the model loses when one layer alone is compressed.

Each layer is fitted as an export would fit it on the dense upstream, put in the dense model's place, and measured on windows
of text that nothing is fitted to. The states between the dense model's blocks are kept, so that measuring a layer runs only
the blocks after it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.calibrate.moments import Calibration, Moment, dense_matrix
from mpo_exporter.calibrate.windows import WINDOW, cut_calibration
from mpo_exporter.fit.layer import build_linear
from mpo_exporter.measure.cache import Cached, CacheFile
from mpo_exporter.progress import Log, Progress, no_log, silent
from mpo_formats import Architecture, ConfigError, LinearSpec
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_formats.codec import to_json
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.cli.inspect import layer_text
from mpo_runtime.layers.linear import Linear
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.protocol import DenseWeights, Weights

Matrix = NDArray[np.float64]
Windows = NDArray[np.int64]
# How layers are judged: by their expected loss, or each compressed alone and measured.
LEVELS = ("fast", "full")
# To be raised whenever the same layer would be measured differently.
VERSION = 1
# Windows that layers are measured on.
CHECKED_WINDOWS = 8
# Tokens whose logits are in memory at a time.
HEAD_TOKENS = 512


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """What the model loses when one layer alone is compressed.

    Args:
        terms: what the layer was stored as, in words.
        kl_mean: KL(dense ‖ compressed) in nats per token.
        perplexity_increase: the relative change of the perplexity.
        output_cosine, norm_drift: of the layer's outputs, the mean cosine to the dense ones and the mean relative change of
            their norm.
        activation_drift: the mean relative distance of the last hidden state, the head's input.
        error: the relative Frobenius error of the matrix.
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


class ComparingOps(ReferenceOps):
    """The reference ops, which also compare the outputs of one layer with those of the dense layer that it replaces."""

    def __init__(self, source: Weights) -> None:
        super().__init__(source)
        self.watch(EMBEDDING)

    def watch(self, name: str) -> None:
        """Starts comparing the layer of that name, which is still the dense one."""
        self.watched = name
        self.dense: Any = self.weights(name)
        self.cosine, self.drift, self.tokens = 0.0, 0.0, 0

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Adds outputs [..., O] of the watched layer and of the dense one."""
        norms, dense = ours.norm(dim=-1), theirs.norm(dim=-1).clamp(min=1e-20)
        cosine = (ours * theirs).sum(-1) / (norms.clamp(min=1e-20) * dense)
        self.cosine += float(cosine.sum())
        self.drift += float((norms / dense - 1).sum())
        self.tokens += norms.numel()

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """Σ_t term_t(x) + bias, compared if it is the watched layer."""
        y = super().linear(layer, x)
        if layer.spec.name == self.watched:
            self.add(y, self.dense.apply(x))
        return y

    def embed(self, table: Linear, ids: Tensor, multiplier: float) -> Tensor:
        """The looked-up rows, compared if the table is the watched layer."""
        y = super().embed(table, ids, multiplier)
        if table.spec.name == self.watched:
            self.add(y, super().embed(self.dense, ids, multiplier))
        return y

    def logits(self, head: Linear, x: Tensor, scaling: float) -> Tensor:
        """The logits, compared if a head of its own is the watched layer."""
        y = super().logits(head, x, scaling)
        if head.spec.name == self.watched == HEAD:
            self.add(y, super().logits(self.dense, x, scaling))
        return y


class Judge:
    """Runs the dense model on windows [N, W] once, and measures how replacing one layer changes its output.

    Memory: the states [N, W, E] between all blocks, and the matrices of the dense model.
    """

    @torch.no_grad()
    def __init__(self, source: Weights, windows: Windows) -> None:
        self.ops = ComparingOps(source)
        self.model = decoder_for(source.spec.architecture, self.ops)
        self.ids = self.ops.ids(windows.tolist())
        self.states = [self.model.embed(self.ids)]
        for block in range(self.model.architecture.num_hidden_layers):
            self.states.append(self.block(self.states[-1], block))
        self.last = self.model.normed(self.states[-1])
        self.nats = self.losses(self.last)

    def block(self, x: Tensor, block: int) -> Tensor:
        """One block on all windows [N, W, E]."""
        y: Tensor = self.model.block(x, self.ops.block_cache(self.model.architecture, *x.shape[:2]), block)
        return y

    def losses(self, hidden: Tensor) -> float:
        """Nats per token of the windows themselves, given the last hidden state [N, W, E]."""
        total, flat = 0.0, self.ids[:, 1:].reshape(-1)
        states = hidden[:, :-1].reshape(flat.numel(), -1)
        for start in range(0, flat.numel(), HEAD_TOKENS):
            scores = self.model.logits(states[start : start + HEAD_TOKENS]).log_softmax(-1)
            total -= float(scores.gather(-1, flat[start : start + HEAD_TOKENS, None]).sum())
        return total / flat.numel()

    @torch.no_grad()
    def measure(self, linear: LinearSpec, compressed: Matrix, dense: Matrix) -> LayerSensitivity:
        """Measures the model with one layer's dense matrix [O, I] replaced by the compressed one."""
        name, blocks = linear.name, self.model.architecture.num_hidden_layers
        self.ops.watch(name)
        first = first_block(name, blocks)
        head: Any = self.ops.weights(EMBEDDING if self.model.architecture.tie_word_embeddings else HEAD)
        with self.ops.replaced(name, torch.from_numpy(compressed.astype(np.float32))):
            x = self.model.embed(self.ids) if name == EMBEDDING else self.states[first]
            for block in range(first, blocks):
                x = self.block(x, block)
            hidden = self.model.normed(x)
            nats = self.losses(hidden)
            divergence, same = self.divergence(hidden, head)
        drift = ((hidden - self.last).norm(dim=-1) / self.last.norm(dim=-1).clamp(min=1e-20)).mean()
        count = max(self.ops.tokens, 1)
        return LayerSensitivity(
            layer=name,
            terms=layer_text(linear),
            kl_mean=divergence,
            perplexity_increase=math.exp(nats - self.nats) - 1,
            same_top1=same,
            output_cosine=self.ops.cosine / count,
            norm_drift=self.ops.drift / count,
            activation_drift=float(drift),
            error=float(np.linalg.norm(dense - compressed)) / max(float(np.linalg.norm(dense)), 1e-300),
        )

    def divergence(self, hidden: Tensor, head: Linear) -> tuple[float, float]:
        """KL(dense ‖ changed) in nats per token and the share of equal top tokens.

        Args:
            hidden: the changed model's last hidden state [N, W, E].
            head: the dense model's head.
        """
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
    """The first block whose output a layer changes: the first for the embedding, `blocks` for the head."""
    return blocks if name == HEAD else 0 if name == EMBEDDING else int(name.split(".")[2])


def compressed_alone(
    source: Weights, windows: Windows, layers: Sequence[LinearSpec], walk: Calibration | None = None
) -> Iterator[tuple[LinearSpec, LayerSensitivity]]:
    """Compresses one layer after the other, alone, and compares the model's output with the dense model's.

    Args:
        windows: token ids [N, W] to measure on.
        layers: the terms to compress each layer to; a layer may be given several times.
        walk: the calibration text that layers are fitted to; None fits them to the weights alone.

    Yields:
        The layers as they are measured: those with one input together, where there is a walk; else in the order given.

    Raises:
        ConfigError: naming the layer that cannot be fitted.
    """
    if not layers:
        return
    judge = Judge(source, windows)
    for names, moment in inputs(source.spec.architecture, layers, walk):
        for linear in layers:
            if linear.name in names:
                weight = f"{linear.name}.0.weight"
                alone = replace(linear, transform=None)  # stored transforms belong to the file of a plan
                built = build_linear(alone, source.array(weight), source.dtype(weight), moment)
                yield linear, judge.measure(linear, built.matrix, dense_matrix(source, linear.name))


def inputs(
    architecture: Architecture, layers: Sequence[LinearSpec], walk: Calibration | None
) -> Iterator[tuple[tuple[str, ...], Moment | None]]:
    """The names of layers with one input and its moment, None if it is not measured; an untied embedding has none."""
    if walk is None:
        yield from (((name,), None) for name in dict.fromkeys(linear.name for linear in layers))
        return
    if not architecture.tie_word_embeddings:
        yield (EMBEDDING,), None
    yield from walk.dense()


def check_windows(text: TokenText, walk: Calibration, count: int = CHECKED_WINDOWS) -> Windows:
    """Windows [N, W] of a calibration text that the walk does not use; if it uses all, some of those."""
    whole = cut_calibration(text, walk.architecture, count=text.ids.size)
    used = {window.tobytes() for window in walk.windows}
    unused = [window for window in whole if window.tobytes() not in used] or list(whole)
    picks = np.linspace(0, len(unused) - 1, min(count, len(unused))).round().astype(np.int64)
    return np.stack([unused[pick] for pick in picks])


def even_windows(text: TokenText, architecture: Architecture) -> Windows:
    """A whole text as windows [N, W] of equal length, at most 256 tokens; less than one token per window is left out.

    Raises:
        ConfigError: for a text of fewer than two tokens, or an id outside the vocabulary.
    """
    if text.ids.size < 2:
        raise ConfigError(f"{text.name}: too short, expected at least 2 tokens")
    lead = architecture.bos_token_id is not None
    longest = min(WINDOW, architecture.max_position_embeddings) - lead
    count = -(-text.ids.size // longest)
    return cut_calibration(text, architecture, window=text.ids.size // count + lead, count=count)


def sensitivity_file(source: DenseWeights, text: TokenText, walk: Calibration, windows: Windows) -> CacheFile:
    """The cache file of measured layers: one for a model and a text, whatever the layers were compressed to."""
    key = {
        "version": VERSION,
        "architecture": hashlib.sha256(to_json(source.architecture).encode()).hexdigest(),
        "fitted to": hashlib.sha256(walk.windows.tobytes()).hexdigest(),
        "measured on": hashlib.sha256(windows.tobytes()).hexdigest(),
    }
    return CacheFile("sensitivity", source.folder.resolve().name, (source.sha256(), text.sha256), key)


def cached_sensitivities(
    source: DenseWeights,
    text: TokenText,
    walk: Calibration,
    layers: Sequence[LinearSpec],
    *,
    progress: Progress = silent,
    log: Log = no_log,
) -> list[LayerSensitivity]:
    """As `compressed_alone`, on windows of the calibration text that nothing is fitted to, in the order of `layers`.

    Layers that were measured before are read from the cache; new ones are cached as soon as they are measured.
    """
    windows = check_windows(text, walk)
    file = sensitivity_file(source, text, walk, windows)
    cached = file.read(log)
    rows: dict[str, dict[str, Any]] = {} if cached is None else cached.content
    keys = {layer_key(linear): linear for linear in layers}
    missing = [linear for key, linear in keys.items() if key not in rows]
    if len(missing) < len(keys):
        log(f"sensitivity: {len(keys) - len(missing)} of {len(keys)} measured before, read from {file.path.name}")
    for done, (linear, found) in enumerate(compressed_alone(source, windows, missing, walk), 1):
        rows[layer_key(linear)] = asdict(found)
        file.write(Cached(rows), log)
        progress("measuring layers", done, len(missing))
    return [LayerSensitivity(**rows[key]) for key in keys]


def layer_key(linear: LinearSpec) -> str:
    """A layer and its terms as a key."""
    return f"{linear.name} {to_json([asdict(term) for term in linear.terms])}"
