"""What the tests of the GPU backend share: both backends over the same weights, poisoned outputs, steps that are replayed.

Bounds, as a share of the largest expected value, on random inputs:
products in float32 1e-5, in bf16 2e-2; attention over f32 1e-5, f16 2e-3, bf16 and int8 2e-2; a whole model in float32 1e-4.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.backends.triton import TritonOps, attention, elementwise, products
from tests.runtime.native_cases import Held

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
FLOATS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.int8: 2e-2}
KERNELS = {
    products: ("integer_products", "integer_rows", "integer_matrix"),
    elementwise: ("sum_parts", "rms_norm", "add_and_norm", "swiglu"),
    attention: ("rotate_and_append", "attention_part", "attention_join"),
}


def both(weights: Held, *, kv_type: str = "f32", **options: Any) -> tuple[TritonOps, ReferenceOps]:
    """The two backends over the same weights."""
    chi = options.pop("chi", None)
    ours = TritonOps(weights, device=DEVICE, kv_type=kv_type, chi=chi, **options)
    return ours, ReferenceOps(weights, held=True, chi=chi)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal up to a share of the largest value; NaN, which outputs are poisoned with, is never near."""
    assert found.shape == expected.shape
    assert float((found.cpu() - expected).abs().max()) <= tolerance * float(expected.abs().max())


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that kernels get to write their results to is full of NaN."""
    originals = {"empty": torch.empty, "empty_like": torch.empty_like}

    def filled(made: Tensor) -> Tensor:
        return made.fill_(float("nan")) if made.is_floating_point() else made

    def patched(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *arguments, **named: filled(make(*arguments, **named))

    new_empty = Tensor.new_empty
    with (
        mock.patch.object(torch, "empty", patched(originals["empty"])),
        mock.patch.object(torch, "empty_like", patched(originals["empty_like"])),
        mock.patch.object(Tensor, "new_empty", lambda self, *a, **n: filled(new_empty(self, *a, **n))),
    ):
        yield


class Recording(TorchDispatchMode):
    """Records what torch and the kernels do to tensors, as a CUDA graph does, to do it again with the same arguments.

    Numbers are kept as they were: a step that is replayed for other texts is right only where all that differs is read from
    tensors. Replayed results go to where the recorded ones are.

    Attributes:
        read: operations that give a value to the host or take one from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work: list[Callable[[], None]] = []
        self.read: list[str] = []
        self.launches = 0
        self.inside = False

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        result = operation(*arguments, **named)
        if self.inside:  # the interpreter's own work
            return result
        name = operation.name()
        if name in ("aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero"):
            self.read.append(name)
        inputs = {value.untyped_storage().data_ptr() for value in arguments if isinstance(value, Tensor)}
        made = [
            value for value in (result if isinstance(result, tuple | list) else [result]) if isinstance(value, Tensor)
        ]

        def again() -> None:
            found = operation(*arguments, **named)
            values = found if isinstance(found, tuple | list) else [found]
            for old, new in zip(made, [value for value in values if isinstance(value, Tensor)], strict=True):
                if old.untyped_storage().data_ptr() not in inputs:  # neither a view nor a change in place
                    old.copy_(new)

        self.work.append(again)
        return result

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Records what happens inside."""

        def wrapped(kernel: Any) -> Any:
            class Launcher:
                def __getitem__(this, grid: Any) -> Any:
                    def launch(*arguments: Any, **named: Any) -> None:
                        def run() -> None:
                            self.inside = True
                            kernel[grid](*arguments, **named)
                            self.inside = False

                        run()
                        self.launches += 1
                        self.work.append(run)

                    return launch

            return Launcher()

        patches = [
            mock.patch.object(module, name, wrapped(getattr(module, name)))
            for module, names in KERNELS.items()
            for name in names
        ]
        for patch in patches:
            patch.start()
        try:
            with self:
                yield
        finally:
            for patch in patches:
                patch.stop()

    def replay(self) -> None:
        """Does everything again; backward passes are recorded as what they did."""
        with torch.no_grad():
            for action in self.work:
                action()
