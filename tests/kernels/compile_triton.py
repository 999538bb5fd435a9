"""Compiles the Triton kernels for a GPU without having one: `python -m tests.kernels.compile_triton [CAPABILITY …]`.

Every launch of a few steps over small models is noted and compiled for each compute capability by Triton's own compiler and
ptxas, down to the machine code; nothing runs. Products of single matrices are compiled for as many columns as at 8B, whose
loops Triton pipelines, and attention for heads of 128 and 256. Prints the shared memory of each kernel, and fails where one
does not compile, needs more shared memory than the GPU gives a program, or multiplies codes with subnormal numbers taken for 0.
It must run with TRITON_INTERPRET=0, so the test starts it as a process of its own.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mpo_exporter.heal import fused
from mpo_exporter.quantize import columns
from mpo_formats import Dense, Mpo, Quantized, Term
from mpo_runtime.backends.ops import Span
from mpo_runtime.backends.triton import TritonOps, attention, elementwise, products
from mpo_runtime.models.registry import decoder_for
from tests.formats.tiny import arrays, model
from tests.runtime.native_cases import Held

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
KERNELS = {
    products: ("integer_products", "integer_rows", "integer_matrix"),
    elementwise: ("sum_parts", "rms_norm", "add_and_norm", "swiglu"),
    attention: ("rotate_and_append", "attention_part", "attention_join"),
}
OPTIONS = {"num_warps", "num_stages"}
# Bytes of shared memory that a program may have, by compute capability (CUDA C++ Programming Guide).
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
# Columns of the largest matrices of a model of 8B, and into how many shares they are cut.
COLUMNS, PARTS = 12800, 4
# Terms of layers: every number of bits, groups smaller and larger than a tile's columns, zeros or none, and mixtures.
STORED: tuple[tuple[Term, ...], ...] = (
    (Quantized(4, 64, False),),
    (Quantized(3, 32, True),),
    (Quantized(2, 128, False),),
    (Quantized(5, 16, False),),
    (Quantized(6, 64, True),),
    (Quantized(8, 256, False), Mpo((256, 1), (1, 256), (4,), "f16", 0)),
    (Dense("bf16"),),
)


class Launches:
    """Stands for a kernel: notes what it is launched with instead of running it."""

    def __init__(self, kernel: Any, noted: dict[Any, tuple[Any, ...]]) -> None:
        self.kernel, self.noted = kernel, noted

    def __getitem__(self, grid: Any) -> Any:
        return self.launch

    def launch(self, *arguments: Any, **named: Any) -> None:
        """Notes the types of arguments and the constants, once each."""
        options = {name: named.pop(name) for name in OPTIONS & set(named)}
        bound = inspect.signature(self.kernel.fn).bind(*arguments, **named).arguments
        signature, constants, attributes = {}, {}, {}
        for index, (parameter, value) in enumerate(zip(self.kernel.params, bound.values(), strict=True)):
            if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            is_tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = (
                TYPES[value.dtype] if is_tensor else "fp32" if isinstance(value, float) else "i32"
            )
            if (value.data_ptr() if is_tensor else value) % 16 == 0:
                attributes[index,] = [["tt.divisibility", 16]]
        key = (self.kernel.fn.__name__, *map(str, (signature, constants, options)))
        self.noted.setdefault(key, (self.kernel, signature, constants, attributes, options))


def steps(kv_type: str, exact: bool, terms: tuple[tuple[Term, ...], ...]) -> None:
    """A prompt, a step of one and of three texts of a model of four blocks of 256, with those terms in turn."""
    spec = model(
        {},
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_hidden_layers=1,
        vocab_size=512,
    )
    changed = []
    for index, linear in enumerate(spec.linears):
        low_rank = Mpo((linear.out_features, 1), (1, linear.in_features), (4,), "f16", 0)
        stored = terms[index % len(terms)]
        changed.append(replace(linear, terms=tuple(low_rank if isinstance(term, Mpo) else term for term in stored)))
    spec = replace(spec, linears=tuple(changed))
    ops = TritonOps(Held(spec, arrays(spec, 1)), device="cpu", kv_type=kv_type, exact=exact)
    network, pages = decoder_for(spec.architecture, ops), ops.new_pages(spec.architecture)
    pages.grow(4)
    for count in (70, 20):
        cache = ops.spans(pages, [Span([0, 1, 2], 0, count, False)])
        network.logits(network.forward(ops.ids([[1] * count]), cache))
    for texts in (1, 3, 20, 40):
        ops.next_logits(network.forward, network.logits, [1] * texts, pages, [Span([0], 5, 1, True)] * texts)


def noted_launches() -> list[tuple[Any, ...]]:
    """The launches of steps over every kind of stored layer and of KV cache."""
    noted: dict[Any, tuple[Any, ...]] = {}
    with ExitStack() as patched:
        for module, names in KERNELS.items():
            for name in names:
                patched.enter_context(mock.patch.object(module, name, Launches(getattr(module, name), noted)))
        for kv_type in ("f32", "f16", "bf16", "int8"):
            steps(kv_type, exact=False, terms=STORED[:1])
        for first in range(len(STORED)):
            steps("f16", exact=False, terms=STORED[first : first + 1])
        steps("f16", exact=True, terms=STORED)
    return list(noted.values())


def attention_launches() -> list[tuple[Any, ...]]:
    """The launches of a step's attention over every kind of KV cache, with large heads."""
    noted: dict[Any, tuple[Any, ...]] = {}
    kernels = ("rotate_and_append", "attention_part", "attention_join")
    with ExitStack() as patched:
        for module, names in KERNELS.items():
            for name in names:
                kept = noted if name in kernels else {}
                patched.enter_context(mock.patch.object(module, name, Launches(getattr(module, name), kept)))
        for size in (128, 256):
            sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 1}
            spec = model({}, **sizes, head_dim=size, num_hidden_layers=1, vocab_size=32)
            for kv_type, exact in (("f32", True), ("f16", True), ("f16", False), ("bf16", False), ("int8", False)):
                ops = TritonOps(Held(spec, arrays(spec, 1)), device="cpu", kv_type=kv_type, exact=exact)
                network, pages = decoder_for(spec.architecture, ops), ops.new_pages(spec.architecture)
                pages.grow(2)
                ops.next_logits(network.forward, network.logits, [1] * 4, pages, [Span([0], 5, 1, True)] * 4)
    return list(noted.values())


def healing_launches() -> list[tuple[Any, ...]]:
    """The launches of healing's kernels: latent numbers and codes, matrices in bf16 and float32."""
    noted: dict[Any, tuple[Any, ...]] = {}
    with ExitStack() as patched:
        for name in ("write_cells", "write_gradients"):
            patched.enter_context(mock.patch.object(fused, name, Launches(getattr(fused, name), noted)))
        for group in (16, 256):
            for codes in (torch.zeros(64, 256), torch.zeros(64, 256, dtype=torch.uint8)):
                for dtype in (torch.bfloat16, torch.float32):
                    patched.enter_context(mock.patch.object(fused, "product_dtype", lambda device, dtype=dtype: dtype))
                    scale = torch.ones(64, 256 // group, requires_grad=True)
                    matrix = fused.fused_cells(codes, scale, torch.zeros_like(scale), 7)
                    matrix.backward(torch.zeros_like(matrix))
    return list(noted.values())


def rounding_launches() -> list[tuple[Any, ...]]:
    """The launches of the kernels that round columns, parts of 16 and of 32."""
    noted: dict[Any, tuple[Any, ...]] = {}
    with ExitStack() as patched:
        for name in ("recode_columns", "round_columns"):
            patched.enter_context(mock.patch.object(columns, name, Launches(getattr(columns, name), noted)))
        for count in (16, 32):
            part, row, square = torch.zeros(count, 4096), torch.ones(4096), torch.eye(128)[:count, :count]
            columns.recode(part, part, row, row, square, 15)
            columns.sweep(part, part, part, part, row, row, square.T, 15)
    return list(noted.values())


def at_full_size(launches: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The launches, each kind of product of a single matrix once, with as many columns as at 8B."""
    found: dict[str, tuple[Any, ...]] = {}
    for kernel, signature, constants, attributes, options in launches:
        wide = constants
        if kernel.fn.__name__ == "integer_products" and constants["MATRICES"] == 1:
            wide = constants | {"INPUTS": COLUMNS, "PARTS": PARTS}
        key = str((kernel.fn.__name__, signature, wide, options))
        found.setdefault(key, (kernel, signature, wide, attributes, options))
    return list(found.values())


def main() -> None:
    capabilities = [int(name) for name in sys.argv[1:]] or [90]
    found = at_full_size(noted_launches()) + attention_launches() + healing_launches() + rounding_launches()
    for capability in capabilities:
        for kernel, signature, constants, attributes, options in found:
            source = ASTSource(kernel, signature, constants, attributes)
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            if made.metadata.shared > SHARED[capability]:
                raise SystemExit(
                    f"sm_{capability} {kernel.fn.__name__} {constants}: needs {made.metadata.shared} bytes of shared memory, "
                    f"expected at most {SHARED[capability]}"
                )
            if kernel.fn.__name__ == "integer_products" and ".ftz" in made.asm["ptx"]:
                raise SystemExit(f"sm_{capability} {kernel.fn.__name__} {constants}: treats subnormal numbers as 0")
            short = {
                name: value
                for name, value in constants.items()
                if name in ("ROWS", "TOKENS", "PARTS", "LOW0", "HIGH0", "KV")
            }
            print(f"sm_{capability} {kernel.fn.__name__} {short} shared {made.metadata.shared} B", flush=True)
    print(f"{len(found)} launches compiled for {len(capabilities)} GPUs")


if __name__ == "__main__":
    main()
