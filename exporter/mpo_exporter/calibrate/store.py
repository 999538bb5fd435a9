"""Where long work keeps what it has: in memory, or on disk, where a later run finds it again and goes on."""

from __future__ import annotations

import json
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpo_formats import ConfigError

Arrays = dict[str, NDArray[Any]]


class PartMissing(ConfigError):
    """A part that a run before must have kept is not there, or damaged: the work begins again."""


class Store(Protocol):
    """Keeps arrays by name; `work.py: Work` is one on disk, which a later run finds again."""

    def read(self, name: str) -> Arrays | None:
        """The arrays of that name, or None."""
        ...

    def write(self, name: str, arrays: Arrays) -> None:
        """Keeps arrays under that name, in the place of those before."""
        ...

    def forget(self, name: str) -> None:
        """Drops the arrays of that name, if there are any."""
        ...

    def scope(self, prefix: str, digest: str) -> None:
        """Drops what was kept under names that begin with `prefix`, unless that was under the same digest."""
        ...


class Memory:
    """A store in memory."""

    def __init__(self) -> None:
        self.held: dict[str, Arrays] = {}

    def read(self, name: str) -> Arrays | None:
        """The arrays of that name, or None."""
        return self.held.get(name)

    def write(self, name: str, arrays: Arrays) -> None:
        """Keeps arrays under that name."""
        self.held[name] = arrays

    def forget(self, name: str) -> None:
        """Drops the arrays of that name."""
        self.held.pop(name, None)

    def scope(self, prefix: str, digest: str) -> None:
        """Drops what was kept under names that begin with `prefix`."""
        self.held = {name: arrays for name, arrays in self.held.items() if not name.startswith(prefix)}


def json_array(content: Any) -> NDArray[np.uint8]:
    """Plain data as an array of bytes."""
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


def array_json(array: NDArray[np.uint8]) -> Any:
    """The plain data that `json_array` was given."""
    return json.loads(array.tobytes())
