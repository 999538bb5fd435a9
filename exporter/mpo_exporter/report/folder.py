"""The folder of a report: refused where it holds something else, and written file by file so that none is ever half."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from mpo_exporter.report.facts import FORMAT, Report, from_text, to_text
from mpo_formats import FormatError, OutputError
from mpo_formats.writer import sync_folder

JSON, PAGE = "report.json", "report.html"


def prepare(folder: Path, force: bool) -> Report | None:
    """Makes the folder, and returns the report that lies in it already if this version can read it.

    Raises:
        OutputError: for a file, a folder that holds something else than a report, or one that cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in folder.iterdir()}
    except FileExistsError:
        raise OutputError(f"{folder}: is a file; give a folder with --report or --out") from None
    except OSError as error:
        raise OutputError(f"{folder}: cannot make the folder of the report ({error.strerror}); give another") from error
    if not names:
        return None
    content = b""
    with contextlib.suppress(OSError):
        content = (folder / JSON).read_bytes()
    if FORMAT.encode() not in content[:200] and not force:
        raise OutputError(
            f"{folder}: holds something else than a report ({sorted(names)[0]!r}); "
            "give another folder, or --force to write the report beside it"
        )
    try:
        return from_text(content, str(folder / JSON))
    except FormatError:
        return None  # of another version: it is replaced


def write(folder: Path, report: Report, page: str) -> None:
    """Writes the JSON and then the page, each under a temporary name first.

    Raises:
        OutputError: when the disk refuses.
    """
    replace_file(folder / JSON, to_text(report))
    replace_file(folder / PAGE, page)


def replace_file(path: Path, text: str) -> None:
    """Puts a whole file in the place of an old one; what UTF-8 does not know is written as an escape."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with temporary.open("xb") as file:
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot write ({error.strerror or error}); give another folder") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
