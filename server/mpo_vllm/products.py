"""The product with a layer's share: native kernels on a CPU, else torch, which dequantises integers at every use."""

from __future__ import annotations

from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpo_formats import Dense, Mpo, Quantized
from mpo_formats.layout import PLANES
from mpo_formats.packing import implicit_zero
from mpo_runtime import native
from mpo_runtime.layers.linear import MpoTerm, back_transform, block_transform, load_cores, load_transform, widen
from mpo_runtime.weights.protocol import Weights
from mpo_vllm.split import Layer


class Product(Protocol):
    """A layer's share, ready to be used."""

    out_features: int

    def apply(self, x: Tensor) -> Tensor:
        """Maps x [T, in] to [T, out], of the same type."""
        ...

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows `ids` [T] of the matrix, as [T, in]."""
        ...


def product(layer: Layer, device: torch.device, *, exact: bool) -> Product:
    """The product for a device; on a CPU `exact` keeps activations in float32, else integers meet int8 activations."""
    if device.type == "cpu" and native.available():
        return NativeProduct(layer, exact=exact)
    return TorchProduct(layer, device)


class NativeProduct:
    """A layer on the native kernels, which multiply the packed integers."""

    def __init__(self, layer: Layer, *, exact: bool) -> None:
        import mpo_runtime._native as _native
        from mpo_runtime.layers.native import load_linear

        linear = load_linear(cast(Weights, layer), layer.spec, chi=None)
        self.out_features, self.in_features = layer.spec.out_features, layer.spec.in_features
        self._linear = _native.Program(exact)
        self._linear.finish(self._linear.linear(self._linear.input(self.in_features), linear))
        self._embed = _native.Program(exact)
        self._embed.finish(self._embed.embed(linear, 1.0))

    def apply(self, x: Tensor) -> Tensor:
        """Maps x [T, in] to [T, out], of the same type."""
        out = np.empty((1, x.shape[0], self.out_features), np.float32)
        self._linear.run(None, [x.detach().float().contiguous().numpy()[None]], None, out)
        return torch.from_numpy(out[0]).to(x.dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows `ids` [T] of the matrix, as [T, in]."""
        out = np.empty((1, ids.shape[0], self.in_features), np.float32)
        self._embed.run(ids.long().contiguous().numpy()[None], [], None, out)
        return torch.from_numpy(out[0]).to(dtype)


class TorchProduct:
    """A layer in torch on any device: tensors stay as they are stored and are turned into floats at every use."""

    def __init__(self, layer: Layer, device: torch.device) -> None:
        spec = layer.spec
        self.out_features = spec.out_features
        self._transform = load_transform(cast(Weights, layer), spec, device)
        self._terms: list[Any] = []
        for index, term in enumerate(spec.terms):
            prefix = f"{spec.name}.{index}"
            if isinstance(term, Dense):
                name = f"{prefix}.weight"
                self._terms.append(widen(layer.array(name), layer.dtype(name)).to(device))
            elif isinstance(term, Quantized):
                self._terms.append(PackedIntegers(layer, prefix, term, device))
            elif isinstance(term, Mpo):
                self._terms.append(MpoTerm(term, load_cores(cast(Weights, layer), prefix, term, term, device)))

    def apply(self, x: Tensor) -> Tensor:
        """Maps x [T, in] to [T, out], of the same type; cores are applied in float32."""
        total: Tensor | None = None
        x = block_transform(x, self._transform)
        for term in self._terms:
            if isinstance(term, MpoTerm):
                y = term.apply(x.float()).to(x.dtype)
            else:
                y = F.linear(x, (term if isinstance(term, Tensor) else term.weight()).to(x.dtype))
            total = y if total is None else total + y
        if total is None:
            raise ValueError("a layer has at least one term")
        return total

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows `ids` [T] of the matrix, as [T, in]."""
        found = [term[ids] if isinstance(term, Tensor) else term.rows(ids) for term in self._terms]
        rows: Tensor = torch.stack(found).sum(0)
        return back_transform(rows, self._transform).to(dtype)


class PackedIntegers:
    """Planes [rows, groups, bytes], scales and zeros [rows, groups] of an integer matrix, on any device."""

    def __init__(self, layer: Layer, prefix: str, term: Quantized, device: torch.device) -> None:
        self.bits = term.bits
        self.planes = [torch.tensor(layer.array(f"{prefix}.q{plane}"), device=device) for plane in PLANES[term.bits]]
        self.scale = torch.tensor(layer.array(f"{prefix}.scale"), device=device)
        self.zero = torch.tensor(layer.array(f"{prefix}.zero"), device=device) if term.zeros else None

    def weight(self) -> Tensor:
        """The matrix [rows, columns] in float32."""
        return self._floats(self.planes, self.scale, self.zero)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows `ids` [T] in float32."""
        zero = None if self.zero is None else self.zero[ids]
        return self._floats([plane[ids] for plane in self.planes], self.scale[ids], zero)

    def _floats(self, planes: list[Tensor], scale: Tensor, zero: Tensor | None) -> Tensor:
        codes, shift = torch.zeros(1, dtype=torch.uint8, device=scale.device), 0
        for width, plane in zip(PLANES[self.bits], planes, strict=True):
            lanes = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)
            part = (plane[..., None] >> lanes) & ((1 << width) - 1)  # [rows, groups, bytes, 8/width]
            codes = codes | (part.flatten(2) << shift)
            shift += width
        offset = implicit_zero(self.bits) if zero is None else zero.float()[..., None]
        return (scale.float()[..., None] * (codes.float() - offset)).flatten(1)
