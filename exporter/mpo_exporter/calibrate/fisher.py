"""The diagonal of the true Fisher information at the output of every linear layer: how much an error there raises the loss.

With labels drawn from the model itself, an error Δy_o at a layer's outputs raises the loss of a token by about
½ Σ_o F_o Δy_o², F_o = E[(∂L/∂y_o)²] (Martens 2020, section 9; docs/method.md), so a compressed matrix with the rows ŵ_o costs
½ Σ_o F_o (w − ŵ)_o C (w − ŵ)_oᵀ. Gradients are those of the summed loss of a window: the contribution of other tokens'
labels to the gradient at one token has mean zero, given the text before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.calibrate.lanes import in_lanes, lane_count
from mpo_exporter.calibrate.moments import BETWEEN, Moment, moment_of
from mpo_exporter.calibrate.precision import fast_products
from mpo_exporter.calibrate.seen import Seen
from mpo_exporter.calibrate.store import Memory, PartMissing, Store
from mpo_exporter.calibrate.sums import Sums, joined
from mpo_exporter.calibrate.upstream import Record, RecordingOps, batches, block_linears
from mpo_formats import ConfigError
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_runtime.layers.linear import Linear
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.weights.protocol import Weights

# Called with the number of batches done and their total.
Progress = Callable[[int, int], None]
Vector = NDArray[np.float64]
# The key of the Fisher information [E] at the rows that are looked up in the embedding.
LOOKUP = "lookup"
# Tokens whose logits are in memory at once.
HEAD_TOKENS = 512
# The name in a store of the gradient by the state before a block, and the number of that block.
GRADIENT = "survey-gradient"
# The names of the state that the pass forward has reached, and of the head's input.
FRONT = "survey-front"
HEAD_INPUT = "survey-head"


class OutputOps(RecordingOps):
    """The reference ops that also keep the outputs of the layers, for which gradients are computed; each thread has its own."""

    @property
    def outputs(self) -> dict[str, Tensor]:
        """The outputs of this thread's run by the layers' names."""
        found: dict[str, Tensor] = self.run_of.__dict__.setdefault("outputs", {})
        return found

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """Σ_t term_t(x) + bias; the result is kept."""
        y = super().linear(layer, x)
        if y.requires_grad:
            self.outputs[layer.spec.name] = y
        return y


class Squares:
    """Running sums of squared gradients by layer name, in double precision."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, squares: Tensor) -> None:
        """Adds squares [..., O] to the sum of that name, over all axes but the last."""
        self._add(name, squares.reshape(-1, squares.shape[-1]).sum(0, dtype=torch.float64))

    def take(self, other: Squares) -> None:
        """Adds other sums."""
        for name, total in other.sums.items():
            self._add(name, total)

    def _add(self, name: str, total: Tensor) -> None:
        self.sums[name] = self.sums[name] + total if name in self.sums else total


@dataclass(frozen=True, slots=True)
class Inputs:
    """Layers with one input on the dense model: their names, the input's moment, and F [O] of each one's output by name."""

    names: tuple[str, ...]
    moment: Moment
    fisher: dict[str, Vector]


class Backwards:
    """One pass forward and one pass backward over a text, block by block: the moments and the Fisher information of a model.

    Forward, the states between the blocks are kept in a store. Backward, each block is run again on its state: what its
    layers take gives the moments, and the gradients of their outputs give F. In memory are one block's float32 matrices, one
    state of all windows, the sums of one block's moments, and the logits of 512 tokens.

    Args:
        windows: token ids [N, W].
        seed: for drawing the labels.
        picks: the windows that gradients and the moments inside the blocks are taken on; None for all. 32 windows of 256
            tokens are enough for these. The moment of the head's input, which a table is rounded with, is taken on all.
        batch: windows that are run at once, by all lanes together.
        store: keeps the states, W · E · 4 bytes for each block and picked window and for each window once, and how far the
            pass has come: another pass with the same store goes on there. None keeps them in memory.
        moments: whether moments are summed; without them only F is computed.
        device: that the model is run on.
        seen: is given what the pass forward sees, as far as it has room.
        progress: is given the blocks done, of twice as many as there are.
    """

    def __init__(
        self,
        source: Weights,
        windows: NDArray[np.int64],
        seed: int = 0,
        *,
        seen: Seen | None = None,
        picks: NDArray[np.int64] | None = None,
        batch: int = 8,
        store: Store | None = None,
        moments: bool = True,
        device: str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        self.ops = OutputOps(source, device)
        self.model = decoder_for(source.spec.architecture, self.ops)
        self.windows, self.seed, self.moments, self.seen = windows, seed, moments, seen
        self.blocks = source.spec.architecture.num_hidden_layers
        self.store: Store = Memory() if store is None else store
        self.progress = progress or (lambda done, total: None)
        self.picks = np.arange(len(windows)) if picks is None else picks
        self.batch = batch
        self.tokens = len(self.picks) * windows.shape[1]

    def _batches(self, count: int) -> list[slice]:
        return batches(count, self.batch, str(self.ops.device))

    def inputs(self) -> Iterator[list[Inputs]]:
        """Yields the layers by their inputs, those of a block together: the head's first, then the last block's, and so on.

        The head comes under the embedding's name where the two are tied. The last one has no moment of its own: it is named
        `LOOKUP`, with F [E] at the rows that are looked up in the embedding.

        Raises:
            ConfigError: when a block's output or the logits are not finite.
        """
        self.forward()
        yield [self._head()]
        for block in reversed(range(self.blocks)):
            yield from self._block(block)
        gradient = self._gradient(0)
        squares = np.square(gradient * self.model.architecture.embedding_multiplier, dtype=np.float64)
        fisher = squares.reshape(-1, squares.shape[-1]).sum(0) / self.tokens
        yield [Inputs((LOOKUP,), Moment(np.zeros((0, 0))), {LOOKUP: fisher})]
        for name in ("survey-state-0", FRONT, GRADIENT, HEAD_INPUT):
            self.store.forget(name)

    @torch.no_grad()
    def forward(self) -> None:
        """Runs the model and keeps the states between its blocks; does nothing where that was done."""
        if self.store.read(GRADIENT) is not None:
            return
        kept = self.store.read(FRONT)
        first = 0 if kept is None else int(kept["block"][0]) + 1
        x, written = None if kept is None else kept["x"], time.monotonic()
        for block in range(first, self.blocks + 1):
            x = self._forward(block - 1, x)
            if not np.isfinite(x).all():
                raise ConfigError(
                    f"model.layers.{block - 1}: its output is not finite on the calibration text; check the source model"
                )
            self.store.write(f"survey-state-{block}", {"x": x[self.picks]})
            if block == self.blocks or time.monotonic() - written > BETWEEN:
                self.store.write(FRONT, {"block": np.array([block]), "x": x})
                written = time.monotonic()
            self.progress(block, 2 * self.blocks)

    def _forward(self, block: int, x: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """The state behind a block from the one before it; the embedded tokens where there is none."""
        architecture = self.model.architecture
        layers = block_linears(architecture, block) if x is not None else []
        seen = self.seen.open(block, architecture, *self.windows.shape) if x is not None and self.seen else None

        def run(lane: int, rows: slice) -> NDArray[np.float32]:
            if x is None:
                y: Tensor = self.model.embed(self.ops.ids(self.windows[rows].tolist()))
            else:
                before = self._tensor(x[rows])
                self.ops.record = record = None if seen is None else Record(stream=before)
                y = self._run(before, block)
                self.ops.record = None
                if seen is not None and record is not None:
                    seen.keep(rows, record.inputs, y)
            found: NDArray[np.float32] = y.cpu().numpy()
            return found

        with self.ops.holding(layers), fast_products():
            return np.concatenate(in_lanes(run, self._batches(len(self.windows)), self.ops.device))

    def _tensor(self, array: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(array).to(self.ops.device)

    def _run(self, x: Tensor, block: int) -> Tensor:
        y: Tensor = self.model.block(x, self.ops.block_cache(self.model.architecture, *x.shape[:2]), block)
        return y

    def _state(self, name: str) -> NDArray[np.float32]:
        """A state that was kept."""
        found = self.store.read(name)
        if found is None:
            raise PartMissing(f"calibration: {name} is missing; start again")
        return found["x"]

    def _gradient(self, block: int) -> NDArray[np.float32]:
        """The gradient of the loss by the state before a block."""
        found = self.store.read(GRADIENT)
        if found is None or int(found["block"][0]) != block:
            raise PartMissing(f"calibration: the gradient before block {block} is missing; start again")
        return found["x"]

    def _head(self) -> Inputs:
        """The head's input, which is kept, as is the gradient before the head."""
        kept = self.store.read(HEAD_INPUT)
        if kept is not None and self.store.read(GRADIENT) is not None:
            return Inputs(
                self._head_names(),
                Moment(kept["second"], None, self.windows.size, device=str(self.ops.device)),
                {self._head_names()[0]: kept["fisher"]},
            )
        count = lane_count(self.ops.device)
        squares, sums = [Squares() for _ in range(count)], [Sums() for _ in range(count)]
        (name,) = self._head_names()
        state, front = self._state(f"survey-state-{self.blocks}"), self._state(FRONT)
        chances = drawn_chances(self.seed, *state.shape[:2])

        @torch.no_grad()
        def measure(lane: int, rows: slice) -> None:
            sums[lane].add(self.model.normed(self._tensor(front[rows])))

        def back(lane: int, rows: slice) -> NDArray[np.float32]:
            gradient = head_gradient(self.model, squares[lane], self._tensor(state[rows]), chances[rows])
            found: NDArray[np.float32] = gradient.cpu().numpy()
            return found

        with fast_products(), self.ops.holding([name]):
            if self.moments:
                in_lanes(measure, self._batches(len(front)), self.ops.device)
            parts = in_lanes(back, self._batches(len(state)), self.ops.device)
        found = self._inputs((name,), joined(sums), total_of(squares))
        self.store.write(HEAD_INPUT, {"second": found.moment.second, "fisher": found.fisher[name]})
        self.store.write(GRADIENT, {"block": np.array([self.blocks]), "x": np.concatenate(parts)})
        return found

    def _head_names(self) -> tuple[str]:
        return (EMBEDDING if self.model.architecture.tie_word_embeddings else HEAD,)

    def _block(self, block: int) -> Iterator[list[Inputs]]:
        """The inputs of a block's layers; then the gradient before the block is kept in the place of the one after it."""
        kept = self.store.read(GRADIENT)
        if kept is not None and int(kept["block"][0]) <= block:
            return  # a run before this one came further
        count = lane_count(self.ops.device)
        lanes = [(Squares(), dict[tuple[str, ...], Sums]()) for _ in range(count)]
        state, after = self._state(f"survey-state-{block}"), self._gradient(block + 1)
        before = np.empty_like(state)

        def back(lane: int, rows: slice) -> None:
            squares, sums = lanes[lane]
            self.ops.record = Record() if self.moments else None
            x = self._tensor(state[rows]).requires_grad_()
            y = self._run(x, block)
            recorded, self.ops.record = self.ops.record, None
            gradient, *inner = torch.autograd.grad(y, [x, *self.ops.outputs.values()], self._tensor(after[rows]))
            before[rows] = gradient.cpu().numpy()
            for name, part in zip(self.ops.outputs, inner, strict=True):
                squares.add(name, part.square())
            self.ops.outputs.clear()
            for given in recorded.inputs if recorded else ():
                sums.setdefault(tuple(given.names), Sums()).add(given.x)

        with self.ops.holding(block_linears(self.model.architecture, block)), fast_products():
            in_lanes(back, self._batches(len(state)), self.ops.device)
        squares = total_of([one for one, _ in lanes])
        sums = {names: joined([each[names] for _, each in lanes if names in each]) for names in lanes[0][1]}
        if self.moments:
            yield [self._inputs(names, sums.pop(names), squares) for names in list(sums)]
        else:
            yield [self._inputs(tuple(squares.sums), None, squares)]
        self.store.write(GRADIENT, {"block": np.array([block]), "x": before})
        self.store.forget(f"survey-state-{block + 1}")
        self.progress(2 * self.blocks - block, 2 * self.blocks)

    def _inputs(self, names: tuple[str, ...], sums: Sums | None, squares: Squares) -> Inputs:
        device = str(self.ops.device)
        moment = moment_of(names, sums, None, device=device) if sums and self.moments else Moment(np.zeros((0, 0)))
        return Inputs(names, moment, {name: (squares.sums[name] / self.tokens).cpu().numpy() for name in names})


def output_fisher(
    source: Weights,
    windows: NDArray[np.int64],
    seed: int = 0,
    *,
    batch: int = 8,
    progress: Progress | None = None,
) -> dict[str, Vector]:
    """F_o = E[(∂L/∂y_o)²] at the output of every layer, L the loss in nats of labels that are drawn from the model itself.

    At the head, where y are the logits before scaling, the expectation over labels is exact: p_o (1 − p_o). One more entry,
    `LOOKUP`, is the Fisher information [E] at the looked up rows of the embedding.

    Args:
        windows, seed, batch, progress: as `Backwards` takes them.

    Returns:
        F [O] by the layer's name; the head's under the embedding's name where the two are tied.

    Raises:
        ConfigError: when a block's output or the logits are not finite.
    """
    walk = Backwards(source, windows, seed, batch=batch, moments=False, progress=progress)
    found = {name: values for block in walk.inputs() for one in block for name, values in one.fisher.items()}
    order = [linear.name for linear in source.spec.linears] + [LOOKUP]
    return {name: found[name] for name in order if name in found}


def total_of(lanes: Sequence[Squares]) -> Squares:
    """The sums of all lanes, in the first one of them."""
    first, *others = lanes
    for other in others:
        first.take(other)
    return first


def drawn_chances(seed: int, windows: int, tokens: int) -> Tensor:
    """Random numbers [windows, tokens, 1] from 0 to 1, by which labels are drawn; the same on every device."""
    return torch.rand(windows, tokens, 1, generator=torch.Generator().manual_seed(seed))


def head_gradient(model: Decoder, squares: Squares, x: Tensor, drawn: Tensor) -> Tensor:
    """The gradient [B, W, E] at the last residual stream x, for the summed loss of labels drawn from the model itself.

    Args:
        squares: the head's own Fisher information is added to it.
        drawn: a random number for every token [B, W, 1] that says which label it gets (`drawn_chances`).
    """
    name = EMBEDDING if model.architecture.tie_word_embeddings else HEAD
    flat, drawn = x.reshape(-1, x.shape[-1]), drawn.reshape(-1, 1).to(x.device)
    gradients: list[Tensor] = []
    for start in range(0, flat.shape[0], HEAD_TOKENS):
        part = flat[start : start + HEAD_TOKENS].requires_grad_()
        scores = model.logits(model.normed(part)).log_softmax(-1)
        chances = scores.detach().exp()
        if not torch.isfinite(chances).all():
            raise ConfigError("the logits are not finite on the calibration text; check the source model")
        # Inverse transform sampling: torch.multinomial would draw a random number for every token of the vocabulary.
        places = torch.searchsorted(chances.cumsum(-1), drawn[start : start + HEAD_TOKENS])
        labels = places.clamp_(max=chances.shape[-1] - 1)
        # The expectation over the drawn label: E[(p_o − [o = label])²] = p_o (1 − p_o).
        squares.add(name, chances * (1 - chances) / model.architecture.logits_scaling**2)
        gradients += torch.autograd.grad(-scores.gather(-1, labels).sum(), [part])
    return torch.cat(gradients).reshape(x.shape)
