"""What all programs share: standard streams, one-line errors, exit codes, notes, progress on the terminal."""

from __future__ import annotations

import codecs
import errno
import io
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

# What writing to a stream fails with; the error of a file names it.
UNWRITABLE = (errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EBADF)
FAILURE = 1  # typer itself ends with 0 when all is well and 2 on wrong usage
NOTED = ("mpo_runtime", "mpo_exporter", "mpo_server")  # packages whose warnings are shown as notes


def run(app: Callable[..., Any], program: str) -> None:
    """Runs a typer app: exit code 0 on success, 1 on an error of the input, 2 on wrong usage.

    Errors are one line on standard error; a traceback only with --debug or MPO_DEBUG=1. SIGTERM, and SIGHUP unless it is
    ignored (nohup), end the program as Ctrl-C does, so that no half-written file stays.
    """
    # Read when torch is imported: its threads wait for each other without spinning. Where other programs use the machine,
    # spinning threads make small matrix functions take a hundred times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # numpy's threads: 2^4 cycles
    prepare_streams()
    show_notes()
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    debug = "--debug" in sys.argv or os.environ.get("MPO_DEBUG") == "1"
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        try:
            app(prog_name=program)
        finally:
            sys.stdout.flush()  # here, where a failure has a message and an exit code
    except BrokenPipeError:  # the reader has ended, as in `mpo-run generate … | head`
        discard_output()
        sys.exit(FAILURE)
    except Exception as error:
        from mpo_formats.errors import MpoError  # only now, because it loads numpy, which --help can do without

        if debug or not isinstance(error, MpoError | OSError | MemoryError):
            raise
        print(f"{program}: error: {one_line(error)}", file=sys.stderr)
        discard_output()
        sys.exit(FAILURE)


def prepare_streams() -> None:
    r"""Makes the standard streams usable whatever the program was started with.

    A stream that is closed, as in services, becomes the null device; its descriptor is taken, so that no file that is opened
    later gets that number and the text meant for the stream. What the encoding of a terminal or pipe lacks is written as an
    escape (\u03c7) instead of ending the program.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            _open_null(descriptor)
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", errors="backslashreplace", closefd=False))
        elif mode == "w" and isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _open_null(descriptor: int) -> None:
    """Opens the null device under a descriptor that is closed."""
    with suppress(OSError):
        os.fstat(descriptor)
        return
    opened = os.open(os.devnull, os.O_RDWR)
    if opened != descriptor:
        os.dup2(opened, descriptor)
        os.close(opened)


def discard_output() -> None:
    """Sends what standard output still holds to the null device: writing it has failed, and would fail again at exit."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def json_text(data: Any, indent: int | None = None) -> str:
    """Data as JSON that survives the encoding of standard output: characters as they are in UTF-8, else escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        plain = codecs.lookup(encoding).name == "utf-8"
    except LookupError:
        plain = False
    return json.dumps(data, ensure_ascii=not plain, indent=indent)


class _Notes(logging.Handler):
    """Prints each warning once, as a note on standard error."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record, unless it was printed before."""
        text = " ".join(record.getMessage().split())
        if text not in self._shown:
            self._shown.add(text)
            print(f"note: {text}", file=sys.stderr, flush=True)


def show_notes() -> None:
    """Shows the warnings of the packages as notes on standard error."""
    notes = _Notes()
    for name in NOTED:
        logger = logging.getLogger(name)
        logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, _Notes)]
        logger.addHandler(notes)


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller model, --ctx-size or --chi"
    if isinstance(error, OSError) and error.strerror:
        where = error.filename or ("standard output" if error.errno in UNWRITABLE else None)
        return f"{where}: {error.strerror}" if where else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def progress(description: str) -> Iterator[Callable[[str, int, int], None]]:
    """Shows progress on standard error: a bar on a terminal, else a line every ten seconds.

    Yields a function (stage, done, total).
    """
    if not sys.stderr.isatty():
        yield _PlainProgress(description)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield update


class _PlainProgress:
    """Prints a line every ten seconds, for logs."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last >= 10:
            self.last = now
            print(f"{self.description}: {stage} {done}/{total}", file=sys.stderr, flush=True)


def size_text(count: float) -> str:
    """A number of bytes in decimal units (kB, MB, GB)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.2f} GB"
