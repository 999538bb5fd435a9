"""What a `.mpo` file holds, as frozen dataclasses that cannot be built invalid (SPEC.md, sections 3 and 4).

A linear layer is a sum of terms: y = Σ_t term_t(x) (+ bias), term ∈ {Dense, Quantized, Mpo}.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from mpo_formats.codec import describe
from mpo_formats.errors import FormatError

FloatType = Literal["f32", "f16", "bf16"]
CoreType = Literal["f32", "f16", "bf16", "int8", "int4"]
BITS = (8, 6, 5, 4, 3, 2)
GROUPS = (16, 32, 64, 128, 256)
LARGEST_SIZE = 2**31 - 1


def require(condition: bool, message: str) -> None:
    """Raises FormatError with the message unless the condition holds."""
    if not condition:
        raise FormatError(message)


def require_sizes(name: str, sizes: tuple[int, ...], most: int = LARGEST_SIZE) -> None:
    """Raises FormatError unless every size is in 1 … most."""
    for size in sizes:
        require(1 <= size <= most, f"{name}: expected a size from 1 to {most}, found {describe(size)}")


@dataclass(frozen=True, slots=True)
class Dense:
    """A stored matrix [out, in]."""

    kind: Literal["dense"]
    dtype: FloatType

    @staticmethod
    def kind_name() -> str:
        return "dense"


@dataclass(frozen=True, slots=True)
class Quantized:
    """Group-wise integers: w = scale · (q − zero), zero stored per group or 2^(bits−1)."""

    kind: Literal["quantized"]
    bits: int
    group: int
    zeros: bool

    def __post_init__(self) -> None:
        require(self.bits in BITS, f"bits: expected one of {BITS}, found {describe(self.bits)}")
        require(self.group in GROUPS, f"group: expected one of {GROUPS}, found {describe(self.group)}")

    @staticmethod
    def kind_name() -> str:
        return "quantized"


@dataclass(frozen=True, slots=True)
class Mpo:
    """A Matrix Product Operator: W[(o_1…o_n),(i_1…i_n)] = Σ_α Π_k G_k[α_{k−1}, o_k, i_k, α_k].

    `bonds` are the n−1 inner bond dimensions χ; the outer ones are 1. `group` is 0 for float cores.
    """

    kind: Literal["mpo"]
    out_dims: tuple[int, ...]
    in_dims: tuple[int, ...]
    bonds: tuple[int, ...]
    dtype: CoreType
    group: int

    def __post_init__(self) -> None:
        count = len(self.out_dims)
        require(2 <= count <= 16, f"out_dims: expected 2 to 16 cores, found {count}")
        require(
            len(self.in_dims) == count, f"in_dims: expected {count} factors as in out_dims, found {len(self.in_dims)}"
        )
        require(len(self.bonds) == count - 1, f"bonds: expected {count - 1} for {count} cores, found {len(self.bonds)}")
        require_sizes("out_dims", self.out_dims)
        require_sizes("in_dims", self.in_dims)
        require_sizes("bonds", self.bonds)
        if self.dtype in ("int8", "int4"):
            require(self.group in GROUPS, f"group: expected one of {GROUPS}, found {describe(self.group)}")
            for index, size in enumerate(self.core_sizes()):
                require(size % self.group == 0, f"core {index}: group {self.group} does not divide o·i = {size}")
        else:
            require(self.group == 0, f"group: expected 0 for {self.dtype} cores, found {describe(self.group)}")
        for index, bond in enumerate(self.bonds):
            left = math.prod(o * i for o, i in zip(self.out_dims[: index + 1], self.in_dims[: index + 1], strict=True))
            right = math.prod(o * i for o, i in zip(self.out_dims[index + 1 :], self.in_dims[index + 1 :], strict=True))
            most = min(left, right)
            require(bond <= most, f"bonds[{index}]: expected at most the full rank {most}, found {bond}")

    @staticmethod
    def kind_name() -> str:
        return "mpo"

    @property
    def core_bits(self) -> int:
        """Bits of an integer core's elements, 0 for float cores."""
        return {"int8": 8, "int4": 4}.get(self.dtype, 0)

    def core_sizes(self) -> tuple[int, ...]:
        """o_k · i_k of each core."""
        return tuple(o * i for o, i in zip(self.out_dims, self.in_dims, strict=True))

    def core_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """The stored shape [χ_k, χ_{k−1}, o_k, i_k] of each core: the first bonds of a core are its prefix."""
        bonds = (1, *self.bonds, 1)
        return tuple((bonds[k + 1], bonds[k], self.out_dims[k], self.in_dims[k]) for k in range(len(self.out_dims)))

    def truncated(self, chi: int) -> Mpo:
        """The same operator with every bond cut to its first `chi` values."""
        require_sizes("chi", (chi,))
        return replace(self, bonds=tuple(min(bond, chi) for bond in self.bonds))


Term = Dense | Quantized | Mpo


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One linear layer (or the embedding table): out × in, its terms, and its bias if any."""

    name: str
    out_features: int
    in_features: int
    bias: FloatType | None
    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        require(0 < len(self.name) <= 200 and self.name.isascii() and self.name.isprintable(), "layer name: bad text")
        require_sizes(f"{self.name}: features", (self.out_features, self.in_features))
        require(1 <= len(self.terms) <= 8, f"{self.name}: expected 1 to 8 terms, found {len(self.terms)}")
        for term in self.terms:
            if isinstance(term, Quantized):
                divides = self.in_features % term.group == 0
                require(divides, f"{self.name}: group {term.group} does not divide the {self.in_features} inputs")
            elif isinstance(term, Mpo):
                for what, dims, size in (
                    ("out_dims", term.out_dims, self.out_features),
                    ("in_dims", term.in_dims, self.in_features),
                ):
                    product = math.prod(dims)
                    found = describe(product)
                    require(product == size, f"{self.name}: {what} {list(dims)} multiply to {found}, expected {size}")

    def truncated(self, chi: int) -> LinearSpec:
        """The same layer with every MPO bond cut to its first `chi` values."""
        terms = tuple(term.truncated(chi) if isinstance(term, Mpo) else term for term in self.terms)
        return replace(self, terms=terms)


@dataclass(frozen=True, slots=True)
class VectorSpec:
    """One vector that is stored as it is, such as a norm's weight."""

    name: str
    size: int
    dtype: FloatType

    def __post_init__(self) -> None:
        require(0 < len(self.name) <= 200 and self.name.isascii() and self.name.isprintable(), "vector name: bad text")
        require_sizes(self.name, (self.size,))


FileName = Literal[
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"
]


@dataclass(frozen=True, slots=True)
class FileSpec:
    """One embedded file, stored as bytes."""

    name: FileName
    size: int

    def __post_init__(self) -> None:
        require_sizes(f"file {self.name}", (self.size,))


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where the weights came from and what was done to them."""

    source: str
    revision: str | None
    source_sha256: str
    exporter: str
    options: dict[str, str]
    calibration_sha256: str | None


@dataclass(frozen=True, slots=True)
class Quality:
    """The compressed model against the dense one, in nats, on one text."""

    text: str
    text_sha256: str
    tokens: int
    window: int
    perplexity: float
    perplexity_error: float
    dense_perplexity: float
    kl_mean: float
    kl_999: float
    same_top1: float


@dataclass(frozen=True, slots=True)
class Certificate:
    """The measured quality of a file, for the whole bonds (chi null) and for prefixes of them."""

    chi: int | None
    quality: Quality


@dataclass(frozen=True, slots=True)
class Certificates:
    """All measured certificates of a file; empty where nothing was measured."""

    entries: tuple[Certificate, ...]
