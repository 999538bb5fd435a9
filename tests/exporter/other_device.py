"""A second device, emulated on the CPU: what it holds can be used with what it holds, and with nothing else.

torch knows the device type `lazy` without having anything that runs on it. Tensors there are wrappers around tensors of the
CPU; an operation over both kinds fails as it does on a GPU, and so does numpy(). Single numbers go with either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "lazy"
MOVES = ("aten::_to_copy", "aten::copy_")


class There(Tensor):
    """A tensor on the other device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=NAME, requires_grad=False
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        return dispatched(operation, arguments, named or {})


class DeviceError(RuntimeError):
    """Tensors of two devices met."""


def dispatched(operation: Any, arguments: Any, named: dict[str, Any]) -> Any:
    """Runs an operation on the CPU for the device that its tensors are on."""
    tensors = [value for value in tree_flatten((arguments, named))[0] if isinstance(value, Tensor)]
    there = [isinstance(value, There) for value in tensors]
    wanted = named.get("device")
    to = any(there) if wanted is None else torch.device(wanted).type == NAME
    name = operation.name()
    if name not in MOVES and not name.startswith("aten::index"):  # indices may be on the CPU
        sized = [flag for flag, value in zip(there, tensors, strict=True) if value.dim() > 0]
        if any(sized) and not all(sized):
            raise DeviceError(f"{name}: expected all tensors to be on the same device")
    if wanted is not None:
        named = {**named, "device": "cpu"}
    plain = tree_map(lambda value: value.held if isinstance(value, There) else value, (arguments, named))
    result = operation(*plain[0], **plain[1])
    if not to:
        return result
    first = arguments[0] if arguments else None
    if isinstance(first, There) and isinstance(result, Tensor) and result is first.held:
        return first  # changed in place
    return tree_map(lambda value: There(value) if isinstance(value, Tensor) else value, result)


class OtherDevice(TorchDispatchMode):
    """A context in which `lazy` can be named where a device can."""

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        return dispatched(operation, arguments, named or {})


@contextmanager
def other_device() -> Iterator[str]:
    """The name of the device, as long as the context is open."""
    before = torch._C._only_lift_cpu_tensors()  # torch.tensor then makes tensors on the CPU and moves them
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with OtherDevice():
            yield NAME
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
