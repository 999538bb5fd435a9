"""Strict JSON for frozen dataclasses: no unknown key, no missing key, no duplicate key, no silent conversion."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

from mpo_formats.errors import FormatError

Record = TypeVar("Record")


def parse_json(text: bytes | str, where: str) -> Any:
    """Parses JSON and refuses what stock parsers let through: duplicate keys, NaN, broken UTF-8, deep nesting.

    Raises:
        FormatError: naming `where` and what is wrong.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise FormatError(f"{where}: duplicate key {shorten(repeated)}; the file is damaged, export it again")
        return result

    def refuse_constant(name: str) -> Any:
        raise FormatError(f"{where}: {name} is not a JSON number; the file is damaged, export it again")

    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=unique, parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: not UTF-8 at byte {error.start}; the file is damaged, export it again") from None
    except RecursionError:
        raise FormatError(f"{where}: nested too deeply; the file is damaged, export it again") from None
    except ValueError as error:
        raise FormatError(f"{where}: not valid JSON ({shorten(str(error))}); the file is damaged") from None


def to_json(record: Any) -> str:
    """Writes a dataclass (or plain data) as canonical JSON: sorted keys, no spaces, ASCII."""
    plain = dataclasses.asdict(record) if dataclasses.is_dataclass(record) and not isinstance(record, type) else record
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)


def from_json(kind: type[Record], text: bytes | str, where: str) -> Record:
    """Parses JSON text into a dataclass of type `kind`; raises FormatError naming the key that is wrong."""
    return from_plain(kind, parse_json(text, where), where)


def from_plain(kind: type[Record], value: Any, where: str) -> Record:
    """Builds a dataclass from a parsed JSON object; raises FormatError naming the key that is wrong."""
    if not isinstance(value, Mapping):
        raise FormatError(f"{where}: expected an object, found {describe(value)}")
    fields, hints = _fields(kind)
    for key in value:
        if key not in fields:
            raise FormatError(f"{where}: unknown key {shorten(str(key))}; written by a newer version, or damaged")
    for key in fields:
        if key not in value:
            raise FormatError(f"{where}: missing key {key!r}; the file is damaged, export it again")
    return kind(**{key: _convert(hints[key], value[key], f"{where}.{key}") for key in fields})


def records_from_json(kind: type[Record], text: str, where: str) -> tuple[Record, ...]:
    """Parses a JSON list of records; raises FormatError naming the index and key."""
    rows = parse_json(text, where)
    if not isinstance(rows, list):
        raise FormatError(f"{where}: expected a list, found {describe(rows)}")
    return tuple(from_plain(kind, row, f"{where}[{index}]") for index, row in enumerate(rows))


@functools.cache
def _fields(kind: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    names = tuple(field.name for field in dataclasses.fields(kind))
    return names, typing.get_type_hints(kind)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(_choose(arguments, value, where), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise FormatError(f"{where}: expected a list, found {describe(value)}")
        return tuple(_convert(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is typing.Literal:
        if not isinstance(value, str) or value not in arguments:
            raise FormatError(f"{where}: expected one of {', '.join(arguments)}, found {describe(value)}")
        return value
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise FormatError(f"{where}: expected an object of strings, found {describe(value)}")
        return value
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast("type[Any]", hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise FormatError(f"{where}: expected {hint.__name__}, found {describe(value)}")
    return value


def _choose(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    """Picks the dataclass of a union by the object's `kind`, or the only alternative to None."""
    choices = [argument for argument in arguments if argument is not type(None)]
    if len(choices) == 1:
        return choices[0]
    kind = value.get("kind") if isinstance(value, dict) else None
    for choice in choices:
        if kind == choice.kind_name():
            return choice
    names = ", ".join(choice.kind_name() for choice in choices)
    raise FormatError(f"{where}: expected a term of kind {names}, found {describe(kind)}")


def describe(value: Any) -> str:
    """A short, safe description of a value from a file, for error messages."""
    if isinstance(value, dict | list):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 2**64:
        return "an integer beyond 64 bits"
    return shorten(json.dumps(value))


def shorten(text: str, limit: int = 80) -> str:
    """Makes text from a file safe to print: one line, printable ASCII, bounded length."""
    safe = ascii(text)
    return safe if len(safe) <= limit else safe[: limit - 4] + "...'"
