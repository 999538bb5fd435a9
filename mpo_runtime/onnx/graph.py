"""A graph under construction: nodes, and tensors that go to a file beside it as they come."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mpo_formats import ConfigError
from mpo_runtime.onnx.manifest import DATA, MODEL

# What the graph is written for: older runtimes refuse it. The domain com.microsoft has had one version only.
OPSET, IR_VERSION, MICROSOFT = 21, 10, "com.microsoft"
# Tensors of fewer bytes stay in the graph itself.
INLINE = 1024
# The runtime maps large tensors where they lie, which needs the alignment of a page.
PAGE, LARGE, ALIGNMENT = 4096, 1 << 20, 64
ELEMENTS: dict[Any, int] = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int32): TensorProto.INT32,
}


class Graph:
    """The graph of a model.

    Args:
        folder: where `model.onnx` and `model.onnx.data` are written; must exist.
        dtype: of activations and float weights: float32 or float16.
    """

    def __init__(self, folder: Path, dtype: type[np.floating[Any]]) -> None:
        self.nodes: list[Any] = []
        self.folder, self.dtype = folder, np.dtype(dtype)
        self.element = ELEMENTS[self.dtype]
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.shared: dict[Any, str] = {}
        self._data = (folder / DATA).open("xb")

    def add(
        self, kind: str, *inputs: str, domain: str = "", outputs: Sequence[str] | None = None, **attributes: Any
    ) -> str:
        """Appends a node and returns the name of its first output; an empty name leaves out an optional input."""
        name = f"{kind}_{len(self.nodes)}"
        names = list(outputs) if outputs else [name]
        node = helper.make_node(kind, list(inputs), names, name=name, domain=domain, **attributes)
        self.nodes.append(node)
        return names[0]

    def microsoft(self, kind: str, *inputs: str, outputs: Sequence[str] | None = None, **attributes: Any) -> str:
        """The same for an operator of ONNX Runtime's own domain."""
        return self.add(kind, *inputs, domain=MICROSOFT, outputs=outputs, **attributes)

    def input(self, name: str, element: int, shape: Sequence[int | str]) -> str:
        """Declares an input; a text in the shape stands for a length that may change."""
        self.inputs.append(helper.make_tensor_value_info(name, element, list(shape)))
        return name

    def output(self, name: str, element: int, shape: Sequence[int | str]) -> None:
        """Declares an output, a value of that name."""
        self.outputs.append(helper.make_tensor_value_info(name, element, list(shape)))

    def tensor(self, name: str, array: NDArray[Any]) -> str:
        """Stores a tensor under a name, which is new in this graph."""
        if name in self.initializers:
            raise ValueError(f"{name}: stored twice")
        proto = TensorProto(name=name, data_type=ELEMENTS[array.dtype], dims=array.shape)
        if array.nbytes < INLINE:
            proto.raw_data = array.tobytes()
        else:
            boundary = PAGE if array.nbytes >= LARGE else ALIGNMENT
            self._data.write(bytes(-self._data.tell() % boundary))
            proto.data_location = TensorProto.EXTERNAL
            place = {"location": DATA, "offset": str(self._data.tell()), "length": str(array.nbytes)}
            for key, value in place.items():
                proto.external_data.add(key=key, value=value)
            self._data.write(np.ascontiguousarray(array).data)
        self.initializers[name] = proto
        return name

    def floats(self, name: str, array: NDArray[Any]) -> str:
        """Stores floats as the graph's element type.

        Raises:
            ConfigError: where a value is beyond the range of float16.
        """
        with np.errstate(over="ignore"):
            stored = np.asarray(array).astype(self.dtype)
        if self.dtype == np.float16 and not np.isfinite(stored).all():
            raise ConfigError(f"{name}: has values beyond the range of float16; export with --dtype fp32")
        return self.tensor(name, stored)

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        """A small constant, stored once."""
        array = np.asarray(values, dtype)
        key = (array.dtype, array.shape, array.tobytes())
        if key not in self.shared:
            self.shared[key] = self.tensor(f"constant_{len(self.shared)}", array)
        return self.shared[key]

    def scalar(self, value: float) -> str:
        """A constant of the graph's element type."""
        return self.constant(value, self.dtype)

    def sizes(self) -> dict[str, int]:
        """Bytes of every stored tensor by name."""
        widths = {element: dtype.itemsize for dtype, element in ELEMENTS.items()}
        return {name: math.prod(one.dims) * widths[one.data_type] for name, one in self.initializers.items()}

    def write(self) -> None:
        """Writes model.onnx and ends the file of tensors; both are on the disk afterwards."""
        graph = helper.make_graph(self.nodes, "decoder", self.inputs, self.outputs, list(self.initializers.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="mpo-runtime")
        self.close()
        path = self.folder / MODEL
        with path.open("xb") as file:
            file.write(model.SerializeToString())
            file.flush()
            os.fsync(file.fileno())
        onnx.checker.check_model(str(path))

    def close(self) -> None:
        """Ends the file of tensors."""
        if not self._data.closed:
            self._data.flush()
            os.fsync(self._data.fileno())
            self._data.close()
