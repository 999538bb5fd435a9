"""Prompt caches that are saved to files and restored: /slots, in llama.cpp's form.

A slot remembers the tokens of the last text that a request put there (`id_slot`), or else of the text that came in turn. All
slots share one cache of beginnings; a slot only says whose is meant.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mpo_formats import ConfigError
from mpo_runtime.cli.prompt_cache import cache_settings
from mpo_runtime.engine import Scheduler
from mpo_runtime.model import Model
from mpo_server.errors import ApiError, invalid, json_response
from mpo_server.fields import Table, read, required, text_field
from mpo_server.http import understood
from mpo_server.service import Service

SLOT: Table = {"filename": text_field(128, "The name of a file in the folder of --slot-save-path.", least=1)}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


async def slots(request: Request) -> Response:
    """The slots, and how many tokens each has; never what they say."""
    service: Service = request.app.state.service
    context = service.model.engine.context
    rows = [{"id": index, "n_ctx": context, "n_tokens": len(ids)} for index, ids in enumerate(service.slots)]
    return json_response(rows)


async def change(request: Request) -> Response:
    """Saves a slot to a file, restores one from a file, or forgets what it had."""
    service: Service = request.app.state.service
    _ = service.model  # raises while it is loaded
    number = _number(request.path_params["number"], len(service.slots))
    action = request.query_params.get("action")
    if action == "erase":
        count, service.slots[number] = len(service.slots[number]), []
        return json_response({"id_slot": number, "n_erased": count})
    if action not in ("save", "restore"):
        raise invalid("action", "expected save, restore or erase")
    if service.settings.slot_path is None:
        raise ApiError(501, "this server saves no prompt caches; start it with --slot-save-path", code="not_supported")
    values = await understood(request, read_slot)
    if not _NAME.fullmatch(values["filename"]):
        raise invalid("filename", "expected a plain name of letters, digits, dots, _ and -")
    path = service.settings.slot_path / values["filename"]
    began = time.monotonic()
    facts = await service.work(
        lambda: _save(service, number, path) if action == "save" else _restore(service, number, path)
    )
    timings = {f"{action}_ms": (time.monotonic() - began) * 1e3}
    return json_response({"id_slot": number, "filename": values["filename"], **facts, "timings": timings})


def read_slot(model: Model, data: Mapping[str, Any]) -> dict[str, Any]:
    """The request; raises ApiError naming the field that is wrong."""
    values = read(SLOT, data)
    required(values, "filename")
    return values


def _number(text: str, count: int) -> int:
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 4 else count
    if number >= count:
        raise ApiError(
            404, f"there is no such slot; this server has 0 to {count - 1}", param="id_slot", code="not_found"
        )
    return number


def _save(service: Service, number: int, path: Path) -> dict[str, Any]:
    engine = _engine(service)
    try:
        count = engine.save_prefix(path, _conditions(service), service.slots[number])
    except ConfigError:
        raise ApiError(500, "the file cannot be written", code="cannot_write") from None
    return {"n_saved": count, "n_written": path.stat().st_size if count else 0}


def _restore(service: Service, number: int, path: Path) -> dict[str, Any]:
    engine = _engine(service)
    if not path.is_file() or path.is_symlink():
        raise ApiError(404, "there is no such file", param="filename", code="not_found")
    try:
        ids = engine.restore_prefix(path, _conditions(service))
    except ConfigError as error:
        raise invalid("filename", str(error).replace(f"{path.parent}/", ""), "wrong_file") from None
    service.slots[number] = ids
    return {"n_restored": len(ids), "n_read": path.stat().st_size}


def _engine(service: Service) -> Scheduler:
    engine = service.model.engine
    if not isinstance(engine, Scheduler):
        raise ApiError(501, "this backend keeps no prompt caches", code="not_supported")
    return engine


def _conditions(service: Service) -> dict[str, str]:
    """What a prompt cache depends on besides its tokens."""
    return cache_settings(service.model, service.settings.loading)
