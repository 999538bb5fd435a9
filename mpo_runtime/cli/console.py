"""What both programs share: one-line errors, exit codes, progress on the terminal."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

FAILURE = 1  # typer itself ends with 0 when all is well and 2 on wrong usage


def run(app: Callable[..., Any], program: str) -> None:
    """Runs a typer app: exit code 0 on success, 1 on an error of the input, 2 on wrong usage.

    Errors are one line on standard error; a traceback only with --debug or MPO_DEBUG=1. SIGTERM, and SIGHUP where nobody has
    said to ignore it (nohup), end the program as Ctrl-C does, so that nothing half-written stays.
    """
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    debug = "--debug" in sys.argv or os.environ.get("MPO_DEBUG") == "1"
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app(prog_name=program)
    except BrokenPipeError:
        # The reader went away, as in `mpo-run generate … | head`; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILURE)
    except Exception as error:
        from mpo_formats.errors import MpoError  # only now, because it loads numpy, which --help can do without

        if debug or not isinstance(error, MpoError | OSError | MemoryError):
            raise
        print(f"{program}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(FAILURE)


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller model, --ctx-size or --chi"
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def progress(description: str) -> Iterator[Callable[[str, int, int], None]]:
    """Shows a bar on standard error for anything that lasts; nothing where that is not a terminal.

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
    """A line every ten seconds, for logs."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last >= 10:
            self.last = now
            print(f"{self.description}: {stage} {done}/{total}", file=sys.stderr, flush=True)


def size_text(count: float) -> str:
    """Bytes in decimal units, as disks are sold and papers count."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.2f} GB"
