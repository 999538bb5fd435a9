"""The fields of a request: one table says what each may be, for the checks and for the OpenAPI document.

A field that is null counts as left out. Fields that no table knows are ignored, as most servers do: clients send many that
are meant for others. Fields that would change the answer and that this server does not have are refused (`UNSUPPORTED`).
"""

from __future__ import annotations

import gc
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from mpo_server.errors import ApiError, invalid

DEEPEST = 64  # levels of lists and objects in a request
_SURROGATE = re.compile("[\ud800-\udfff]")
_NAMES: Mapping[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "string": (str,),
    "array": (list,),
    "object": (dict,),
}
_ARTICLES = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "a string"}


@dataclass(frozen=True, slots=True)
class Field:
    """What a field may be.

    kinds: names of JSON types.
    least, most: the range of a number, or the number of characters or items.
    choices: all values that a string may have.
    """

    kinds: tuple[str, ...]
    least: float | None = None
    most: float | None = None
    default: Any = None
    choices: tuple[str, ...] = ()
    items: Mapping[str, Any] = field(default_factory=dict)  # of an array, as JSON schema
    text: str = ""

    def check(self, name: str, value: Any) -> Any:
        """The value, where it is what the field may be; raises ApiError naming the field."""
        kind = next((kind for kind in self.kinds if _is(value, kind)), None)
        if kind is None:
            raise invalid(name, f"expected {self.expected()}, found {_shown(value)}", "invalid_type")
        if kind == "integer":
            value = int(value)  # 1.0 is a whole number of JSON
        size = len(value) if kind in ("string", "array", "object") else value
        if kind != "boolean" and not self._in_range(size):
            raise invalid(name, f"expected {self.expected()}, found {_shown(value)}", "out_of_range")
        if kind == "string" and self.choices and value not in self.choices:
            raise invalid(name, f"expected one of {', '.join(self.choices)}, found {_shown(value)}")
        return value

    def _in_range(self, size: float) -> bool:
        return (self.least is None or size >= self.least) and (self.most is None or size <= self.most)

    def expected(self) -> str:
        """What the field may be, in words."""
        kinds = " or ".join(_ARTICLES.get(kind, f"an {kind}") for kind in self.kinds)
        if self.least is None and self.most is None:
            return kinds
        unit = " characters or items" if not {"integer", "number"} & set(self.kinds) else ""
        low, high = (None if bound is None else f"{bound:.16g}" for bound in (self.least, self.most))
        if high is None:
            return f"{kinds} of {low}{unit} or more"
        return f"{kinds} of {low}{unit} to {high}" if low is not None else f"{kinds} of at most {high}{unit}"

    def schema(self) -> dict[str, Any]:
        """The field as JSON schema."""
        options = [self._schema_of(kind) for kind in self.kinds] + [{"type": "null"}]
        facts: dict[str, Any] = {"anyOf": options}
        if self.text:
            facts["description"] = self.text
        if self.default is not None:
            facts["default"] = self.default
        return facts

    def _schema_of(self, kind: str) -> dict[str, Any]:
        facts: dict[str, Any] = {"type": kind}
        names = {
            "string": ("minLength", "maxLength"),
            "array": ("minItems", "maxItems"),
            "object": ("", "maxProperties"),
        }
        low, high = names.get(kind, ("minimum", "maximum"))
        if kind != "boolean":
            facts |= {low: self.least} if self.least is not None and low else {}
            facts |= {high: self.most} if self.most is not None else {}
        if kind == "string" and self.choices:
            facts = {"type": kind, "enum": list(self.choices)}
        if kind == "array" and self.items:
            facts["items"] = dict(self.items)
        return facts


Table = Mapping[str, Field]


def whole(least: int, most: int, default: int | None = None, text: str = "") -> Field:
    """A whole number."""
    return Field(("integer",), least, most, default, text=text)


def number(least: float, most: float, default: float | None = None, text: str = "") -> Field:
    """A number."""
    return Field(("number",), least, most, default, text=text)


def flag(default: bool | None = None, text: str = "") -> Field:
    """True or false."""
    return Field(("boolean",), default=default, text=text)


def text_field(most: int, text: str = "", choices: tuple[str, ...] = (), least: int | None = None) -> Field:
    """A string."""
    return Field(("string",), least, most, choices=choices, text=text)


def read(table: Table, data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The checked values of a table's fields: those of the request, or the defaults."""
    values = {}
    for name, one in table.items():
        value = data.get(name)
        values[name] = one.default if value is None else one.check(f"{prefix}{name}", value)
    return values


def required(values: Mapping[str, Any], *names: str) -> None:
    """Raises ApiError for a field that is missing."""
    for name in names:
        if values.get(name) is None:
            raise ApiError(400, f"{name}: is missing", param=name, code="missing_required_parameter")


def schema(table: Table, needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """A table as JSON schema of an object."""
    properties = {name: one.schema() for name, one in table.items()}
    for name in needed:
        properties[name]["anyOf"] = [option for option in properties[name]["anyOf"] if option["type"] != "null"]
    return {"type": "object", "properties": properties, **({"required": list(needed)} if needed else {})}


def parse_json(body: bytes) -> dict[str, Any]:
    """The object in a request's body; raises ApiError for anything else, NaN and text that is no Unicode among it."""
    gc.disable()  # it would look at millions of new objects again and again, and keep all threads waiting meanwhile
    try:
        data = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {_reason(error)}", code="invalid_json") from None
    finally:
        gc.enable()
    if not isinstance(data, dict):
        raise ApiError(400, f"the body is {_shown(data)}, expected an object", code="invalid_json")
    _check_plain(data)
    return data


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "brackets are nested too deep"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    return str(error) if isinstance(error, json.JSONDecodeError) or "expected" in str(error) else "a number is too long"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON; expected a finite one")


def _check_plain(data: Any) -> None:
    """Refuses what JSON can spell and nothing here can use: infinite numbers, lone surrogates, deep nesting."""
    level: list[Any] = [data]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += [*value, *value.values()]
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str):
                if not value.isascii() and _SURROGATE.search(value):
                    raise ApiError(
                        400, "the body holds a lone surrogate, which is no Unicode text", code="invalid_json"
                    )
            elif isinstance(value, float) and not math.isfinite(value):
                raise ApiError(400, "the body holds a number that is too large", code="invalid_json")
        if not inner:
            return
        level = inner
    raise ApiError(400, f"the body is nested deeper than {DEEPEST} levels", code="invalid_json")


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _NAMES[kind])


def _shown(value: Any) -> str:
    """A value of a client in a message, short and without control characters."""
    if isinstance(value, dict | list):
        return f"an {'object' if isinstance(value, dict) else 'array'} of {len(value)} items"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
