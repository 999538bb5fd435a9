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
