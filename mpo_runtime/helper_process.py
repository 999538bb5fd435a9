"""Helper processes: what a request could make take forever, or all memory, is done where it can be ended.

The process and its owner exchange frames over pipes, one answer for each request. A frame is its length in 4 bytes,
big-endian, and that many bytes. Helpers start with their program, so this module imports as little as it can.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import IO

SECONDS_TO_START = 60.0  # on a slow machine


class HelperProcess:
    """The owner's end of a helper process.

    Args:
        module: its module; the process runs `serve` of it, which first sends one frame as a greeting.
        what: begins the error's message, such as `chat template`.

    Attributes:
        expired: whether a request took too long, which has ended the process.

    Raises:
        ConfigError: where the process does not start.
    """

    def __init__(self, module: str, what: str, remedy: str = "") -> None:
        import subprocess

        from mpo_formats.errors import ConfigError

        boot = f"import sys; sys.path[:] = sys.argv[1:]; from {module} import serve; serve()"
        command = [sys.executable, "-I", "-c", boot, *map(str, sys.path)]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        self._owner = os.getpid()
        self.expired = False
        unable = ConfigError(f"{what}: the helper process ({sys.executable}) does not start{remedy}")
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null)
        except OSError:
            raise unable from None
        try:
            if self.ask(None, SECONDS_TO_START) is None:
                raise unable
        except BaseException:
            self.stop()
            raise

    def ask(self, request: bytes | None, seconds: float) -> bytes | None:
        """The answer to a request (None is the greeting's); None where the process ended, its time over or otherwise."""
        import threading

        timer = threading.Timer(seconds, self._expire)
        timer.daemon = True
        timer.start()
        try:
            if request is not None:
                write_frame(_open(self._process.stdin), request)
            return read_frame(_open(self._process.stdout))
        except OSError:
            return None
        finally:
            timer.cancel()

    def stop(self) -> None:
        """Ends the process and closes its pipes; does nothing in a forked child, which did not start it."""
        if self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):  # what could not be written any more
                    _open(stream).close()

    def _expire(self) -> None:
        self.expired = True
        self._process.kill()


def _open(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise OSError("the helper process has no pipe")
    return stream


def write_frame(stream: IO[bytes], data: bytes) -> None:
    """Writes one frame; raises OSError where the other end is gone."""
    stream.write(len(data).to_bytes(4, "big") + data)
    stream.flush()


def read_frame(stream: IO[bytes]) -> bytes | None:
    """Reads one frame, or returns None where the stream ends."""
    head = stream.read(4)
    size = int.from_bytes(head, "big")
    data = stream.read(size) if len(head) == 4 else b""
    return data if len(head) == 4 and len(data) == size else None


def confine(memory: int) -> None:
    """Makes this process a helper: limits its bytes of address space, forbids core files; Ctrl-C is for its owner."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        import resource
    except ImportError:  # Windows; time is still limited
        return
    for kind, limit in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (limit, limit))
