"""What a report is to be made of, and the folder it is written into."""

from __future__ import annotations

import contextlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from mpo_exporter.calibrate.windows import COUNT
from mpo_exporter.measure.survey import Survey
from mpo_exporter.report.facts import FORMAT, Compression, Report, from_text, to_text
from mpo_formats import FormatError, OutputError
from mpo_formats.writer import sync_folder
from mpo_runtime.evaluation.questions import Task
from mpo_runtime.measure import Comparison
from mpo_runtime.text.token_text import TokenText

JSON, PAGE = "report.json", "report.html"


@dataclass(frozen=True, slots=True)
class Job:
    """One report: its file, what to measure on, and what is known already.

    Args:
        file: the `.mpo` file.
        name: of the model, the heading of the page.
        folder: for the report, and for temporary files while it is made.
        text: what quality is measured on; None: it is not measured, and `why_no_text` is the reason.
        calibration: the text on which layers are measured, and to which a file without cores is fitted.
        calib_windows: windows of it on which layers are measured; None: as many as take about half a minute.
        fit_windows: windows of it to which a file without cores is fitted.
        without_cores: make and measure a file of the same size without cores; None: where the model is small.
        tasks: of questions, on which accuracy is measured.
        comparison, surveyed, compression: what the export measured, so that it is not measured again.
        earlier: the report that was in the folder before.
    """

    file: Path
    name: str
    folder: Path
    text: TokenText | None
    why_no_text: str = ""
    calibration: TokenText | None = None
    calib_windows: int | None = None
    fit_windows: int = COUNT
    device: str = "cpu"
    threads: int | None = None
    without_cores: bool | None = None
    tasks: tuple[Task, ...] = ()
    comparison: Comparison | None = None
    surveyed: Survey | None = None
    compression: Compression | None = None
    earlier: Report | None = None


def prepare(folder: Path, force: bool) -> Report | None:
    """Makes the folder; returns the report that is in it already, if this version can read it.

    Raises:
        OutputError: for a file, a folder that cannot be made, or without `force` one that has other contents.
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
        return None  # a report of another version, which the new one replaces


def write(folder: Path, report: Report, page: str) -> None:
    """Writes the JSON, then the page; each appears under its name only when it is complete.

    Raises:
        OutputError: when a file cannot be written.
    """
    replace_file(folder / JSON, to_text(report))
    replace_file(folder / PAGE, page)


def replace_file(path: Path, text: str) -> None:
    """Replaces a file atomically; characters that UTF-8 cannot encode are written as escapes."""
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
