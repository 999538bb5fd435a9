"""Layers with random tensors in every form, as vLLM's classes load them, and vLLM itself in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpo_formats import Dense, LinearSpec, Mpo, Quantized, Term, Transform
from mpo_formats.architecture import EMBEDDING
from mpo_formats.layout import linear_tensors, transform_tensors
from mpo_runtime.layers.linear import load_linear
from mpo_runtime.weights.vllm_folder import flat_name
from mpo_vllm.split import Layer
from tests.formats.tiny import values

# Runs on any machine: vLLM's processes keep off each other's cores, and nothing is compiled before the first token.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}
BLOCK = "model.layers.0"
QUERY, KEY, VALUE = (f"{BLOCK}.self_attn.{part}_proj" for part in "qkv")
GATE, UP, DOWN = (f"{BLOCK}.mlp.{part}_proj" for part in ("gate", "up", "down"))
# Cores beside integers and instead of them, integer cores, dense matrices: partners that vLLM runs as one differ in all of it.
TERMS: dict[str, tuple[Term, ...]] = {
    QUERY: (Quantized(4, 32, False), Mpo((8, 8), (8, 8), (4,), "f16", 0)),
    KEY: (Quantized(3, 16, True),),
    VALUE: (Mpo((32, 1), (1, 64), (6,), "bf16", 0),),
    GATE: (Quantized(2, 16, False),),
    UP: (Mpo((8, 12), (8, 8), (6,), "int8", 32),),
    DOWN: (Quantized(5, 16, False), Mpo((8, 8), (12, 8), (3,), "int4", 16)),
    EMBEDDING: (Quantized(8, 32, False),),
}
SIZES = {
    QUERY: (64, 64),
    KEY: (32, 64),
    VALUE: (32, 64),
    GATE: (96, 64),
    UP: (96, 64),
    DOWN: (64, 96),
    EMBEDDING: (100, 64),
}
# Blocks of the Hadamard transforms of inputs, and stored transforms; the layers that are not named take none.
TRANSFORMS = {QUERY: 32, UP: 16, EMBEDDING: 32}
STORED = {
    KEY: Transform(KEY, 64, 1, Quantized(4, 64, False)),
    VALUE: Transform(VALUE, 16, 4, Dense("f16")),
    DOWN: Transform(DOWN, 16, 1, Quantized(8, 16, False)),
}


def layers(transformed: bool = False) -> dict[str, Layer]:
    """Random layers of TERMS by name, without transforms or with TRANSFORMS."""
    found = {}
    for name, terms in TERMS.items():
        spec = LinearSpec(name, *SIZES[name], None, terms)
        if transformed:
            spec = replace(spec, hadamard=TRANSFORMS.get(name, 0), transform=STORED.get(name))
        tensors = [*(transform_tensors(spec.transform) if spec.transform else ()), *linear_tensors(spec)]
        found[name] = Layer(spec, {tensor.name: values(tensor, 5) for tensor in tensors})
    return found


def load(layer: Any, one: Layer, shard: Any = None) -> None:
    """Gives the tensors of a layer to vLLM's layer as its loader does."""
    for name, array in one.arrays.items():
        plain = torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array)
        tensor = plain.view(torch.bfloat16) if array.dtype == np.uint16 else plain
        parameter = getattr(layer, flat_name(one.spec.name, name).rpartition(".")[2])
        arguments = () if shard is None else (shard,)
        parameter.weight_loader(parameter, tensor, *arguments)


def reference(one: Layer) -> Tensor:
    """The matrix [out, in] of a layer by the reference backend."""
    return load_linear(one, one.spec, chi=None, held=False, device=torch.device("cpu")).weight()  # type: ignore[arg-type]


def close(found: Tensor, expected: Tensor) -> None:
    """Compares to a thousandth of the largest value."""
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def vllm(
    work: Path, folder: Path, prompts: list[list[int]], tokens: int, *, stock: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """What vLLM makes of a folder, in a process of its own.

    Args:
        work: a folder for the request and the answer.
        stock: vLLM loads no plugin, and the process fails where it has imported ours.
        options: `dtype` and `ranks`.
    """
    request, result = work / "request.json", work / "result.json"
    asked = {"folder": str(folder), "prompts": prompts, "tokens": tokens, "stock": stock, **options}
    request.write_text(json.dumps(asked))
    environment = os.environ | ENVIRONMENT | {"MPO_THREADS": "1"} | ({"VLLM_PLUGINS": ""} if stock else {})
    command = [sys.executable, Path(__file__).with_name("generate.py"), request, result]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(result.read_text())
    return found
