"""Files with every kind of term for the tests of the ONNX export, and plain ways to run what it writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_exporter.export import ExportTask, export
from mpo_exporter.fit.layer import Method
from mpo_exporter.fit.shapes import balanced_shape, low_rank_shape
from mpo_exporter.source import open_source
from mpo_exporter.terms import operator
from mpo_formats import Dense, LinearSpec, Quantized, Term
from mpo_runtime.onnx.export import OnnxRequest, export_onnx
from tests.helpers import forward, network
from tests.transform_cases import turned

NANO = Path(__file__).resolve().parents[2] / "exporter" / "mpo_exporter" / "data" / "granite-nano"
BF16: tuple[Term, ...] = (Dense("bf16"),)


def cores(layer: LinearSpec, chi: int, dtype: str, *, balanced: bool) -> Term:
    """Two cores for a layer."""
    size = layer.out_features, layer.in_features
    return operator(*(balanced_shape(*size, 2) if balanced else low_rank_shape(*size)), chi, dtype)


def beside(layer: LinearSpec) -> tuple[Term, ...]:
    """int3 with zeros, and int8 cores beside them in one block; the others int8 with zeros."""
    if ".layers.2." in layer.name:
        return Quantized(3, 32, True), cores(layer, 4, "int8", balanced=False)
    return (Quantized(8, 64, True),)


def alone(layer: LinearSpec) -> tuple[Term, ...]:
    """Cores in the place of a few matrices: of low rank, and balanced ones, in both orders of contraction."""
    if layer.name == "model.layers.1.self_attn.q_proj":
        return (cores(layer, 128, "f16", balanced=False),)
    if layer.name == "model.layers.1.self_attn.k_proj":
        return (cores(layer, 64, "f32", balanced=True),)
    if layer.name == "model.layers.1.self_attn.o_proj":
        return (cores(layer, 48, "int8", balanced=True),)
    return BF16


# The terms of granite-nano's layers by the name of a kind.
KINDS: dict[str, Any] = {
    "dense": lambda layer: BF16,
    "int4": lambda layer: (Quantized(4, 32, False),),
    "int3": lambda layer: (Quantized(3, 64, False),),
    "int2": lambda layer: (Quantized(2, 64, False),),
    "zeros": lambda layer: (Quantized(4, 64, True),),
    "hadamard": lambda layer: (Quantized(4, 64, False),),
    "transform": lambda layer: (Quantized(4, 64, False),),
    "beside": beside,
    "alone": alone,
}


def make(kind: str, target: Path) -> Path:
    """granite-nano with the terms of a kind, rounded to nearest: quick and coarse."""
    with open_source(NANO) as source:
        hadamard = 64 if kind == "hadamard" else 0
        layers, surveyed = source.weights.spec.linears, None
        if kind == "transform":
            layers, surveyed = turned(layers, 64)
        layers = tuple(dataclasses.replace(layer, terms=KINDS[kind](layer), hadamard=hadamard) for layer in layers)
        export(source, ExportTask(target, layers=layers, method=Method("nearest", "svd"), surveyed=surveyed))
    return target


def folder_of(source: Path, target: Path, **options: Any) -> Path:
    """The folder that export-onnx writes for a source; exact unless `level` says otherwise."""
    export_onnx(OnnxRequest(source, target, **{"level": 0, **options}))
    return target


def reference(source: Path, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """The reference backend's logits [B, S, vocabulary]."""
    return forward(network(source), rows)


class Plain:
    """A graph run as any program would: all inputs as arrays, all outputs back, past and present apart."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.cache: dict[str, NDArray[Any]] = {}

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [B, S, vocabulary] for new tokens [B, S] and the mask [B, total] of all columns of the cache."""
        feeds: dict[str, NDArray[Any]] = {"input_ids": ids, "attention_mask": mask}
        for value in self.session.get_inputs()[2:]:
            dtype = np.float16 if "float16" in value.type else np.float32
            empty = np.zeros((ids.shape[0], value.shape[1], 0, value.shape[3]), dtype)
            feeds[value.name] = self.cache.get(value.name, empty)
        found = self.session.run(None, feeds)
        names = [value.name.replace("present", "past_key_values") for value in self.session.get_outputs()[1:]]
        self.cache = dict(zip(names, found[1:], strict=True))
        return np.asarray(found[0], np.float32)
