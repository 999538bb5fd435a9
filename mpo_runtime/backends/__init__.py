"""Backends: complete implementations of the op set, and which of them to take."""

from __future__ import annotations

from typing import Literal

from mpo_formats import ConfigError

BACKENDS = ("auto", "native", "reference")
ACTIVATIONS = ("int8", "float")


def choose_backend(backend: str, device: str) -> Literal["native", "reference"]:
    """The backend that a name and a device ask for; `auto` is native on a CPU where its kernels were built.

    Raises:
        ConfigError: for another name, or for native kernels that were not built or cannot run on the device.
    """
    from mpo_runtime import native

    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend}: expected one of {', '.join(BACKENDS)}")
    if backend == "native":
        if device != "cpu":
            raise ConfigError(f"backend native: runs on the CPU, not on {device}; leave --backend out")
        if not native.available():
            raise ConfigError(
                "backend native: its kernels were not built; install a C++ compiler and mpo-runtime again"
            )
    if backend == "auto":
        return "native" if device == "cpu" and native.available() else "reference"
    return "native" if backend == "native" else "reference"


def check_activations(activations: str) -> None:
    """Raises ConfigError for a kind of activations that no backend has."""
    if activations not in ACTIVATIONS:
        raise ConfigError(f"activations {activations}: expected one of {', '.join(ACTIVATIONS)}")
