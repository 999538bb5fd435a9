"""Strict JSON for frozen dataclasses: no unknown key, no missing key, no duplicate key, no silent conversion."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from mpo_formats.errors import FormatError

# The versions of the format that are read, oldest first (SPEC.md, section 9). A field of a record is marked with metadata:
# `since`, the version that brought it, or `choices`, the values that it may have in older versions.
VERSIONS = ("0.2", "0.3", "0.4", "0.5")
NEWEST = VERSIONS[-1]

Record = TypeVar("Record")
Converter = Callable[[Any], Any]

# Limits of a JSON text (SPEC.md, section 2), checked before the parser runs: they bound its memory and time.
DEEPEST_NESTING = 8
MOST_BRACKETS = 1 << 18
MOST_ITEMS = 1 << 15

JSON_NAMES: dict[type, str] = {int: "an integer", bool: "true or false", str: "a string"}
# Everything between two brackets, including strings that contain brackets. Possessive, so that no input backtracks.
_NO_BRACKETS = re.compile(rb'(?s)(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+"?)++')


class _Fault(Exception):
    """A wrong value. The path to it is put together while the exception propagates, so it costs nothing for valid input."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.path = ""

    def under(self, step: str) -> _Fault:
        self.path = step + self.path
        return self


def parse_json(text: bytes | str, where: str) -> Any:
    """Parses JSON and refuses what common parsers accept: duplicate keys, NaN, deep nesting, millions of lists.

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

    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    try:
        decoded = raw.decode("utf-8")
        _check_brackets(raw, where)
        return json.loads(decoded, object_pairs_hook=unique, parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: not UTF-8 at byte {error.start}; the file is damaged, export it again") from None
    except ValueError as error:
        raise FormatError(f"{where}: not valid JSON ({shorten(str(error))}); the file is damaged") from None


def _check_brackets(text: bytes, where: str) -> None:
    # Stops soon after the limit, so that a header of millions of brackets is refused quickly.
    brackets = _NO_BRACKETS.sub(b"", text, count=MOST_BRACKETS + 2)
    if len(brackets) > MOST_BRACKETS:
        raise FormatError(f"{where}: more than {MOST_BRACKETS} brackets; not a .mpo file")
    for _ in range(DEEPEST_NESTING):
        # Each round removes one level of nesting, the innermost first.
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    if brackets:
        raise FormatError(f"{where}: brackets do not match or nest deeper than {DEEPEST_NESTING}; the file is damaged")


def to_json(record: Any, version: str = NEWEST) -> str:
    """Writes a dataclass (or plain data) as canonical JSON: sorted keys, no spaces, ASCII; without newer fields."""
    return json.dumps(_plain(record, version), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(value: Any, version: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name), version) for field in _known(value, version)}
    return [_plain(item, version) for item in value] if isinstance(value, list | tuple) else value


def _known(kind: Any, version: str) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass that a version has."""
    place = VERSIONS.index(version)
    since = {field: field.metadata.get("since", VERSIONS[0]) for field in dataclasses.fields(kind)}
    return [field for field, first in since.items() if VERSIONS.index(first) <= place]


def from_json(kind: type[Record], text: bytes | str, where: str, version: str = NEWEST) -> Record:
    """Parses JSON text into a dataclass of type `kind`; raises FormatError naming the key that is wrong.

    Args:
        version: the version of the format that the text follows; newer fields get their defaults.
    """
    value = parse_json(text, where)
    try:
        return typing.cast(Record, _record_converter(kind, version)(value))
    except _Fault as fault:
        raise FormatError(f"{where}{fault.path}: {fault}") from None


def records_from_json(kind: type[Record], text: bytes | str, where: str, version: str = NEWEST) -> tuple[Record, ...]:
    """Parses a JSON list of records that follow a version; raises FormatError naming the index and key."""
    rows = parse_json(text, where)
    try:
        return tuple(_list_converter(_record_converter(kind, version))(rows))
    except _Fault as fault:
        raise FormatError(f"{where}{fault.path}: {fault}") from None


_CONVERTERS: dict[tuple[Any, str], Converter] = {}


def _record_converter(kind: Any, version: str) -> Converter:
    """The function that builds a dataclass of type `kind` from a parsed JSON object; made once per type and version."""
    if (kind, version) not in _CONVERTERS:
        _CONVERTERS[kind, version] = _make_record_converter(kind, version)
    return _CONVERTERS[kind, version]


def _make_record_converter(kind: Any, version: str) -> Converter:
    hints = typing.get_type_hints(kind)
    converters = {}
    for field in _known(kind, version):
        choices = field.metadata.get("choices", {}).get(version)
        converters[field.name] = _literal_converter(choices) if choices else _converter(hints[field.name], version)

    def convert(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _Fault(f"expected an object, found {describe(value)}")
        if value.keys() != converters.keys():
            _refuse_keys(value, converters)
        arguments = {}
        for name, converter in converters.items():
            try:
                arguments[name] = converter(value[name])
            except _Fault as fault:
                raise fault.under(f".{name}") from None
        try:
            return kind(**arguments)
        except FormatError as error:
            raise _Fault(str(error)) from None

    return convert


def _refuse_keys(value: dict[str, Any], converters: dict[str, Converter]) -> None:
    for key in value:
        if key not in converters:
            raise _Fault(f"unknown key {shorten(key)}; written by a newer version, or damaged")
    for key in converters:
        if key not in value:
            raise _Fault(f"missing key {key!r}; the file is damaged, export it again")


def _list_converter(item: Converter) -> Converter:
    def convert(value: Any) -> Any:
        if not isinstance(value, list):
            raise _Fault(f"expected a list, found {describe(value)}")
        if len(value) > MOST_ITEMS:
            raise _Fault(f"expected at most {MOST_ITEMS} items, found {len(value)}")
        result = []
        try:
            for entry in value:
                result.append(item(entry))
        except _Fault as fault:
            raise fault.under(f"[{len(result)}]") from None
        return tuple(result)

    return convert


def _literal_converter(choices: tuple[Any, ...]) -> Converter:
    def convert(value: Any) -> Any:
        if not isinstance(value, str) or value not in choices:
            raise _Fault(f"expected one of {', '.join(choices)}, found {describe(value)}")
        return value

    return convert


def _union_converter(arguments: tuple[Any, ...], version: str) -> Converter:
    """The converter of `X | None`, or of a union of dataclasses that the key `kind` of the object tells apart."""
    choices = [argument for argument in arguments if argument is not type(None)]
    if len(choices) == 1:
        single = _converter(choices[0], version)
        return lambda value: None if value is None else single(value)
    kinds = {choice.kind_name(): _record_converter(choice, version) for choice in choices}

    def convert(value: Any) -> Any:
        kind = value.get("kind") if isinstance(value, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise _Fault(f"expected a term of kind {', '.join(kinds)}, found {describe(kind)}")
        return kinds[kind](value)

    return convert


def _convert_float(value: Any) -> Any:
    if type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not float or not math.isfinite(value):
        raise _Fault(f"expected a finite number, found {describe(value)}")
    return value


def _convert_strings(value: Any) -> Any:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise _Fault(f"expected an object of strings, found {describe(value)}")
    return value


def _exact_converter(kind: type) -> Converter:
    def convert(value: Any) -> Any:
        if type(value) is not kind:
            raise _Fault(f"expected {JSON_NAMES[kind]}, found {describe(value)}")
        return value

    return convert


def _converter(hint: Any, version: str) -> Converter:
    """The function that converts a parsed JSON value to a field of type `hint`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _union_converter(arguments, version)
    if origin is tuple:
        return _list_converter(_converter(arguments[0], version))
    if origin is typing.Literal:
        return _literal_converter(arguments)
    if origin is dict:
        return _convert_strings
    if dataclasses.is_dataclass(hint):
        return _record_converter(hint, version)
    return _convert_float if hint is float else _exact_converter(hint)


def describe(value: Any) -> str:
    """A short, safe description of a value from a file, for error messages."""
    if isinstance(value, str):
        return shorten(value)
    if isinstance(value, list) and len(value) <= 4 and not any(isinstance(item, list | dict) for item in value):
        return f"[{', '.join(describe(item) for item in value)}]"
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 2**64:
        return "an integer beyond 64 bits"
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def shorten(text: str, limit: int = 80) -> str:
    """Makes text from a file safe to print: one line, printable ASCII, bounded length."""
    safe = ascii(text[:limit])
    return safe if len(safe) <= limit and len(text) <= limit else safe[: limit - 4] + "...'"
