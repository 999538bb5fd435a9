"""How much each layer matters: the quality lost when that layer alone is compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mpo_exporter.fit import shapes
from mpo_exporter.fit.layer import widen
from mpo_exporter.fit.svd import contract, sequential_svd
from mpo_exporter.source import require_finite_weights
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.layers.linear import Linear, MatrixTerm
from mpo_runtime.measure import Comparison, compare, window_logits
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint

Matrix = NDArray[np.float64]
# (layer name, matrix [out, in]) to the matrix that its compression would give.
Compress = Callable[[str, Matrix], Matrix]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """What happens when one layer alone is compressed.

    `kl_mean` is KL(dense ‖ compressed) in nats a token, `perplexity_increase` the relative change of perplexity,
    `error` the relative Frobenius error of the matrix.
    """

    layer: str
    kl_mean: float
    perplexity_increase: float
    same_top1: float
    error: float


def tensorized(chi: int, cores: int = 2) -> Compress:
    """Compression by the published method: cores of a balanced shape and bond dimension χ by sequential SVD."""

    def compress(name: str, matrix: Matrix) -> Matrix:
        out_dims, in_dims = shapes.balanced_shape(matrix.shape[0], matrix.shape[1], cores)
        return contract(sequential_svd(matrix, out_dims, in_dims, chi).cores)

    return compress


def profile_layers(
    folder: Path,
    text: TokenText,
    compress: Compress,
    *,
    layers: list[str] | None = None,
    progress: Progress | None = None,
) -> list[LayerSensitivity]:
    """Compresses one layer after the other, alone, and compares the model's logits with the dense model's.

    Args:
        folder: the dense model, a Hugging Face folder.
        text: held-out text.
        layers: names of the layers; every attention and MLP matrix where None.

    Returns:
        One entry a layer, the least sensitive (smallest mean KL) first.

    Raises:
        CheckpointError: for a layer with values that are not finite.
        ConfigError: for a text that is too short.
    """
    source = Checkpoint(folder)
    try:
        require_finite_weights(source, folder.name)
        ops = ReferenceOps(source)
        model = decoder_for(source.architecture, ops)
        dense: dict[bytes, NDArray[np.float32]] = {}

        def dense_logits(window: NDArray[np.int64]) -> NDArray[np.float32]:
            return dense[window.tobytes()]

        names = [linear.name for linear in source.spec.linears if linear.name not in (EMBEDDING, HEAD)]
        names = names if layers is None else layers
        compare(model, remembering(model, dense), text.ids)
        found = []
        for index, name in enumerate(names):
            weight = f"{name}.0.weight"
            matrix = widen(source.array(weight), source.dtype(weight))
            approximation = compress(name, matrix)
            with replaced(ops, name, approximation):
                result = compare(model, dense_logits, text.ids)
            found.append(entry(name, result, matrix, approximation))
            if progress:
                progress("profiling", index + 1, len(names))
        return sorted(found, key=lambda item: (item.kl_mean, item.layer))
    finally:
        source.close()


def remembering(
    model: Decoder, kept: dict[bytes, NDArray[np.float32]]
) -> Callable[[NDArray[np.int64]], NDArray[np.float32]]:
    """Gives a window's logits and keeps them in `kept`."""

    def logits(window: NDArray[np.int64]) -> NDArray[np.float32]:
        kept[window.tobytes()] = window_logits(model, window)
        return kept[window.tobytes()]

    return logits


@contextmanager
def replaced(ops: ReferenceOps, name: str, matrix: Matrix) -> Iterator[None]:
    """Puts another matrix in a layer's place for a while."""
    original = ops.linears[name]
    weight = torch.from_numpy(matrix.astype(np.float32)).to(ops.device)
    term = MatrixTerm(weight, lambda: weight, lambda ids: weight[ids])
    ops.linears[name] = Linear(original.spec, [term], original.bias)
    try:
        yield
    finally:
        ops.linears[name] = original


def entry(name: str, result: Comparison, matrix: Matrix, approximation: Matrix) -> LayerSensitivity:
    """The figures of one layer."""
    return LayerSensitivity(
        layer=name,
        kl_mean=result.kl_mean,
        perplexity_increase=result.model.perplexity / result.reference.perplexity - 1,
        same_top1=result.same_top1,
        error=float(np.linalg.norm(matrix - approximation)) / max(float(np.linalg.norm(matrix)), 1e-300),
    )
