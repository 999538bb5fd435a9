"""The native kernels as other packages may use them: what was built, its threads, its speed, and dequantisation.

Where no kernels were built, `dequantize` runs in numpy and what needs them raises. The choice is made once, at import. Both
ways compute in float32 in the same order, so their results are equal bit for bit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from mpo_formats.errors import ConfigError
from mpo_formats.layout import PLANES
from mpo_formats.packing import implicit_zero, unpack
from mpo_formats.spec import GROUPS
from mpo_runtime.machine import usable_cpus

if TYPE_CHECKING:
    from mpo_runtime._native import Linear

try:
    import mpo_runtime._native as _native
except ImportError as error:  # built without a compiler, or for another Python or CPU
    _HAS_NATIVE = False
    _WHY_NOT_NATIVE = str(error)
else:
    _HAS_NATIVE = True
    _WHY_NOT_NATIVE = ""
    # The kernels count cores and read MPO_THREADS; the quota of a container they do not know.
    if not os.environ.get("MPO_THREADS") and usable_cpus() < _native.default_threads():
        _native.set_threads(usable_cpus())

# The numpy path dequantises about this many weights at a time, so that its temporaries stay in the cache.
_CHUNK_ELEMENTS: Final = 1 << 18


def available() -> bool:
    """Whether the native kernels were built and can be loaded."""
    return _HAS_NATIVE


def active() -> dict[str, str]:
    """The implementation behind each kernel by name, for `mpo-run info` and the benchmarks."""
    if _HAS_NATIVE:
        threads = str(_native.threads())
        return {"native": instruction_set(), "threads": threads, "dequantize": f"native ({_native.active_isa()})"}
    return {"native": f"absent: {_WHY_NOT_NATIVE}", "dequantize": "numpy"}


def instruction_set() -> str:
    """The instruction set that the native kernels use.

    Raises:
        ConfigError: when the environment variable MPO_ISA names one that this CPU or this build does not have.
    """
    try:
        return _native.active_isa()
    except ValueError as error:
        raise ConfigError(str(error)) from None


def set_threads(threads: int | None) -> None:
    """Sets the number of threads of the native kernels; None keeps the present number: at first all usable cores."""
    if _HAS_NATIVE and threads is not None:
        _native.set_threads(threads)


def run_alone() -> None:
    """From now on the kernels that the calling thread runs use this thread only: for threads that share the work already."""
    if _HAS_NATIVE:
        _native.set_alone(True)


def read_bandwidth(data: NDArray[np.uint64], threads: int | None, *, evict: bool = False) -> float:
    """GB/s of reading `data` once, in order, with `threads` threads (None: as many as are set): no kernel can be faster.

    With `evict`, what the CPU's caches hold of it is dropped first.

    Raises:
        RuntimeError: where no native kernels were built.
    """
    if not _HAS_NATIVE:
        raise RuntimeError(f"read_bandwidth: needs the native kernels ({_WHY_NOT_NATIVE})")
    set_threads(threads)
    return _native.read_bandwidth(data, evict) / 1e9


def timed_pass(layers: Sequence[Linear], *, tokens: int = 1, exact: bool = False) -> Callable[[], float]:
    """Prepares one pass of the same random inputs through each of several layers; every call runs it and times it.

    Several copies of one layer, together larger than the caches, are read from memory as in a whole model.

    Args:
        layers: of equal sizes, from `mpo_runtime.layers.native.load_linear`.
        tokens: rows that each layer is applied to at once.
        exact: keeps the inputs in float32, else they are rounded to int8 where a layer's weights are integers.

    Returns:
        A function that runs the pass and returns its seconds.

    Raises:
        RuntimeError: where no native kernels were built.
    """
    if not _HAS_NATIVE:
        raise RuntimeError(f"timed_pass: needs the native kernels ({_WHY_NOT_NATIVE})")
    rows, columns = layers[0].rows, layers[0].columns
    program = _native.Program(exact)
    x = program.input(columns)
    result = x
    for layer in layers:
        result = program.linear(x, layer)
    program.finish(result)
    given = np.random.default_rng(1).standard_normal((1, tokens, columns)).astype(np.float32)
    out = np.empty((1, tokens, rows), np.float32)

    def run() -> float:
        start = time.perf_counter()
        program.run(None, [given], None, out)
        return time.perf_counter() - start

    return run


def dequantize(
    planes: Sequence[NDArray[np.uint8]],
    bits: int,
    scale: NDArray[np.float16],
    zero: NDArray[np.float16] | None = None,
) -> NDArray[np.float32]:
    """The weights scale · (code − zero) [rows, groups · group] of a group-wise quantised matrix, in float32.

    Args:
        planes: bit planes [rows, groups, bytes], the low one first (6 bits = 4 + 2, 5 = 4 + 1, 3 = 2 + 1). In a plane of p
            bits, element j of its group lies in byte ⌊j·p/8⌋ from bit (j·p) mod 8 upwards.
        scale: [rows, groups].
        zero: [rows, groups]; None stands for `implicit_zero(bits)` throughout.

    Raises:
        ValueError: for an unknown width, or element types or shapes that do not fit together.
    """
    group = _checked_group(planes, bits, scale, zero)
    rows, groups = scale.shape
    if not _HAS_NATIVE:
        return dequantize_numpy(planes, bits, scale, zero)
    out = np.empty((rows, groups * group), dtype=np.float32)
    _native.dequantize(
        [np.ascontiguousarray(plane) for plane in planes],
        bits,
        np.ascontiguousarray(scale).view(np.uint16),
        None if zero is None else np.ascontiguousarray(zero).view(np.uint16),
        out,
    )
    return out


def dequantize_numpy(
    planes: Sequence[NDArray[np.uint8]],
    bits: int,
    scale: NDArray[np.float16],
    zero: NDArray[np.float16] | None = None,
) -> NDArray[np.float32]:
    """The same as `dequantize`, in numpy alone: the reference for tests, and the path where no kernels were built."""
    group = _checked_group(planes, bits, scale, zero)
    rows, groups = scale.shape
    out = np.empty((rows, groups, group), dtype=np.float32)
    step = max(1, _CHUNK_ELEMENTS // max(1, groups * group))
    for start in range(0, rows if groups else 0, step):
        part = slice(start, start + step)
        codes = unpack([plane[part] for plane in planes], bits).reshape(-1, groups, group)
        offset = np.float32(implicit_zero(bits)) if zero is None else zero[part, :, None].astype(np.float32)
        np.subtract(codes, offset, out=out[part], dtype=np.float32)
        out[part] *= scale[part, :, None].astype(np.float32)
    return out.reshape(rows, groups * group)


def _checked_group(
    planes: Sequence[NDArray[np.uint8]], bits: int, scale: NDArray[np.float16], zero: NDArray[np.float16] | None
) -> int:
    """The group size that the planes imply; raises ValueError where element types or shapes do not fit together."""
    widths = PLANES.get(bits)
    if widths is None:
        raise ValueError(f"dequantize: bits is {bits}, expected one of {', '.join(map(str, PLANES))}")
    if len(planes) != len(widths):
        raise ValueError(f"dequantize: {bits} bits are {len(widths)} plane(s), got {len(planes)}")
    if planes[0].ndim != 3:
        raise ValueError(f"dequantize: plane 0 has shape {planes[0].shape}, expected [rows, groups, bytes]")
    rows, groups, low_bytes = planes[0].shape
    group = int(low_bytes) * 8 // widths[0]
    if group not in GROUPS:
        raise ValueError(f"dequantize: plane 0 holds groups of {group} elements, expected one of {GROUPS}")
    expected: list[tuple[str, NDArray[np.uint8] | NDArray[np.float16], type[np.generic], tuple[int, ...]]] = [
        (f"plane {index}", plane, np.uint8, (rows, groups, group * width // 8))
        for index, (plane, width) in enumerate(zip(planes, widths, strict=True))
    ]
    expected.append(("scale", scale, np.float16, (rows, groups)))
    if zero is not None:
        expected.append(("zero", zero, np.float16, (rows, groups)))
    for name, array, dtype, shape in expected:
        if array.dtype != dtype or array.shape != shape:
            found = f"{array.dtype} {list(array.shape)}"
            raise ValueError(f"dequantize: {name} is {found}, expected {dtype.__name__} {list(shape)}")
    return group
