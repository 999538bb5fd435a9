"""The native module, written in C++ (mpo_runtime/csrc); `mpo_runtime.native` is its public face.

All arrays are contiguous and are never converted: a TypeError refuses other element types and strides, a ValueError shapes,
sizes and values that do not fit together, both before native code touches memory. bits, group, planes, scale and zero are
those of SPEC.md, section 5; planes list the low plane first, and without zeros each group has `implicit_zero(bits)`.
"""

from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

# -- layers (csrc/bind/layers.cpp)

class Matrix:
    """A stored matrix; it keeps the arrays that it reads. `where` names it in messages."""

    @staticmethod
    def dense(where: str, type: str, rows: int, columns: int, data: Bytes) -> Matrix:
        """A float matrix from its bytes [rows · columns · element size]; `type` is f32, f16 or bf16."""

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
        """An integer matrix from the bytes of its planes, scales and zeros."""

class Core:
    """A core of an Mpo term, with bonds `left` and `right` that may be a prefix of those that `matrix` stores."""

    def __init__(self, matrix: Matrix, left: int, right: int, out: int, in_: int, stored_left: int) -> None: ...

class Operator:
    """An Mpo term.

    It is applied by a sweep from the first core to the last, or from the last to the first where `reverse`. For
    `densify_from` tokens and more (0: never) its matrix is built instead. Raises ValueError where cores do not fit each
    other and MemoryError where their matrix is too large for any memory.
    """

    def __init__(self, cores: Sequence[Core], reverse: bool, densify_from: int = ...) -> None: ...

class Transform:
    """A stored transform of inputs: matrices [count, block, block], given one after the other; one is that of every block."""

    def __init__(self, count: int, block: int, matrices: NDArray[np.float32]) -> None: ...

class Linear:
    """A linear layer [rows, columns]: the sum of its terms, of x or of a transform of it, and a bias."""

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
        hadamard: int = 0,
        transform: Transform | None = None,
    ) -> None: ...

# -- programs and the KV cache (csrc/bind/programs.cpp)

class Pages:
    """Pages of 32 positions of the KV cache; `type` is f32, f16, bf16 or int8. One thread at a time may use a store."""

    count: int
    page_bytes: int

    def __init__(self, blocks: int, heads: int, size: int, type: str) -> None: ...
    def grow(self, count: int) -> None:
        """Make pages until there are `count`; raises MemoryError where memory does not suffice."""

    def copy(self, source: int, target: int) -> None:
        """Copy a page's content; like the next two, raises ValueError for a page that does not exist."""

    def read(self, page: int) -> bytes: ...
    def write(self, page: int, content: bytes) -> None:
        """Raises ValueError for another size than page_bytes, too."""

class Cache:
    """A KV cache of `rows` sequences, or the pages of the sequences of one step.

    Sequences of one step: `tables` names the pages of each, `lengths` the positions that are in them, `counts` its new tokens;
    they are run as one row of ids, in order. `few` marks those that are generated text (Span of backends/ops.py). Raises
    ValueError where pages do not exist or do not suffice, MemoryError where memory does not.
    """

    capacity: int
    lengths: list[int]
    nbytes: int

    @overload
    def __init__(self, blocks: int, rows: int, heads: int, capacity: int, size: int, type: str) -> None: ...
    @overload
    def __init__(
        self,
        pages: Pages,
        tables: Sequence[Sequence[int]],
        lengths: Sequence[int],
        counts: Sequence[int],
        few: Sequence[bool],
    ) -> None: ...
    def advance(self, counts: Sequence[int]) -> None:
        """Add new tokens to the length of each row; raises ValueError past the capacity."""

    def rewind(self, length: int) -> None:
        """Forget all positions from `length` on."""

class Program:
    """A list of operations over registers [tokens, width], recorded by the methods that are named like operations.

    Each of them returns the register of its result. With `exact` the inputs of layers stay in float32; else they are rounded
    to int8 where the weights are integers.
    """

    def __init__(self, exact: bool) -> None: ...
    def input(self, width: int) -> int: ...
    def embed(self, table: Linear, multiplier: float) -> int: ...
    def rms_norm(self, x: int, weight: NDArray[np.float32], eps: float) -> int: ...
    def layer_norm(self, x: int, weight: NDArray[np.float32], bias: NDArray[np.float32], eps: float) -> int: ...
    def add_positions(self, x: int, table: NDArray[np.float32]) -> int: ...
    def linear(self, x: int, layer: Linear) -> int: ...
    def rope_and_append(self, q: int, k: int, v: int, frequencies: NDArray[np.float32], block: int) -> int: ...
    def attention(self, q: int, head_size: int, block: int, scale: float, window: int) -> int: ...
    def gelu(self, x: int) -> int: ...
    def swiglu(self, gate: int, up: int) -> int: ...
    def add_scaled(self, x: int, y: int, scale: float) -> int: ...
    def divide(self, x: int, divisor: float) -> int: ...
    def finish(self, result: int) -> None:
        """End the recording; `result` is the register that `run` returns."""

    def width(self, x: int) -> int:
        """The width of a register."""

    def run(
        self,
        ids: NDArray[np.int64] | None,
        inputs: Sequence[NDArray[np.float32]],
        cache: Cache | None,
        out: NDArray[np.float32],
    ) -> None:
        """Run it on ids [rows, count] or inputs [rows, count, width], and write the result to `out` [rows, count, width].

        Releases the GIL. Several threads may run one program at once, each with a cache of its own. Raises ValueError for an
        id outside the table, too.
        """

# -- threads (csrc/bind/module.cpp)

def threads() -> int:
    """The number of threads in use."""

def set_threads(threads: int) -> None:
    """Change the number of threads; raises ValueError unless it is 1 to 1024."""

def set_alone(wanted: bool) -> None:
    """Whether kernels that the calling thread runs use this thread only, and leave the others to other callers."""

def default_threads() -> int:
    """MPO_THREADS, or the number of cores that this process may run on."""

def read_bandwidth(data: NDArray[np.uint64], evict: bool = False) -> float:
    """Bytes per second of reading `data` once, in order, with all threads; releases the GIL.

    With `evict`, the CPU's caches are first rid of it, where the CPU has an instruction for that.
    """

# -- instruction sets (csrc/bind/module.cpp)

def active_isa() -> str:
    """The instruction set in use: the best of this CPU, or the one that MPO_ISA or set_isa() chose.

    Raises ValueError where MPO_ISA names one that this CPU or build does not have.
    """

def set_isa(name: str) -> bool:
    """Choose an instruction set, `auto` for the best; False, and no change, where this CPU or build does not have it."""

def supported_isas() -> list[str]:
    """The instruction sets of this CPU and build, best first; the last one is `generic`."""

# -- rounding to integers, for the exporter (csrc/bind/fit.cpp); all release the GIL and use all threads

# bits, group, zeros
Grid = tuple[int, int, bool]

def fit_nearest(
    matrix: NDArray[np.float32],
    weight: NDArray[np.float32],
    grid: Grid,
    factors: Sequence[float],
    turns: int,
    codes: NDArray[np.uint8],
    scale: NDArray[np.uint16],
    zero: NDArray[np.uint16],
) -> None:
    """Round a matrix [rows, columns] to nearest, for the least error weighted by `weight` [columns].

    A group's range times each of `factors` is tried, then `turns` times the least squares for its codes. Writes codes
    [rows, columns], scale and zero [rows, groups] as float16 bits.
    """

def fit_compensated(
    matrix: NDArray[np.float32],
    order: NDArray[np.int64],
    hessian: NDArray[np.float32],
    feedback: NDArray[np.float32],
    weight: NDArray[np.float32],
    grid: Grid,
    factors: Sequence[float],
    turns: int,
    passes: int,
    tolerance: float,
    codes: NDArray[np.uint8],
    scale: NDArray[np.uint16],
    zero: NDArray[np.uint16],
) -> None:
    """Error-compensated rounding, then at most `passes` of descent, until a pass lowers the error by less than `tolerance`.

    `order` [columns] lists the columns in processing order, groups together; `hessian` and `feedback` [columns, columns] and
    `weight` [columns] are in that order (`Hessian` in mpo_exporter.calibrate.hessian).
    """

def fit_errors(
    matrix: NDArray[np.float32],
    weight: NDArray[np.float32],
    grids: Sequence[Grid],
    factors: Sequence[float],
    turns: int,
    out: NDArray[np.float32],
) -> None:
    """Write the weighted squared error of each row on each grid to `out` [grids, rows]."""

def fit_residual(
    matrix: NDArray[np.float32],
    weight: NDArray[np.float32],
    grid: Grid,
    factors: Sequence[float],
    turns: int,
    out: NDArray[np.float32],
) -> None:
    """Write what rounding to nearest leaves of the matrix to `out` [rows, columns]."""

def cells(
    latent: NDArray[np.float32],
    scale: NDArray[np.float32],
    zero: NDArray[np.float32],
    top: int,
    out: NDArray[np.float32] | NDArray[np.uint16],
) -> None:
    """Write scale · (q − zero) to `out` [rows, columns], float32 or bf16 bits, q the integers 0 … top nearest to `latent`.

    `latent` [rows, columns]; `scale` and `zero` [rows, groups].
    """

def cell_gradients(
    latent: NDArray[np.float32],
    scale: NDArray[np.float32],
    zero: NDArray[np.float32],
    top: int,
    gradient: NDArray[np.float32] | NDArray[np.uint16],
    by_latent: NDArray[np.float32],
    by_scale: NDArray[np.float32],
    by_zero: NDArray[np.float32],
) -> None:
    """Write the gradients of what `cells` takes, from that of its matrix; straight through the rounding inside of the range."""

def has_bf16_products() -> bool:
    """Whether the vectors of the instruction set in use multiply bf16 (AVX-512 BF16)."""

def bf16_product(
    left: NDArray[np.float32],
    left_turned: bool,
    right: NDArray[np.float32],
    right_turned: bool,
    out: NDArray[np.float32],
    add: bool = False,
    upper: bool = False,
) -> None:
    """Write (or `add`) left · rightᵀ to `out`, factors rounded to bf16 and sums in float32.

    A matrix that is `turned` takes part as its transpose. With `upper`, entries below the diagonal may be left as they are.
    """

# -- single kernels, for tests (csrc/bind/dequantize.cpp, csrc/bind/kernels.cpp)

def dequantize(
    planes: Sequence[NDArray[np.uint8]],
    bits: int,
    scale: NDArray[np.uint16],
    zero: NDArray[np.uint16] | None,
    out: NDArray[np.float32],
    isa: str = ...,
) -> None:
    """Write scale · (code - zero) of the planes [rows, groups, bytes] to `out` [rows, groups · group].

    `scale` and `zero` [rows, groups] are float16 bits. `isa` is one of supported_isas(); "" is the one in use.
    """

class QuantizedMatrix:
    """An integer matrix as the kernels take it; see quantized_matrix."""

    rows: int
    columns: int

class DenseMatrix:
    """A float matrix as the kernels take it; see dense_matrix."""

    rows: int

class Activations:
    """Rows of x rounded to int8 for the instruction set that was active at the time."""

def quantized_matrix(
    bits: int, rows: int, columns: int, group: int, low: Bytes, high: Bytes | None, scale: Bytes, zero: Bytes | None
) -> QuantizedMatrix: ...
def dense_matrix(type: str, rows: int, columns: int, data: Bytes) -> DenseMatrix: ...
def quantize_activations(x: NDArray[np.float32]) -> Activations: ...
def multiply(
    w: QuantizedMatrix, x: Activations, y: NDArray[np.float32], begin: int, end: int, accumulate: bool = ...
) -> None:
    """Write (or add) W x for the rows [begin, end) of W to y [batch, rows]; so do the next two."""

def multiply_exact(
    w: QuantizedMatrix, x: NDArray[np.float32], y: NDArray[np.float32], begin: int, end: int, accumulate: bool = ...
) -> None: ...
def multiply_dense(
    w: DenseMatrix, x: NDArray[np.float32], y: NDArray[np.float32], begin: int, end: int, accumulate: bool = ...
) -> None: ...
def add_transposed(w: QuantizedMatrix, s: NDArray[np.float32], y: NDArray[np.float32], begin: int, end: int) -> None:
    """Add Wᵀ s for the columns [begin, end) of W to y [batch, columns]; so does the next one."""

def add_transposed_dense(
    w: DenseMatrix, s: NDArray[np.float32], y: NDArray[np.float32], begin: int, end: int
) -> None: ...
