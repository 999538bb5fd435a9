"""What a plan is made from: its name, its bounds, the layers that it acts on, and a target. An invalid choice cannot be built."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from mpo_exporter.measure.sensitivity import LEVELS
from mpo_exporter.plan.named import AUTO, PLANS, Plan
from mpo_exporter.terms import DEFAULT_CHI, TRANSFORMS, Transforms
from mpo_formats import ConfigError, LinearSpec, ModelSpec, PlanError
from mpo_formats.layout import content_tensors
from mpo_formats.spec import CoreType

if TYPE_CHECKING:
    from mpo_exporter.plan.file import PlanFile

# More bits than any weight has.
MOST_BITS = 32
# The number of bits that the factors of key projections may have, and the type that each is stored in.
FACTORS: dict[int, CoreType] = {4: "int4", 8: "int8", 16: "f16"}


@dataclass(frozen=True, slots=True)
class Target:
    """How large the file may become, or how far from the dense model; at most one of these, or none.

    Args:
        size: the most bytes of the whole file.
        bits_per_weight: the same as bits of the whole file per weight of the dense model.
        ratio: the same as a share of the dense model's bytes.
        max_kl: the largest KL to the dense model in nats per token; the file becomes as small as that allows.
        default: the user named no target: the planner chooses a size once the layers are measured.

    Raises:
        ConfigError: for more than one target, or one out of range.
    """

    size: int | None = None
    bits_per_weight: float | None = None
    ratio: float | None = None
    max_kl: float | None = None
    default: bool = False

    def __post_init__(self) -> None:
        if len(self.given) > 1:
            raise ConfigError(f"{' and '.join(self.given)}: give one of them")
        if self.size is not None and self.size < 1:
            raise ConfigError(f"--target-size {self.size}: expected at least 1 byte")
        if self.bits_per_weight is not None and not 0 < self.bits_per_weight <= MOST_BITS:
            raise ConfigError(
                f"--target-bpw {self.bits_per_weight:g}: expected more than 0 and at most {MOST_BITS} bits per weight"
            )
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ConfigError(f"--target-ratio {self.ratio:g}: expected more than 0 and at most 1")
        if self.max_kl is not None and not 0 < self.max_kl < math.inf:
            raise ConfigError(f"--max-kl {self.max_kl:g}: expected more than 0 nats per token")

    @property
    def given(self) -> list[str]:
        """The targets that are given, by the names of their options."""
        values = {
            "--target-size": self.size,
            "--target-bpw": self.bits_per_weight,
            "--target-ratio": self.ratio,
            "--max-kl": self.max_kl,
        }
        return [name for name, value in values.items() if value is not None]

    def bytes_of(self, source: ModelSpec) -> int | None:
        """The most bytes of the whole file for a dense model; None where the target is a KL, the default or none."""
        if self.bits_per_weight is not None:
            return int(self.bits_per_weight * source.architecture.parameters() / 8)
        if self.ratio is not None:
            return int(self.ratio * sum(tensor.size for tensor in content_tensors(source)))
        return self.size


@dataclass(frozen=True, slots=True)
class Choice:
    """Which layers a plan acts on; it stores the others as int4 (`paper`) or as they are (all other plans).

    Args:
        names: the layers by name; None leaves the choice to the plan.
        pattern: a regular expression that a layer's name must contain.
        top_k, share: keep the least sensitive layers of these, by number or by share.
        sensitivity: how layers are judged: `fast` (expected from gradients) or `full` (each compressed alone and measured).

    Raises:
        PlanError: for a value out of range.
    """

    names: tuple[str, ...] | None = None
    pattern: str | None = None
    top_k: int | None = None
    share: float | None = None
    sensitivity: str = "fast"

    def __post_init__(self) -> None:
        if self.sensitivity not in LEVELS:
            raise PlanError(f"--sensitivity {self.sensitivity}: expected one of {', '.join(LEVELS)}")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise PlanError(f"--layers {self.pattern}: not a regular expression ({error})") from None
        if self.top_k is not None and self.share is not None:
            raise PlanError("--top-k and --compression-ratio: give one of them")
        if self.top_k is not None and self.top_k < 1:
            raise PlanError(f"--top-k {self.top_k}: expected at least 1")
        if self.share is not None and not 0 < self.share <= 1:
            raise PlanError(f"--compression-ratio {self.share:g}: expected more than 0 and at most 1")

    @property
    def by_sensitivity(self) -> bool:
        """Whether layers are chosen by how sensitive they are."""
        return self.top_k is not None or self.share is not None


@dataclass(frozen=True, slots=True)
class KeyOptions:
    """How the plan `k-proj` replaces key projections by two factors.

    Args:
        rank: of the factors.
        bits: of their integers; 16 stores them in fp16.
        norm: scales an operator to its matrix's Frobenius norm.
        min_dim: leaves matrices with a smaller side alone.

    Raises:
        PlanError: for a value out of range.
    """

    rank: int = 128
    bits: int = 8
    norm: bool = True
    min_dim: int = 64

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise PlanError(f"--rank {self.rank}: expected at least 1")
        if self.bits not in FACTORS:
            raise PlanError(f"--quant-bits {self.bits}: expected one of {', '.join(map(str, FACTORS))}")
        if self.min_dim < 1:
            raise PlanError(f"--min-dim {self.min_dim}: expected at least 1")

    @property
    def dtype(self) -> CoreType:
        """The type that the factors are stored in."""
        return FACTORS[self.bits]


@dataclass(frozen=True, slots=True)
class Options:
    """Everything that a plan is made from, besides the model and what is measured of it.

    Args:
        plan: the name of a plan in `PLANS`.
        chi: the largest bond dimension; None for DEFAULT_CHI. In the plan `auto` a given χ demands cores of that bond
            dimension beside the integers of every attention and MLP matrix; None leaves it to the plan which get any.
        cores: cores of an operator.
        target: of the plan `auto`; without one it stores what `corrected` does.
        for_speed: keeps `auto` from terms that are slower than int4 on this machine.
        transforms: that `auto` lets layers take of their input, where that lowers their loss; None leaves it to the effort.
        choice: the layers that the plan acts on.
        keys: of the plan `k-proj`.
        file: a plan file, whose layers get the file's terms whatever the plan says.

    Raises:
        PlanError: for a value out of range, or that the plan does not have.
    """

    plan: str = AUTO.name
    chi: int | None = None
    cores: int = 2
    target: Target = field(default_factory=Target)
    for_speed: bool = False
    transforms: Transforms | None = None
    choice: Choice = field(default_factory=Choice)
    keys: KeyOptions = field(default_factory=KeyOptions)
    file: PlanFile | None = None

    def __post_init__(self) -> None:
        if self.plan not in PLANS:
            raise PlanError(f"--plan {self.plan}: expected one of {', '.join(PLANS)}, or file:PLAN.json")
        if self.chi is not None and self.chi < 1:
            raise PlanError(f"--chi {self.chi}: the bond dimension must be at least 1")
        if self.transforms not in (None, *TRANSFORMS):
            raise PlanError(f"--transforms {self.transforms}: expected one of {', '.join(TRANSFORMS)}")
        if not 2 <= self.cores <= 8:
            raise PlanError(f"--cores {self.cores}: expected 2 to 8")
        given = [*self.target.given, *(["--for-speed"] if self.for_speed else [])]
        if given and not self.named.allocates:
            allocating = ", ".join(plan.name for plan in PLANS.values() if plan.allocates)
            raise PlanError(f"{given[0]}: expected the plan {allocating}, found {self.plan}")
        if self.choice.by_sensitivity and not self.named.chooses:
            choosing = ", ".join(plan.name for plan in PLANS.values() if plan.chooses)
            raise PlanError(f"--top-k and --compression-ratio: expected the plan {choosing}, found {self.plan}")

    @property
    def named(self) -> Plan:
        """The plan of that name."""
        return PLANS[self.plan]

    @property
    def largest_chi(self) -> int:
        """The largest bond dimension."""
        return DEFAULT_CHI if self.chi is None else self.chi

    @property
    def demands_cores(self) -> bool:
        """Whether every attention and MLP matrix gets cores of χ, because the user gave a χ to the plan `auto`."""
        return self.named.allocates and self.chi is not None

    def pinned(self, source: ModelSpec) -> dict[str, LinearSpec]:
        """The layers of the plan file by name, which are stored so whatever the plan says."""
        return {} if self.file is None else self.file.layers(source)

    @property
    def allocates(self) -> bool:
        """Whether the plan chooses among the survey's candidates, because there is a target."""
        return bool(self.target.given) or self.target.default

    @property
    def keeps_norm(self) -> bool:
        """Whether cores that replace a matrix are scaled to its Frobenius norm."""
        return self.named.replaces_keys and self.keys.norm

    @property
    def fits(self) -> bool:
        """Whether any layer is fitted, so that calibration text has a use."""
        return self.named.fits or self.file is not None

    @property
    def takes_built_in_text(self) -> bool:
        """Whether layers are fitted to the built-in calibration text if the user names none."""
        return self.named.calibrated or self.file is not None or self.choice.by_sensitivity

    def recorded(self, source: ModelSpec) -> dict[str, str]:
        """The options as the file's provenance records them: plan, χ and cores, and the others if they were given."""
        found = {"plan": self.plan, "chi": str(self.largest_chi), "cores": str(self.cores)}
        if self.demands_cores:
            found["cored"] = "every matrix"
        others = {
            "target_bytes": self.target.bytes_of(source),
            "max_kl": self.target.max_kl,
            "for_speed": self.for_speed,
            "transforms": self.transforms if self.named.allocates else None,
            "pattern": self.choice.pattern,
            "top_k": self.choice.top_k,
            "share": self.choice.share,
            "file": None if self.file is None else self.file.path.name,
        }
        found |= {name: str(value) for name, value in others.items() if value not in (None, False)}
        if self.choice.sensitivity != LEVELS[0]:
            found["sensitivity"] = self.choice.sensitivity
        if self.named.replaces_keys:
            found |= {f"keys.{name}": str(value) for name, value in asdict(self.keys).items()}
        return found
