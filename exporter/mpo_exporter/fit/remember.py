"""What was computed of an array, remembered as long as the array lives: layers with one input share their moment."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from numpy.typing import NDArray

Value = TypeVar("Value")


class Remembered(Generic[Value]):
    """Values computed of square arrays, one for each array and key; an array is not to be changed where it lies.

    Of each array only the value asked for last is kept, which bounds the memory; changes of its diagonal are noticed.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Hashable, Value]] = {}

    def get(self, array: NDArray[Any], key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of that key, made where it is not the one that was kept."""
        full = (array.shape, array.diagonal().tobytes(), key)
        place = id(array)
        kept = self._kept.get(place)
        if kept is not None and kept[0] == full:
            return kept[1]
        self._kept.pop(place, None)  # before the new one takes its memory
        value = make()
        if kept is None:
            weakref.finalize(array, self._kept.pop, place, None)
        self._kept[place] = full, value
        return value
