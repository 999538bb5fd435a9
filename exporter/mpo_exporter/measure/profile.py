"""The profile of a model: what compressing each layer alone costs, by layer, by block and by type of matrix."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from mpo_exporter.calibrate.moments import Calibration
from mpo_exporter.fit.shapes import balanced_shape
from mpo_exporter.measure.sensitivity import LayerSensitivity, cached_sensitivities
from mpo_exporter.measure.survey import cached_survey
from mpo_exporter.progress import Log, Progress, no_log, silent
from mpo_exporter.terms import integers, operator
from mpo_formats import LinearSpec
from mpo_formats.architecture import ATTENTION, EMBEDDING, HEAD, MLP
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.protocol import DenseWeights

# Types in the order of the file; the tables have no block.
TYPES = (*ATTENTION, *MLP)
# The group size of the integers that layers are judged with.
GROUP = 64
# A rank correlation over blocks of at least this size is called a trend.
TREND = 0.5
# A layer that loses this many times more per weight than the median layer is better left alone.
PRECIOUS = 5.0


@dataclass(frozen=True, slots=True)
class Judged:
    """One layer: its number of weights, and its loss in nats per token when stored as integers and as cores alone.

    Args:
        cores: None for the embedding and the head, which never become cores.
        measured: the measurements with integers and with cores, where the losses were measured.
    """

    layer: str
    weights: int
    integers: float
    cores: float | None
    measured: tuple[LayerSensitivity, ...] = ()

    @property
    def block(self) -> int | None:
        """The number of its block, None for the embedding and the head."""
        return None if self.layer in (EMBEDDING, HEAD) else int(self.layer.split(".")[2])

    @property
    def kind(self) -> str:
        """Its type, such as `mlp.up_proj`."""
        return self.layer.split(".", 3)[3] if self.block is not None else self.layer

    def loss_per_million(self, part: str) -> float:
        """Nats per token and million weights; NaN where there is no value."""
        value = getattr(self, part)
        return 1e6 * value / self.weights if value is not None else float("nan")


@dataclass(frozen=True, slots=True)
class Group:
    """A group of layers: their number, weights, summed loss, and loss per million weights."""

    name: str
    layers: int
    weights: int
    integers: float
    cores: float | None
    integers_each: float
    cores_each: float | None


@dataclass(frozen=True, slots=True)
class Profile:
    """A model's profile.

    Args:
        level: `fast` (expected losses) or `full` (measured ones).
        integers, cores: the two compressions in words, such as `2 bits` and `χ = 32`.
    """

    model: str
    level: str
    integers: str
    cores: str
    layers: tuple[Judged, ...]

    def by_block(self) -> list[Group]:
        """Blocks from first to last."""
        return self.grouped(lambda one: None if one.block is None else f"block {one.block}")

    def by_type(self) -> list[Group]:
        """Types of matrices in the order of the file, embedding and head included."""
        return self.grouped(lambda one: one.kind)

    def grouped(self, key: Callable[[Judged], str | None]) -> list[Group]:
        """Layers grouped by a key, in the order in which keys appear; layers whose key is None are left out."""
        rows: dict[str, list[Judged]] = {}
        for one in self.layers:
            if (name := key(one)) is not None:
                rows.setdefault(name, []).append(one)
        return [group_of(name, row) for name, row in rows.items()]

    def depth_answer(self, part: str) -> str:
        """Whether deeper blocks compress better: the rank correlation of a block's loss with its position."""
        costs = [getattr(group, f"{part}_each") for group in self.by_block()]
        if len(costs) < 3 or any(cost is None for cost in costs):
            return "too few blocks to tell"
        rho = rank_correlation(costs)
        said = "no clear trend" if abs(rho) < TREND else "yes" if rho < 0 else "no, worse"
        return f"{said} (rank correlation of cost and depth {rho:+.2f})"

    def precious(self) -> list[Judged]:
        """Layers that lose far more per weight than the median layer, the worst first: better left alone."""
        typical = statistics.median(one.loss_per_million("integers") for one in self.layers)
        found = [one for one in self.layers if one.loss_per_million("integers") > PRECIOUS * typical]
        return sorted(found, key=lambda one: -one.loss_per_million("integers"))

    def plain(self) -> dict[str, object]:
        """The profile as JSON data."""
        return {
            "model": self.model,
            "level": self.level,
            "integers": self.integers,
            "cores": self.cores,
            "deeper_blocks_compress_better": {part: self.depth_answer(part) for part in ("integers", "cores")},
            "better_left_alone": [one.layer for one in self.precious()],
            "by_block": [asdict(group) for group in self.by_block()],
            "by_type": [asdict(group) for group in self.by_type()],
            "layers": [asdict(one) for one in self.layers],
        }


def group_of(name: str, row: Sequence[Judged]) -> Group:
    """Sums over layers."""
    weights = sum(one.weights for one in row)
    integers = sum(one.integers for one in row)
    cores = None if any(one.cores is None for one in row) else sum(one.cores or 0.0 for one in row)
    each = None if cores is None else 1e6 * cores / weights
    return Group(name, len(row), weights, integers, cores, 1e6 * integers / weights, each)


def rank_correlation(values: Iterable[float]) -> float:
    """Spearman's correlation of values with their position in the list."""
    order = np.argsort(np.argsort(np.array(list(values))))
    return float(np.corrcoef(np.arange(len(order)), order)[0, 1])


def profile_model(
    source: DenseWeights,
    name: str,
    text: TokenText,
    walk: Calibration,
    *,
    level: str,
    bits: int,
    chi: int,
    progress: Progress = silent,
    log: Log = no_log,
) -> Profile:
    """Judges every layer stored as integers of so many bits and, but for embedding and head, as balanced cores alone.

    Args:
        name: of the model, for the profile.
        text, walk: the calibration text.
        level: `fast` or `full`.
    """
    linears = source.spec.linears
    whole = [replace(one, terms=(integers(one.in_features, bits, GROUP),)) for one in linears]
    cores = [as_cores(one, chi) for one in linears if one.name not in (EMBEDDING, HEAD)]
    measured: dict[str, tuple[LayerSensitivity, ...]] = {one.name: () for one in linears}
    losses: list[dict[str, float]] = []
    if level == "full":
        rows = cached_sensitivities(source, text, walk, [*whole, *cores], progress=progress, log=log)
        for part in (rows[: len(whole)], rows[len(whole) :]):
            losses.append({row.layer: max(row.kl_mean, 0.0) for row in part})
            measured |= {row.layer: (*measured[row.layer], row) for row in part}
    else:
        surveyed = cached_survey(source, walk, text, progress=progress, log=log)
        losses = [{one.name: surveyed.loss(one) or 0.0 for one in part} for part in (whole, cores)]
    as_integers, replaced = losses
    layers = tuple(
        Judged(
            one.name,
            one.out_features * one.in_features,
            as_integers[one.name],
            replaced.get(one.name),
            measured[one.name],
        )
        for one in linears
    )
    return Profile(name, level, f"{bits} bits", f"χ = {chi}", layers)


def as_cores(linear: LinearSpec, chi: int) -> LinearSpec:
    """A layer replaced by two fp16 cores of a balanced shape."""
    shape = balanced_shape(linear.out_features, linear.in_features, 2)
    return replace(linear, terms=(operator(*shape, chi, "f16"),))
