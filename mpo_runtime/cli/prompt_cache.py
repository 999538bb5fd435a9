"""--prompt-cache: the KV cache of the last text in a file, from one run of the program to the next."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpo_formats.errors import ConfigError
from mpo_formats.layout import FILE, content_tensors
from mpo_runtime import native
from mpo_runtime.engine import Scheduler
from mpo_runtime.model import Model

# Bytes of each tensor's beginning, middle and end that stand for it in a model's checksum.
SAMPLE = 1 << 14


@contextmanager
def kept_prompt(model: Model, options: Mapping[str, Any], path: Path | None) -> Iterator[None]:
    """Restores the KV cache of a file before, and writes that of the last text after; errors are notes, the texts go on.

    Args:
        options: with which the model was loaded.
        path: None does nothing.

    Raises:
        ConfigError: for a model that ONNX Runtime runs.
    """
    if path is None:
        yield
        return
    if not isinstance(model.engine, Scheduler):
        raise ConfigError("--prompt-cache: not with ONNX Runtime; load the .mpo file")
    settings = cache_settings(model, options)
    if path.exists():
        try:
            model.engine.restore_prefix(path, settings)
        except ConfigError as error:
            print(f"note: {error}; the prompt is run in full", file=sys.stderr)
    try:
        yield
    finally:
        try:
            model.engine.save_prefix(path, settings)
        except ConfigError as error:
            print(f"note: {error}", file=sys.stderr)


def cache_settings(model: Model, options: Mapping[str, Any]) -> dict[str, str]:
    """What the content of a KV cache depends on besides the tokens."""
    ops = model.network.ops
    return {
        "model": checksum(model),
        "backend": ops.name,
        "kernels": native.active().get("isa", "") if ops.name == "native" else "",
        "kv_type": str(vars(ops)["kv_type"]),
        "activations": str(options.get("activations", "")) if ops.name == "native" else "",
        "chi": str(options.get("chi")),
    }


def checksum(model: Model) -> str:
    """The SHA-256 of a model's description and of samples of all its tensors."""
    weights = model.weights
    digest = hashlib.sha256(repr(weights.spec.architecture).encode())
    for tensor in content_tensors(weights.spec):
        if tensor.name.startswith(FILE):
            continue
        content = weights.array(tensor.name).reshape(-1).view("u1")
        digest.update(f"{tensor.name} {tensor.dtype} {content.size}".encode())
        for start in (0, max(content.size // 2 - SAMPLE // 2, 0), max(content.size - SAMPLE, 0)):
            digest.update(content[start : start + SAMPLE].tobytes())
    return digest.hexdigest()
