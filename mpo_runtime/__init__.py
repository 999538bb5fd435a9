"""mpo-runtime: loads `.mpo` files (MPO cores plus low-bit weights) and generates text.

    import mpo_runtime
    with mpo_runtime.load("granite.mpo") as model:
        for piece in model.chat([{"role": "user", "content": "Hello"}]):
            print(piece.text, end="", flush=True)

Importing this package is cheap: a name's module is imported when the name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpo_formats.errors import CheckpointError, ConfigError, FormatError, MpoError, OutputError, PlanError
    from mpo_runtime.loading import load
    from mpo_runtime.model import Model, Piece, Score
    from mpo_runtime.sampler import SamplingOptions

__version__ = "0.1.0"

# The module of each public name.
_HOMES = {
    "load": "mpo_runtime.loading",
    **dict.fromkeys(("Model", "Piece", "Score"), "mpo_runtime.model"),
    "SamplingOptions": "mpo_runtime.sampler",
    **dict.fromkeys(
        ("CheckpointError", "ConfigError", "FormatError", "MpoError", "OutputError", "PlanError"), "mpo_formats.errors"
    ),
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "FormatError",
    "Model",
    "MpoError",
    "OutputError",
    "Piece",
    "PlanError",
    "SamplingOptions",
    "Score",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mpo_runtime' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
