from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def dequantize(
    planes: Sequence[NDArray[np.uint8]],
    bits: int,
    scale: NDArray[np.uint16],
    zero: NDArray[np.uint16] | None,
    out: NDArray[np.float32],
    isa: str = ...,
) -> None:
    """Write ``scale * (level - zero)`` of the planes [rows, groups, bytes] to ``out`` [rows, groups * group].

    ``scale`` and ``zero`` [rows, groups] are float16 bits; without ``zero`` it is 2**(bits - 1). Element j of its group
    sits in byte ``j * p // 8`` at bit ``j * p % 8`` of a plane of p bits; ``planes`` lists the low plane first.
    Raises ValueError on shapes that do not fit together and TypeError on other dtypes or strided arrays.
    """

def isa() -> str:
    """Name the instruction set that ``dequantize`` uses on this CPU."""

def isas() -> list[str]:
    """Name the instruction sets that ``dequantize(isa=...)`` accepts on this CPU, best first."""

Bytes = NDArray[np.uint8]

class Matrix:
    """A stored matrix; it keeps the arrays that it reads."""

    @staticmethod
    def dense(where: str, type: str, rows: int, columns: int, data: Bytes) -> Matrix:
        """A float matrix from its bytes [rows * columns * size]; `type` is f32, f16 or bf16. Raises ValueError."""

    @staticmethod
    def integer(
        where: str,
        bits: int,
        rows: int,
        columns: int,
        group: int,
        planes: Sequence[Bytes],
        scale: Bytes,
        zero: Bytes | None,
    ) -> Matrix:
        """An integer matrix from the bytes of its planes, scales and zeros (SPEC.md, section 5). Raises ValueError."""

class Core:
    """A core of an Mpo term: bonds `left` and `right`, a prefix of what is stored."""

    def __init__(self, matrix: Matrix, left: int, right: int, out: int, in_: int, stored_left: int) -> None: ...

class Operator:
    """An Mpo term; `reverse` sweeps from the last core to the first; from `densify_from` tokens on the matrix is built.

    Raises ValueError where cores do not fit.
    """

    def __init__(self, cores: Sequence[Core], reverse: bool, densify_from: int = ...) -> None: ...

class Linear:
    """A layer: the sum of its terms and a bias. Raises ValueError where sizes do not fit."""

    name: str
    rows: int
    columns: int

    def __init__(
        self,
        name: str,
        rows: int,
        columns: int,
        matrices: Sequence[Matrix],
        operators: Sequence[Operator],
        bias: NDArray[np.float32] | None,
    ) -> None: ...

class Cache:
    """A KV cache; `type` is f32, f16, bf16 or int8."""

    capacity: int
    lengths: list[int]
    nbytes: int

    def __init__(self, blocks: int, rows: int, heads: int, capacity: int, size: int, type: str) -> None: ...
    def advance(self, counts: Sequence[int]) -> None:
        """Count new tokens of each row; raises ValueError past the capacity."""

    def rewind(self, length: int) -> None:
        """Forget all positions from `length` on."""

class Program:
    """A list of ops over registers [tokens, width], recorded by the methods named like ops; `exact`: float activations.

    Each method returns the register of its result and raises ValueError where widths do not fit.
    """

    def __init__(self, exact: bool) -> None: ...
    def input(self, width: int) -> int: ...
    def embed(self, table: Linear, multiplier: float) -> int: ...
    def rms_norm(self, x: int, weight: NDArray[np.float32], eps: float) -> int: ...
    def linear(self, x: int, layer: Linear) -> int: ...
    def rope_and_append(self, q: int, k: int, v: int, frequencies: NDArray[np.float32], block: int) -> int: ...
    def attention(self, q: int, head_size: int, block: int, scale: float) -> int: ...
    def swiglu(self, gate: int, up: int) -> int: ...
    def add_scaled(self, x: int, y: int, scale: float) -> int: ...
    def divide(self, x: int, divisor: float) -> int: ...
    def finish(self, result: int) -> None:
        """End the recording."""

    def width(self, x: int) -> int:
        """Elements of a register."""

    def run(
        self,
        ids: NDArray[np.int64] | None,
        inputs: Sequence[NDArray[np.float32]],
        cache: Cache | None,
        out: NDArray[np.float32],
    ) -> None:
        """Run it for ids [rows, count] or inputs [rows, count, width], and write the result to `out`; releases the GIL.

        Raises ValueError where shapes do not fit or an id lies outside the table.
        """

def threads() -> int:
    """The number of threads in use."""

def set_threads(threads: int) -> None:
    """Change the number of threads; raises ValueError unless it is 1 to 1024."""

def read_bandwidth(data: NDArray[np.uint64]) -> float:
    """Bytes per second of summing `data` once with all threads; releases the GIL."""

def default_threads() -> int:
    """MPO_THREADS, or the number of cores that this process may run on."""

class QuantizedMatrix:
    """What the raw kernels below multiply; see quantized_matrix."""

    rows: int
    columns: int

class DenseMatrix:
    """What the raw kernels below multiply; see dense_matrix."""

    rows: int

class Activations:
    """Rows of x rounded to int8 for the level active at the time."""

def quantized_matrix(
    bits: int, rows: int, columns: int, group: int, low: Bytes, high: Bytes | None, scale: Bytes, zero: Bytes | None
) -> QuantizedMatrix: ...
def dense_matrix(type: str, rows: int, columns: int, data: Bytes) -> DenseMatrix: ...
def quantize_activations(x: NDArray[np.float32]) -> Activations: ...
def multiply(
    w: QuantizedMatrix, x: Activations, y: NDArray[np.float32], begin: int, end: int, accumulate: bool = ...
) -> None: ...
def multiply_exact(
    w: QuantizedMatrix, x: NDArray[np.float32], y: NDArray[np.float32], begin: int, end: int, accumulate: bool = ...
) -> None: ...
def multiply_dense(
    w: DenseMatrix, x: NDArray[np.float32], y: NDArray[np.float32], begin: int, end: int, accumulate: bool = ...
) -> None: ...
def add_transposed(
    w: QuantizedMatrix, s: NDArray[np.float32], y: NDArray[np.float32], begin: int, end: int
) -> None: ...
def add_transposed_dense(
    w: DenseMatrix, s: NDArray[np.float32], y: NDArray[np.float32], begin: int, end: int
) -> None: ...
def active_isa() -> str:
    """The instruction set that layers use: the best of this CPU, or what MPO_ISA or set_isa() lowered it to."""

def set_isa(name: str) -> bool:
    """Choose an instruction set, `auto` for the best; False where this CPU cannot run it."""

def supported_isas() -> list[str]:
    """The instruction sets that set_isa() accepts on this CPU, best first."""
