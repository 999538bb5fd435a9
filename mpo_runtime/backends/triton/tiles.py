"""How products with integers are cut into programs: a table by card, bits and number of tokens.

`tiles.json` beside this file has a default for every card, and an entry for each card on which `benchmarks/gpu.py --tune` ran;
MPO_TILES names another table. Nothing is tuned while a model runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from mpo_formats import ConfigError

SHIPPED = Path(__file__).with_name("tiles.json")
# The most tokens of each class but the last.
CLASSES = {"1": 1, "16": 16, "32": 32, "64": 64}
FEW = max(CLASSES.values())
MANY = "many"
WARPS = (1, 2, 4, 8, 16)
LARGEST = 4096


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes, and how many there should be.

    Args:
        rows, columns, tokens: of a program, powers of two; a program of one token works on the vector units.
        programs: as many as keep the card busy: fewer tiles than that are cut along the columns, into parts.
        warps, stages: of the compiled kernel (Triton's num_warps and num_stages).

    Raises:
        ConfigError: for a value out of range.
    """

    rows: int
    columns: int
    tokens: int
    programs: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        sizes = {"rows": self.rows, "columns": self.columns, "tokens": self.tokens}
        for name, value in sizes.items():
            if not 1 <= value <= LARGEST or value & (value - 1):
                raise ConfigError(f"tiles: {name}: expected a power of two up to {LARGEST}, found {value}")
        # A plane of one bit is read in words of 32 columns.
        if self.rows < 16 or self.columns < 32 or 1 < self.tokens < 16:
            raise ConfigError(
                f"tiles: expected rows from 16 on, columns from 32 on, and 1 or at least 16 tokens, found {sizes}"
            )
        if self.warps not in WARPS or not 1 <= self.stages <= 8 or not 1 <= self.programs <= 1 << 20:
            raise ConfigError(
                f"tiles: expected warps of {', '.join(map(str, WARPS))}, 1 to 8 stages and 1 to {1 << 20} programs, found "
                f"{self.warps}, {self.stages} and {self.programs}"
            )

    def parts(self, tiles: int, tokens: int, columns: int) -> int:
        """Into how many shares, a power of two, the columns of a product with so many tiles of rows are cut."""
        programs = tiles * -(-tokens // self.tokens)
        parts = min(max(self.programs // programs, 1), -(-columns // self.columns))
        return 1 << (parts.bit_length() - 1)


Table = Mapping[str, Mapping[str, Tile]]


def class_of(tokens: int) -> str:
    """The class of a product with so many tokens."""
    return next((name for name, most in CLASSES.items() if tokens <= most), MANY)


class Tiles:
    """The tiles of one card.

    Args:
        table: by class, of entries that hold for all bits.
        by_bits: the same for single numbers of bits, which go first.
    """

    def __init__(self, table: Mapping[str, Tile], by_bits: Table) -> None:
        self.table, self.by_bits = table, by_bits

    def choose(self, tokens: int, bits: int) -> Tile:
        """The tile of a product of so many tokens with integers of so many bits."""
        name = class_of(tokens)
        return self.by_bits.get(str(bits), {}).get(name) or self.table[name]


def read_table(path: Path) -> dict[str, Any]:
    """The table of a file; raises ConfigError for one that cannot be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"tiles {path}: cannot be read ({error}); leave MPO_TILES out") from None
    if not isinstance(found, dict) or set(found) != {"default", "cards"}:
        raise ConfigError(f"tiles {path}: expected the keys default and cards")
    return found


def parse_classes(entries: Mapping[str, Any], where: str) -> dict[str, Tile]:
    """Entries by class as tiles; raises ConfigError for unknown classes, keys or values."""
    names = {field.name for field in fields(Tile)}
    tiles = {}
    for name, entry in entries.items():
        if name not in (*CLASSES, MANY) or not isinstance(entry, dict) or set(entry) != names:
            raise ConfigError(f"tiles: {where}: {name}: expected a class of tokens with the keys {', '.join(names)}")
        tiles[name] = Tile(**entry)
    return tiles


@lru_cache(maxsize=8)
def tiles_for(card: str, path: Path | None = None) -> Tiles:
    """The tiles of a card by its name, or the default ones where it has none.

    Args:
        path: another table than MPO_TILES or the shipped one.

    Raises:
        ConfigError: for a table that cannot be read or has values out of range.
    """
    found = read_table(path or Path(os.environ.get("MPO_TILES") or SHIPPED))
    table = parse_classes(found["default"], "default")
    if set(table) != {*CLASSES, MANY}:
        raise ConfigError(f"tiles: default: expected the classes {', '.join((*CLASSES, MANY))}")
    by_bits = {
        bits: parse_classes(entries, f"{card}: {bits}") for bits, entries in found["cards"].get(card, {}).items()
    }
    return Tiles(table, by_bits)


def write_entry(path: Path, card: str, bits: int, tiles: Mapping[str, Tile]) -> None:
    """Puts measured tiles of a card into a table, which begins with the shipped default where it does not exist."""
    table = read_table(path if path.exists() else SHIPPED)
    entries = table["cards"].setdefault(card, {}).setdefault(str(bits), {})
    entries |= {name: asdict(tile) for name, tile in tiles.items()}
    path.write_text(json.dumps(table, indent=2) + "\n")
    tiles_for.cache_clear()
