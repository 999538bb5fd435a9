"""The kernels that work on numpy memory: native code where it was built, numpy where it was not.

The choice is made once, at import. Both compute in float32 in the same order, so their results are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mpo_formats.errors import ConfigError
from mpo_formats.layout import PLANES
from mpo_formats.packing import implicit_zero, unpack
from mpo_formats.spec import GROUPS

try:
    import mpo_runtime._native as _native
except ImportError as error:  # built without a compiler, or for another Python or CPU
    _HAS_NATIVE = False
    _WHY_NOT_NATIVE = str(error)
else:
    _HAS_NATIVE = True
    _WHY_NOT_NATIVE = ""

# The numpy path works through about this many weights at a time, so that its temporaries stay in the cache.
_CHUNK_ELEMENTS: Final = 1 << 18


def native_available() -> bool:
    """Say whether the native kernels were built and load."""
    return _HAS_NATIVE


def active() -> dict[str, str]:
    """Name the implementation behind each kernel, for `mpo-run info` and the benchmarks."""
    if _HAS_NATIVE:
        threads = str(_native.threads())
        return {"native": instruction_set(), "threads": threads, "dequantize": f"native ({_native.isa()})"}
    return {"native": f"absent: {_WHY_NOT_NATIVE}", "dequantize": "numpy"}


def instruction_set() -> str:
    """Name the instruction set of the native kernels; raise ConfigError where MPO_ISA asks for one that is not here."""
    try:
        return _native.active_isa()
    except ValueError as error:
        raise ConfigError(str(error)) from None


def set_threads(threads: int | None) -> None:
    """Set the number of threads of the native kernels; None leaves what it is, at first all cores."""
    if _HAS_NATIVE and threads is not None:
        _native.set_threads(threads)


def read_bandwidth(data: NDArray[np.uint64], threads: int) -> float:
    """Measure GB/s of reading `data` once, in order, with `threads` threads: the ceiling of every kernel.

    Raises RuntimeError where no native kernels were built.
    """
    if not _HAS_NATIVE:
        raise RuntimeError(f"read_bandwidth: needs the native kernels ({_WHY_NOT_NATIVE})")
    _native.set_threads(threads)
    return _native.read_bandwidth(data) / 1e9


def dequantize(
    planes: Sequence[NDArray[np.uint8]],
    bits: int,
    scale: NDArray[np.float16],
    zero: NDArray[np.float16] | None = None,
) -> NDArray[np.float32]:
    """Return the weights ``scale * (level - zero)`` [rows, groups * group] of a group-wise quantised matrix.

    ``planes`` are bit planes [rows, groups, bytes], the low one first (6 bits = 4 + 2, 5 = 4 + 1, 3 = 2 + 1); in a
    plane of p bits element j of its group sits in byte ``j * p // 8`` at bit ``j * p % 8``. ``scale`` and ``zero`` are
    [rows, groups]; without ``zero`` it is ``implicit_zero(bits)``. Raises ValueError on anything that does not fit together.
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
    """Do what `dequantize` does in numpy alone: the slow twin, and the path where nothing native was built."""
    group = _checked_group(planes, bits, scale, zero)
    rows, groups = scale.shape
    out = np.empty((rows, groups, group), dtype=np.float32)
    step = max(1, _CHUNK_ELEMENTS // max(1, groups * group))
    for start in range(0, rows if groups else 0, step):
        part = slice(start, start + step)
        levels = unpack([plane[part] for plane in planes], bits).reshape(-1, groups, group)
        offset = np.float32(implicit_zero(bits)) if zero is None else zero[part, :, None].astype(np.float32)
        np.subtract(levels, offset, out=out[part], dtype=np.float32)
        out[part] *= scale[part, :, None].astype(np.float32)
    return out.reshape(rows, groups * group)


def _checked_group(
    planes: Sequence[NDArray[np.uint8]], bits: int, scale: NDArray[np.float16], zero: NDArray[np.float16] | None
) -> int:
    """Return the group size that the planes imply; raise ValueError where dtypes or shapes do not fit together."""
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
