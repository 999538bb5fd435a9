"""Single products with integers on a GPU: tuning their tiles, and GemLite's beside ours."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpo_formats import Quantized
from mpo_formats.layout import PLANES
from mpo_runtime.backends.triton.ops import interpreted
from mpo_runtime.backends.triton.products import BF16, EMULATED
from mpo_runtime.backends.triton.terms import IntegerTerm, Settings, multiply
from mpo_runtime.backends.triton.tiles import CLASSES, MANY, Tile, Tiles, tiles_for, write_entry
from parts.gpu_models import Cold

# [out, in] of a block at 8B: queries, keys and values; output; gate and up; down.
SHAPES = {"8b": ((6144, 4096), (4096, 4096), (25600, 4096), (4096, 12800)), "dry": ((64, 128), (32, 256))}
# Tokens that stand for each class.
TOKENS = {"1": 1, "16": 16, "32": 32, "64": 64, MANY: 256}  # longer prompts are multiplied by torch
# What is tried, one field after the other from the present best.
TRIED: dict[str, tuple[int, ...]] = {
    "rows": (16, 32, 64, 128),
    "columns": (32, 64, 128, 256, 512),
    "warps": (2, 4, 8),
    "stages": (1, 2, 3, 4),
    "programs": (128, 256, 512, 1024, 2048),
    "tokens": (64, 128, 256),
}
PASSES = 2


class RandomMatrix:
    """The tensors of one Quantized term [out, in], as IntegerTerm reads them."""

    def __init__(self, rows: int, columns: int, term: Quantized) -> None:
        source = np.random.default_rng(rows + columns)
        self.arrays: dict[str, NDArray[Any]] = {
            f".q{plane}": source.integers(0, 256, (rows, columns * plane // 8), np.uint8) for plane in PLANES[term.bits]
        }
        self.arrays[".scale"] = np.full((rows, columns // term.group), columns**-0.5 / 8, np.float16)

    def array(self, name: str) -> NDArray[Any]:
        """The tensor of that name."""
        return self.arrays[name]


def matrices(size: str, bits: int, device: str, settings: Settings) -> list[IntegerTerm]:
    """A block's matrices on the device."""
    term = Quantized(bits, 32 if bits >= 4 else 64, False)
    weights: list[Any] = [RandomMatrix(rows, columns, term) for rows, columns in SHAPES[size]]
    return [IntegerTerm(one, "", term, torch.device(device), settings) for one in weights]


def plain_settings(device: str) -> Settings:
    """How products are multiplied by default on this card."""
    card = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return Settings(tiles_for(card), EMULATED if interpreted() else BF16)


def block_seconds(terms: Sequence[IntegerTerm], tokens: int, cold: Cold) -> float:
    """Seconds of a block's products, each on cold caches."""
    total = 0.0
    for term in terms:
        x = torch.randn(tokens, term.columns, device=term.scale.device)
        total += cold.seconds(lambda term=term, x=x: multiply([term], x))  # type: ignore[misc]
    return total


def neighbours(tile: Tile, name: str, field: str) -> Iterator[Tile]:
    """The tiles that differ in one field."""
    if field == "tokens" and name != MANY:
        return
    for value in TRIED[field]:
        if value != getattr(tile, field):
            yield replace(tile, **{field: value})


def tuned(terms: Sequence[IntegerTerm], name: str, cold: Cold, fewest: bool) -> tuple[Tile, float, float]:
    """The best tile of a class of tokens, its seconds, and those of the present one."""
    settings, bits = terms[0].settings, terms[0].bits
    present = settings.tiles

    def seconds(tile: Tile) -> float:
        settings.tiles = Tiles({**present.table, name: tile}, {})
        try:
            return block_seconds(terms, TOKENS[name] if not fewest else CLASSES.get(name, 70), cold)
        except Exception as error:  # more shared memory or registers than the card has
            print(f"  {tile}: {type(error).__name__}")
            return float("inf")

    best = present.choose(CLASSES.get(name, 1 << 20), bits)
    before = least = seconds(best)
    for field in ("warps",) if fewest else [field for _ in range(PASSES) for field in TRIED]:
        for tile in neighbours(best, name, field):
            found = seconds(tile)
            if found < least:
                best, least = tile, found
    settings.tiles = present
    return best, least, before


def tune(size: str, bits: Sequence[int], device: str, table: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """Tunes the tiles of every class for some bits on cold caches and writes them into a table; yields what was found."""
    card = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    cold = Cold(device, rounds)
    for one in bits:
        terms = matrices(size, one, device, plain_settings(device))
        for name in ("1", "16") if size == "dry" else TOKENS:
            best, least, before = tuned(terms, name, cold, size == "dry")
            write_entry(table, card, one, {name: best})
            yield {"what": f"{one} bits, class {name}: {best}", "value": before / least, "unit": "× the tile before"}


def gemlite(size: str, device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Seconds of GemLite's products over ours, a block's matrices with 4 bits and 1 and 16 tokens, on cold caches."""
    if importlib.util.find_spec("gemlite") is None:
        yield {"what": "gemlite is not installed: pip install gemlite", "value": None, "unit": ""}
        return
    from gemlite import DType, GemLiteLinear

    bits, group, cold = 4, 64, Cold(device, rounds)
    for tokens in (1, 16):
        ours = theirs = 0.0
        for rows, columns in SHAPES[size]:
            matrix = RandomMatrix(rows, columns, Quantized(bits, group, False))
            weights: Any = matrix
            term = IntegerTerm(weights, "", Quantized(bits, group, False), torch.device(device), plain_settings(device))
            packed = torch.from_numpy(matrix.array(".q4")).to(device)
            codes = torch.stack((packed & 15, packed >> 4), 2).flatten(1)
            scale = torch.from_numpy(matrix.array(".scale")).to(device).reshape(-1, 1)
            layer = GemLiteLinear(
                bits,
                group_size=group,
                in_features=columns,
                out_features=rows,
                input_dtype=DType.FP16,
                output_dtype=DType.FP16,
            )
            layer.pack(codes, scale, torch.full_like(scale, 8.0), None)
            x = torch.randn(tokens, columns, device=device)
            half = x.half()
            expected = multiply([term], x).sum(0)
            error = float((layer(half).float() - expected).abs().max() / expected.abs().max())
            if error > 5e-2:
                raise RuntimeError(
                    f"gemlite: its product is {error:.2g} off ours; its version stores weights otherwise"
                )
            ours += cold.seconds(lambda term=term, x=x: multiply([term], x))  # type: ignore[misc]
            theirs += cold.seconds(lambda layer=layer, half=half: layer(half))  # type: ignore[misc]
        yield {
            "what": f"4 bits, {tokens} tokens: GemLite's time over ours",
            "value": theirs / ours,
            "unit": "×",
            "bar": 0.9,
        }
