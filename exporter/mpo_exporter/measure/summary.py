"""What a profile says: by layer, by block, by type of matrix, and in two answers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from mpo_exporter.measure.sensitivity import Measured
from mpo_formats.architecture import ATTENTION, EMBEDDING, HEAD, MLP

TABLES = "tables"
# Types in the order of the file; the tables have no block.
TYPES = (*ATTENTION, *MLP)
# A rank correlation of this size over blocks is called a trend.
TREND = 0.5
# A layer that loses this many times more for each weight than the median one is better left alone.
PRECIOUS = 5.0


@dataclass(frozen=True, slots=True)
class Judged:
    """One layer: its weights, and nats a token that it costs in integers and as cores alone, expected or measured.

    `cores` is None for tables, which never become cores; `measured` holds what was measured with integers and with cores.
    """

    layer: str
    weights: int
    integers: float
    cores: float | None
    measured: tuple[Measured, ...] = ()

    @property
    def block(self) -> int | None:
        """Its block, None for tables."""
        return None if self.layer in (EMBEDDING, HEAD) else int(self.layer.split(".")[2])

    @property
    def kind(self) -> str:
        """Its type, such as mlp.up_proj."""
        return self.layer.split(".", 3)[3] if self.block is not None else self.layer

    def dearness(self, part: str) -> float:
        """Nats a token for each million weights."""
        value = getattr(self, part)
        return 1e6 * value / self.weights if value is not None else float("nan")


@dataclass(frozen=True, slots=True)
class Group:
    """Layers together: their number, weights, summed cost, and cost for each million weights."""

    name: str
    layers: int
    weights: int
    integers: float
    cores: float | None
    integers_each: float
    cores_each: float | None


@dataclass(frozen=True, slots=True)
class Profile:
    """A model's profile; `level` is fast or full, the compressions in words."""

    model: str
    level: str
    integers: str
    cores: str
    layers: tuple[Judged, ...]

    def by_block(self) -> list[Group]:
        """Blocks from first to last."""
        return self.grouped(lambda one: None if one.block is None else f"block {one.block}")

    def by_type(self) -> list[Group]:
        """Types of matrices in the order of the file, tables included."""
        return self.grouped(lambda one: one.kind)

    def grouped(self, key: Callable[[Judged], str | None]) -> list[Group]:
        """Layers of one key together, in the order in which keys appear."""
        rows: dict[str, list[Judged]] = {}
        for one in self.layers:
            if (name := key(one)) is not None:
                rows.setdefault(name, []).append(one)
        return [group_of(name, row) for name, row in rows.items()]

    def depth_answer(self, part: str) -> str:
        """Whether deeper blocks compress better: the rank correlation of a block's cost with its place."""
        costs = [getattr(group, f"{part}_each") for group in self.by_block()]
        if len(costs) < 3 or any(cost is None for cost in costs):
            return "too few blocks to tell"
        rho = rank_correlation(costs)
        said = "no clear trend" if abs(rho) < TREND else "yes" if rho < 0 else "no, worse"
        return f"{said} (rank correlation of cost and depth {rho:+.2f})"

    def precious(self) -> list[Judged]:
        """Layers that cost far more than the median for each weight: to be left alone, the dearest first."""
        typical = statistics.median(one.dearness("integers") for one in self.layers)
        found = [one for one in self.layers if one.dearness("integers") > PRECIOUS * typical]
        return sorted(found, key=lambda one: -one.dearness("integers"))

    def plain(self) -> dict[str, object]:
        """The whole as JSON data."""
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
    """Spearman's correlation of values with their place in the list."""
    order = np.argsort(np.argsort(np.array(list(values))))
    return float(np.corrcoef(np.arange(len(order)), order)[0, 1])
