"""Runs a chat template with minijinja, and is the helper process in which `ChatTemplate` has that done.

The helper starts with every program that chats, so this module imports as little as it can, and not numpy.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

from mpo_runtime.helper_process import confine, read_frame, write_frame
from mpo_runtime.text.template_syntax import CONTAINER, FLOAT, JSON, translate

FUEL = 10_000_000  # minijinja instructions; a conversation of 10,000 messages takes about a tenth
MEMORY = 512 << 20  # bytes of address space
LONGEST_TEXT = 64 << 20  # bytes of rendered text
# transformers' own tag, which marks what to train on; it renders what it encloses.
_GENERATION = re.compile(r"(\{%[-+]?)\s*(end)?generation\s*([-+]?%\})")

# In minijinja's text of a list or object: a string, or else (in group 1) what Python writes in another way.
_FLOAT_OR_STRING = re.compile(
    r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|(?<![\w.])(-?(?:\d+\.\d+(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+|inf|NaN)|undefined)\b""",
    re.DOTALL,
)


class TemplateFailure(Exception):
    """A template that is wrong, refuses the conversation or runs out of its limits; one line."""


def compile_template(source: str) -> Callable[[dict[str, Any]], str]:
    """A function that renders a template from its variables, set up as transformers sets up jinja2, with limited steps.

    Raises:
        TemplateFailure: where the template is not valid; so does the function where it fails.
    """
    import minijinja

    def guarded(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except MemoryError:
            raise
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            found = error.message if isinstance(error, minijinja.TemplateError) else str(error) or type(error).__name__
            raise TemplateFailure(" ".join(str(found).split())[:500]) from None

    # jinja2 reads every line break of a template as \n.
    text = _GENERATION.sub(lambda tag: f"{tag[1]} {tag[2] or ''}with {tag[3]}", re.sub(r"\r\n?", "\n", source))
    environment = minijinja.Environment(
        fuel=FUEL,
        trim_blocks=True,
        lstrip_blocks=True,
        filters={FLOAT: _python_float, CONTAINER: _python_container, JSON: _python_json, "int": _int, "float": _float},
        globals={"raise_exception": _raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)},
    )
    environment.remove_global("debug")
    try:
        guarded(lambda: environment.add_template("chat", translate(text)))
    except TemplateFailure:
        guarded(
            lambda: environment.add_template("chat", text)
        )  # which says what is wrong with the template as it stands
    return lambda variables: str(guarded(lambda: environment.render_template("chat", **variables)))


def serve() -> None:
    """The helper process: reads the template, then one set of variables at a time, and answers each on stdout.

    An answer starts with + (text) or - (error).
    """
    confine(MEMORY)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    write_frame(answers, b"+")
    render: Callable[[dict[str, Any]], str] | None = None
    while (request := read_frame(requests)) is not None:
        text = ""
        try:
            if render is None:
                render = compile_template(request.decode())
            else:
                text = render(json.loads(request))
            answer = b"+" + text.encode()
            if len(answer) > LONGEST_TEXT:
                answer = f"-writes more than {LONGEST_TEXT >> 20} MiB of text".encode()
        except TemplateFailure as error:
            answer = b"-" + str(error).encode()
        except MemoryError:
            answer = f"-needs more than {MEMORY >> 20} MiB of memory".encode()
        write_frame(answers, answer)


def _python_float(text: str) -> str:
    """A float as Python writes it, from minijinja's text of it."""
    return repr(float(text))


def _python_container(text: str) -> str:
    """A list or an object as Python writes it, from minijinja's text, where only floats and `undefined` differ."""
    return _FLOAT_OR_STRING.sub(lambda found: found[0] if found[1] is None else _python_value(found[1]), text)


def _python_value(text: str) -> str:
    return "Undefined" if text == "undefined" else repr(float(text))


def _python_json(
    text: str,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` as transformers defines it (no HTML escapes, characters as they are), from minijinja's JSON."""
    pair = tuple(separators) if separators is not None else None
    value = json.loads(text)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)


def _int(value: Any, default: Any = 0, base: int = 10) -> Any:
    """The filter `int`: a number of a text, or the default where there is none."""
    try:
        return int(value, base) if isinstance(value, str) else int(value)
    except (TypeError, ValueError):
        return _whole_float(value, default)
    except OverflowError:
        return default


def _whole_float(value: Any, default: Any) -> Any:
    """`int` of a text such as 1.5, as jinja2 takes it."""
    try:
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        return default


def _float(value: Any, default: Any = 0.0) -> Any:
    """The filter `float`: a number of a text, or the default where there is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return default


def _raise_exception(message: str) -> None:
    """The function `raise_exception`, by which a template refuses a conversation."""
    raise TemplateFailure(message)
