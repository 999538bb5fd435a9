"""Files of results: every benchmark writes the same form, so that one script makes the tables of docs/results.md.

{"date": …, "machine": {…}, "commit": …, "command": …, "rows": [{…}, …], and what else the benchmark says}
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parts.machine import command_line, describe_machine

FIELDS = ("date", "machine", "commit", "command", "rows")


def write_results(out: Path | None, rows: Sequence[Mapping[str, Any]], **others: Any) -> None:
    """Writes rows and what they were measured on, as JSON; nothing where `out` is None."""
    if out is None:
        return
    machine = asdict(describe_machine())
    content = {
        "date": datetime.date.today().isoformat(),
        "commit": machine.pop("commit"),
        "machine": machine,
        "command": command_line(),
        **others,
        "rows": list(rows),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def faults(content: Any) -> list[str]:
    """What a file of results lacks of the form, in words."""
    if not isinstance(content, dict):
        return ["is not an object"]
    found = [f"has no {name}" for name in FIELDS if name not in content]
    if not isinstance(content.get("rows", []), list) or not all(
        isinstance(row, dict) for row in content.get("rows", [])
    ):
        found.append("rows: expected a list of objects")
    machine = content.get("machine")
    if "machine" in content and not (isinstance(machine, dict) and machine.get("cpu")):
        found.append("machine: expected an object that names the cpu")
    return found
