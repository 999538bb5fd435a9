"""Writes docs/commands.md: every command of both programs with all its options, as --help has them.

    python tests/reference.py

A test demands that the page is what this writes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "commands.md"
# Brought by other packages of the project, where their libraries are installed; they have pages of their own.
ELSEWHERE = ("serve", "export-onnx")
HEAD = """# Commands and options

Every command of `mpo-run` and `mpo-export`, as `--help` lists them. This page is written by `python tests/reference.py`, and a
test keeps it so. `--debug` adds a traceback to any command. Options with a variable in brackets can be set by it. The commands
`serve` and `export-onnx` have pages of their own ([server.md](server.md), [onnx.md](onnx.md)).
"""


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The commands of a program with their full names, those of groups too."""
    for word, inner in sorted(getattr(command, "commands", {}).items()):
        if not inner.hidden and word not in ELSEWHERE:
            yield from commands(inner, f"{name} {word}")
    if not getattr(command, "commands", {}) or command.params:
        yield name, command


def option_text(parameter: Any) -> str:
    """A row of an option: its names, the values, what it is for, and its default."""
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    if parameter.param_type_name == "argument":
        names = f"`{(parameter.metavar or parameter.name).upper()}`"
    variable = f" [`{parameter.envvar}`]" if parameter.envvar else ""
    default = getattr(parameter, "show_default", None)
    shown = default if isinstance(default, str) else ""
    plain = isinstance(parameter.default, int | float | str) and not isinstance(parameter.default, bool)
    if default is True and plain:
        shown = str(parameter.default)
    text = " ".join((getattr(parameter, "help", None) or "").split())
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (f"{names}{variable}", text, shown)) + " |"


def section(name: str, command: Any) -> str:
    """The section of one command."""
    about = " ".join((command.help or "").split())
    rows = [
        option_text(one) for one in command.params if not getattr(one, "hidden", False) and "--help" not in one.opts
    ]
    table = ["| option | | default |", "|---|---|---|", *rows] if rows else []
    return "\n".join([f"## {name}", "", about, *([""] if table else []), *table])


def page() -> str:
    """The whole page."""
    import typer.main

    from mpo_exporter.cli.main import app as export_app
    from mpo_runtime.cli.main import app as run_app

    found = [HEAD]
    for name, app in (("mpo-run", run_app), ("mpo-export", export_app)):
        found += [section(full, command) for full, command in commands(typer.main.get_command(app), name)]
    return "\n\n".join(part.strip() for part in found) + "\n"


if __name__ == "__main__":
    os.environ["COLUMNS"] = "120"
    sys.path[:0] = [str(ROOT), str(ROOT / "formats"), str(ROOT / "exporter")]
    PAGE.write_text(page(), encoding="utf-8")
