"""Rewrites the expressions of a chat template so that minijinja prints what jinja2 prints.

The two differ in how numbers become text: jinja2 writes what Python writes (1.0, 1e-05, 1e+16), and a filter written in
Python cannot make up for it, because minijinja hands it 1.0 as the integer 1. Inside a template the types are known, so
every place where a value becomes text gets a call of a macro: {{ x }}, a ~ b and x|string. Text outside tags is kept.

Like template_helper, this module is part of the helper process and imports nothing of the project.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Filters that template_helper defines: from minijinja's text of a float, of a list or object, and of JSON to Python's.
FLOAT, CONTAINER, JSON = "__float", "__container", "__json"
PRINT = "__print"
# A string is the usual case and the first to be tried. On one line, so that messages name the right line of the template.
PRELUDE = (
    f"{{%- macro {PRINT}(v) -%}}"
    "{%- if v is string -%}{{ v }}"
    f"{{%- elif v is float -%}}{{{{ v|string|{FLOAT} }}}}"
    f"{{%- elif v is iterable -%}}{{{{ v|string|{CONTAINER} }}}}"
    "{%- else -%}{{ v }}{%- endif -%}{%- endmacro -%}"
)
_OPENING = re.compile(r"\{[{%#]")
_RAW = re.compile(r"\{%[-+]?\s*raw\s*[-+]?%\}.*?\{%[-+]?\s*endraw\s*[-+]?%\}", re.DOTALL)
_TOKEN = re.compile(
    r"""(?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
      | (?P<number>0[bB]_?[01](?:_?[01])*|0[oO]_?[0-7](?:_?[0-7])*|0[xX]_?[\da-fA-F](?:_?[\da-fA-F])*
          |(?:\d+_)*\d+(?:\.(?:\d+_)*\d+)?(?:[eE][+-]?(?:\d+_)*\d+)?)
      | (?P<name>[^\W\d]\w*)
      | (?P<operator>//|\*\*|==|!=|>=|<=|[-+*/%~<>=.:|,;()\[\]{}])""",
    re.VERBOSE | re.DOTALL,
)
_CLOSING = {"(": ")", "[": "]", "{": "}"}
# Words and operators that bind less tightly than ~, and so end what it concatenates. The word `is` binds more tightly.
_WORDS = frozenset(("and", "or", "not", "in", "if", "else"))
_LOOSE = frozenset(("+", "-", "==", "!=", "<", ">", "<=", ">=", ",", ":", "=", ";"))
# Escapes that minijinja reads as Python does.
_PLAIN_ESCAPE = re.compile(r"\\[nrt\\'\"]")


@dataclass(slots=True)
class _Item:
    """A token, or a bracket with all that is in it; `kind` is string, number, name, operator or the opening bracket."""

    kind: str
    text: str
    space: str
    commas: bool = False


class _NotUnderstood(Exception):
    """A tag that is not valid; minijinja says so better."""


def translate(source: str) -> str:
    """A template that prints in minijinja what `source` prints in jinja2; `source` itself where it is not understood."""
    parts: list[str] = []
    place = 0
    try:
        while opening := _OPENING.search(source, place):
            start = opening.start()
            parts.append(source[place:start])
            if opening[0] == "{#":
                end = source.find("#}", start)
                place = len(source) if end < 0 else end + 2
                parts.append(source[start:place])
            elif raw := _RAW.match(source, start):
                place = raw.end()
                parts.append(raw[0])
            else:
                text, place = _tag(source, start, opening[0] == "{{")
                parts.append(text)
    except (_NotUnderstood, RecursionError):
        return source
    return "".join([PRELUDE, *parts, source[place:]])


def _tag(source: str, start: int, prints: bool) -> tuple[str, int]:
    """The tag that begins at `start`, rewritten, and where it ends."""
    head = re.compile(r"..[-+]?\s*", re.DOTALL).match(source, start)
    if head is None:
        raise _NotUnderstood
    items, place = _items(source, head.end(), "}}" if prints else "%}")
    tail = re.compile(r"[-+]?[%}]\}").match(source, place)
    if tail is None:
        raise _NotUnderstood
    recursion = prints and [item.text for item in items[:1]] == ["loop"]  # `loop(…)` has to stand alone
    if not prints:  # the first word names the statement
        text = "".join(item.text + item.space for item in items[:1]) + _expression(items[1:])
    elif recursion or not items:
        text = _expression(items)
    else:
        text = _printed(_expression(items), any(item.text == "," for item in items))
    return f"{head[0]}{text} {tail[0]}", tail.end()


def _printed(text: str, commas: bool = False) -> str:
    """A call of the macro that turns a value into text."""
    return f"{PRINT}(({text}))" if commas else f"{PRINT}({text})"


def _items(source: str, place: int, end: str) -> tuple[list[_Item], int]:
    """The items from `place` to the closing bracket or end of tag `end`, and where that begins."""
    items: list[_Item] = []
    spaces = re.compile(r"\s*")
    while True:
        if source.startswith(end, place) or (
            len(end) == 2 and source.startswith(end, place + 1) and source[place] in "-+"
        ):
            return items, place
        token = _TOKEN.match(source, place)
        if token is None or token[0] in ")]}":
            raise _NotUnderstood
        kind, text, place = str(token.lastgroup), token[0], token.end()
        commas = False
        if text in _CLOSING:
            inner, place = _items(source, place, _CLOSING[text])
            space = spaces.match(source, token.end())
            commas = any(item.text == "," for item in inner)
            kind, text = text, f"{text}{space[0] if space and inner else ''}{_expression(inner)}{_CLOSING[text]}"
            place += 1
        elif kind == "string":
            text = _literal(text)
        space = spaces.match(source, place)
        after = space[0] if space else ""
        items.append(_Item(kind, text, after, commas))
        place += len(after)


def _expression(items: list[_Item]) -> str:
    """The text of the items of one level, rewritten."""
    result: list[str] = []
    operands = [""]  # of ~
    after_value = False
    place = 0
    while place < len(items):
        item = items[place]
        is_word = item.kind == "name" and item.text in _WORDS
        sign = item.text in ("-", "+") and not after_value
        if is_word or (item.kind == "operator" and item.text in _LOOSE and not sign):
            result += [_concatenated(operands), item.text + item.space]
            operands, after_value, place = [""], False, place + 1
        elif item.text == "~":
            operands, after_value, place = [*operands, ""], False, place + 1
        elif item.kind == "name" and item.text == "is":
            text, place = _test(items, place)
            operands[-1], after_value = operands[-1] + text, True
        elif item.kind == "operator" and not sign:
            operands[-1] += item.text + item.space
            after_value, place = False, place + 1
        else:
            text, place = _value(items, place)
            operands[-1], after_value = operands[-1] + text, True
    return "".join([*result, _concatenated(operands)])


def _test(items: list[_Item], place: int) -> tuple[str, int]:
    """The word `is` with the test that follows it, and where that ends; the test's name may be a word such as `in`."""
    end = place + (3 if [other.text for other in items[place + 1 : place + 2]] == ["not"] else 2)
    argument = items[end] if end < len(items) else None
    if argument and argument.kind != "operator" and argument.text not in ("is", *_WORDS):
        end += 1
    return "".join(item.text + item.space for item in items[place:end]), end


def _concatenated(operands: list[str]) -> str:
    """What stands between two loose operators: one operand, or several that ~ makes one text of."""
    if len(operands) == 1:
        return operands[0]
    return " ~ ".join(text if _is_literal(text) else _printed(text.strip()) for text in operands) + " "


def _value(items: list[_Item], place: int) -> tuple[str, int]:
    """The value that begins at `place`, with its signs, attributes, calls and filters, and where it ends."""
    text = ""
    while place < len(items) and items[place].kind == "operator" and items[place].text in "+-":
        text += items[place].text.replace("+", "")  # minijinja has no such sign
        place += 1
    if place == len(items) or items[place].kind == "operator":
        raise _NotUnderstood
    first = items[place]
    text, space, place = text + first.text, first.space, place + 1
    while place < len(items):
        item, following = items[place], items[place + 1 : place + 2]
        if item.text == "." and following:
            text, space, place = f"{text}{space}.{following[0].text}", following[0].space, place + 2
        elif item.text == "|" and following:
            arguments = items[place + 2 : place + 3]
            given = arguments[0].text if arguments and arguments[0].kind == "(" else ""
            text = _filtered(text, following[0].text, given)
            space = arguments[0].space if given else following[0].space
            place += 3 if given else 2
        elif item.kind in ("(", "[") or (item.kind == first.kind == "string"):
            text, space, place = f"{text}{space}{item.text}", item.space, place + 1
        elif item.text == "%" and first.kind == "string" and _is_literal(text):
            return _formatted(text, items, place + 1)
        else:
            break
    return text + space, place


def _filtered(value: str, name: str, arguments: str) -> str:
    """A value with a filter; `arguments` with their brackets, or nothing."""
    if name == "string" and arguments in ("", "()"):
        return _printed(value)
    if name == "tojson":  # minijinja's own knows the types, and the second one how Python writes them
        return f"{value}|tojson|{JSON}{arguments}"
    if name == "map" and re.match(r"\(\s*['\"]tojson['\"]", arguments):
        return f"{value}|map('tojson')|map('{JSON}'{arguments[arguments.index('tojson') + len('tojson') + 1 :]}"
    return f"{value}|{name}{arguments}"


def _formatted(text: str, items: list[_Item], place: int) -> tuple[str, int]:
    """A string literal % a value or a tuple, as the filter `format`."""
    value, end = _value(items, place)
    only = items[place] if end == place + 1 else None
    arguments = only.text if only and only.kind == "(" and only.commas else f"({value})"
    return f"({text}|format{arguments}) ", end


def _is_literal(text: str) -> bool:
    """Whether an expression is one string literal."""
    found = _TOKEN.match(text.strip())
    return found is not None and found.lastgroup == "string" and found.end() == len(text.strip())


def _literal(text: str) -> str:
    """A string literal without the escapes that Python knows and minijinja does not."""
    if "\\" not in _PLAIN_ESCAPE.sub("", text):
        return text
    try:
        value = text[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")
        value.encode()
    except UnicodeError:  # a half of a surrogate pair, or an escape that Python refuses
        return text
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
