"""The contents of a `.mpo` file as frozen dataclasses that refuse invalid values (SPEC.md, sections 3 and 4).

A linear layer is a sum of terms: y = Σ_t term_t(T x) (+ bias), term ∈ {Dense, Quantized, Mpo}. T is 1, a block Hadamard
transform, or a stored one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Literal, get_args

from mpo_formats.codec import describe
from mpo_formats.errors import FormatError

FloatType = Literal["f32", "f16", "bf16"]
CoreType = Literal["f32", "f16", "bf16", "int8", "int4"]
FLOATS: tuple[str, ...] = get_args(FloatType)
CORE_BITS = {"int8": 8, "int4": 4}
BITS = (8, 6, 5, 4, 3, 2)
GROUPS = (16, 32, 64, 128, 256)
BLOCKS = (16, 32, 64, 128, 256)
HADAMARDS = (0, *BLOCKS)
LARGEST_SIZE = 2**31 - 1
MOST_CORES = 16
MOST_TERMS = 8


def require(condition: bool, message: str) -> None:
    """Raises FormatError with the message unless the condition holds."""
    if not condition:
        raise FormatError(message)


def require_sizes(name: str, sizes: tuple[int, ...], most: int = LARGEST_SIZE, least: int = 1) -> None:
    """Raises FormatError unless every size is an integer in least … most."""
    for size in sizes:
        if type(size) is not int or not least <= size <= most:
            raise FormatError(f"{name}: expected an integer from {least} to {most}, found {describe(size)}")


def require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raises FormatError unless the value is one of the choices, and of its type: 4.0 is not 4, 1 is not True."""
    if value not in choices or type(value) is not type(choices[choices.index(value)]):
        raise FormatError(f"{name}: expected one of {', '.join(map(str, choices))}, found {describe(value)}")


def require_name(what: str, name: str) -> None:
    """Raises FormatError unless the name of a layer or vector is 1 to 200 printable ASCII characters."""
    if not 0 < len(name) <= 200 or not name.isascii() or not name.isprintable():
        raise FormatError(f"{what}: expected 1 to 200 printable ASCII characters, found {describe(name)}")


@dataclass(frozen=True, slots=True)
class Dense:
    """A stored matrix [out, in]."""

    kind: Literal["dense"] = field(default="dense", kw_only=True)
    dtype: FloatType

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, ("dense",))
        require_choice("dtype", self.dtype, FLOATS)

    @staticmethod
    def kind_name() -> str:
        """The `kind` that marks this term in the layer table."""
        return "dense"


@dataclass(frozen=True, slots=True)
class Quantized:
    """Group-wise integers: w = scale · (q − zero), with a zero stored per group, or else `packing.implicit_zero(bits)`."""

    kind: Literal["quantized"] = field(default="quantized", kw_only=True)
    bits: int
    group: int
    zeros: bool

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, ("quantized",))
        require_choice("bits", self.bits, BITS)
        require_choice("group", self.group, GROUPS)
        require_choice("zeros", self.zeros, (False, True))

    @staticmethod
    def kind_name() -> str:
        """The `kind` that marks this term in the layer table."""
        return "quantized"


@dataclass(frozen=True, slots=True)
class Mpo:
    """A Matrix Product Operator: W[(o_1…o_n),(i_1…i_n)] = Σ_α Π_k G_k[α_{k−1}, o_k, i_k, α_k].

    `bonds` are the n−1 inner bond dimensions χ; the outer ones are 1. `group` is 0 for float cores.
    """

    kind: Literal["mpo"] = field(default="mpo", kw_only=True)
    out_dims: tuple[int, ...]
    in_dims: tuple[int, ...]
    bonds: tuple[int, ...]
    dtype: CoreType
    group: int

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, ("mpo",))
        require_choice("dtype", self.dtype, get_args(CoreType))
        count = len(self.out_dims)
        if not 2 <= count <= MOST_CORES:
            raise FormatError(f"out_dims: expected 2 to {MOST_CORES} cores, found {count}")
        if len(self.in_dims) != count:
            raise FormatError(f"in_dims: expected {count} factors as in out_dims, found {len(self.in_dims)}")
        if len(self.bonds) != count - 1:
            raise FormatError(f"bonds: expected {count - 1} for {count} cores, found {len(self.bonds)}")
        require_sizes("out_dims", self.out_dims)
        require_sizes("in_dims", self.in_dims)
        require_sizes("bonds", self.bonds)
        self._check_group()
        for index, (bond, most) in enumerate(zip(self.bonds, full_rank(self.out_dims, self.in_dims), strict=True)):
            if bond > most:
                raise FormatError(f"bonds[{index}]: expected at most the full rank {describe(most)}, found {bond}")

    def _check_group(self) -> None:
        if not self.core_bits:
            if type(self.group) is not int or self.group != 0:
                raise FormatError(f"group: expected 0 for {self.dtype} cores, found {describe(self.group)}")
            return
        require_choice("group", self.group, GROUPS)
        for index, size in enumerate(self.core_sizes()):
            if size % self.group:
                raise FormatError(f"group: {self.group} does not divide core {index}'s o·i = {describe(size)}")

    @staticmethod
    def kind_name() -> str:
        """The `kind` that marks this term in the layer table."""
        return "mpo"

    @property
    def core_bits(self) -> int:
        """Bits of an integer core's elements, 0 for float cores."""
        return CORE_BITS.get(self.dtype, 0)

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


def full_rank(out_dims: tuple[int, ...], in_dims: tuple[int, ...]) -> tuple[int, ...]:
    """The largest useful bond between neighbouring cores of an MPO: the smaller side of the matrix unfolded there."""
    sizes = [o * i for o, i in zip(out_dims, in_dims, strict=True)]
    return tuple(min(math.prod(sizes[:cut]), math.prod(sizes[cut:])) for cut in range(1, len(sizes)))


Term = Dense | Quantized | Mpo


@dataclass(frozen=True, slots=True)
class Transform:
    """A stored transform T of inputs: `count` matrices [block, block], one below the other in one term.

    `name` is that of one of the layers that may share it. T x multiplies every block of `block` inputs with the one matrix,
    or each with its own of as many as there are blocks.
    """

    name: str
    block: int
    count: int
    term: Dense | Quantized

    def __post_init__(self) -> None:
        require_name("name", self.name)
        require_choice("block", self.block, BLOCKS)
        require_sizes("count", (self.count,), most=LARGEST_SIZE // self.block)
        if isinstance(self.term, Quantized) and self.block % self.term.group:
            raise FormatError(f"group {self.term.group} does not divide the block of {self.block}")


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One linear layer (or the embedding table): out × in, its terms, and its bias if any.

    Where `hadamard` is not 0, the terms act on H x, with H the Hadamard transform of every block of `hadamard` inputs: the
    layer's matrix is (Σ_t term_t) H. H is symmetric and its own inverse. `transform` is a stored one in its place.
    """

    name: str
    out_features: int
    in_features: int
    bias: FloatType | None
    terms: tuple[Term, ...]
    hadamard: int = field(default=0, metadata={"since": "0.4"})
    transform: Transform | None = field(default=None, metadata={"since": "0.5"})

    def __post_init__(self) -> None:
        require_name("layer name", self.name)
        require_sizes(f"{self.name}: features", (self.out_features, self.in_features))
        require_choice(f"{self.name}: bias", self.bias, (*FLOATS, None))
        if not 1 <= len(self.terms) <= MOST_TERMS:
            raise FormatError(f"{self.name}: expected 1 to {MOST_TERMS} terms, found {len(self.terms)}")
        require_choice(f"{self.name}: hadamard", self.hadamard, HADAMARDS)
        if self.hadamard and self.in_features % self.hadamard:
            found = f"hadamard: blocks of {self.hadamard} do not divide the {self.in_features} inputs"
            raise FormatError(f"{self.name}: {found}")
        if self.transform is not None:
            require(not self.hadamard, f"{self.name}: transform: expected none beside hadamard {self.hadamard}")
            self._check_transform(self.transform)
        for term in self.terms:
            if isinstance(term, Quantized):
                if self.in_features % term.group:
                    found = f"group {term.group} does not divide the {self.in_features} inputs"
                    raise FormatError(f"{self.name}: {found}")
            elif isinstance(term, Mpo):
                self._check_factors("out_dims", term.out_dims, self.out_features)
                self._check_factors("in_dims", term.in_dims, self.in_features)

    def _check_factors(self, what: str, dims: tuple[int, ...], size: int) -> None:
        product = math.prod(dims)
        if product != size:
            found = f"{what} {list(dims)} multiply to {describe(product)}"
            raise FormatError(f"{self.name}: {found}, expected {size}")

    def _check_transform(self, transform: Transform) -> None:
        blocks, rest = divmod(self.in_features, transform.block)
        if rest or transform.count not in (1, blocks):
            found = f"transform: {transform.count} of {transform.block} inputs do not fit the {self.in_features} inputs"
            raise FormatError(f"{self.name}: {found}")

    @property
    def transformed(self) -> bool:
        """Whether the terms take a transform of the inputs."""
        return self.hadamard != 0 or self.transform is not None

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
        require_name("vector name", self.name)
        require_sizes(self.name, (self.size,))
        require_choice(f"{self.name}: dtype", self.dtype, FLOATS)


FileName = Literal[
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"
]


@dataclass(frozen=True, slots=True)
class FileSpec:
    """One embedded file, stored as bytes."""

    name: FileName
    size: int

    def __post_init__(self) -> None:
        require_choice("file name", self.name, get_args(FileName))
        require_sizes(f"file {self.name}", (self.size,))


@dataclass(frozen=True, slots=True)
class Layouts:
    """How the bytes of integers and cores are laid out (SPEC.md, sections 5 and 6); version 0.2 has one way only."""

    integers: Literal["blocks-low-plane-first"] = "blocks-low-plane-first"
    cores: Literal["right-left-out-in"] = "right-left-out-in"
    bond_order: Literal["descending-importance"] = "descending-importance"

    def __post_init__(self) -> None:
        for entry in fields(self):
            require_choice(entry.name, getattr(self, entry.name), (entry.default,))
