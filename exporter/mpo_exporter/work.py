"""The work folder of an export: what a run has measured and fitted, so that a killed one goes on where it ended.

It lies beside the file that is written, is locked while a run uses it, and is removed when the file is finished. Every part
is a file that is written whole and checked by its digest when it is read, so a part that a power failure tore is done again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from mpo_exporter.calibrate.store import Arrays
from mpo_exporter.measure.cache import Cached, difference, pack, unpack
from mpo_exporter.progress import Log, no_log
from mpo_formats import FormatError, MpoError, OutputError

try:
    import fcntl
except ImportError:  # not POSIX: two runs on one folder are not noticed
    fcntl = None  # type: ignore[assignment]

# To be raised whenever the parts of a run before would be understood wrongly.
VERSION = 1
REQUEST, LOCK, SUFFIX = "request", "lock", ".part"


def work_folder(target: Path) -> Path:
    """The work folder of an export that writes `target`."""
    return target.with_name(f".{target.name}.export")


class Work:
    """Parts of an export by name, each a dictionary of arrays, in a folder of its own; a `Store`.

    Args:
        folder: is made if it is missing.
        key: what the parts depend on, as plain JSON data; parts of another key are dropped, which is logged.

    Raises:
        OutputError: for a folder that another run uses, that something else is in, or that cannot be written.
    """

    def __init__(self, folder: Path, key: dict[str, Any], log: Log = no_log) -> None:
        self.folder, self.key, self.log = folder, {"version": VERSION, **key}, log
        self._lock = self._locked()
        try:
            self._adopt()
        except BaseException:
            self._lock.close()
            raise

    def _locked(self) -> BinaryIO:
        try:
            self.folder.mkdir(exist_ok=True)
            if any(self.folder.iterdir()) and not (self.folder / LOCK).exists():
                raise OutputError(
                    f"{self.folder}: expected a work folder of mpo-export, found something else; move it away"
                )
            handle = (self.folder / LOCK).open("ab")
        except OSError as error:
            raise OutputError(
                f"{self.folder}: cannot be used as work folder ({error.strerror}); give another folder with --out"
            ) from None
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                handle.close()
                raise OutputError(
                    f"{self.folder}: another export to the same file is running; wait for it, or give another --out"
                ) from None
        return handle

    def _adopt(self) -> None:
        """Keeps the parts of a run before if they are of the same request, and drops all else."""
        for left in self.folder.iterdir():
            if left.is_dir():  # spilled activations and unfinished files of a run that was killed
                shutil.rmtree(left)
            elif left.suffix not in (SUFFIX, "") or left.name.startswith("."):
                left.unlink()
        before = self._load(REQUEST)
        found = None if before is None else before[0]
        if found == self.key:
            if self.parts():
                self.log(f"going on with the work of a run that was stopped: {self.folder}")
            return
        if self.parts():
            why = "damaged" if found is None else f"of another request or version ({difference(found, self.key)})"
            self.log(f"{self.folder}: the work in it is {why}; starting again")
        for part in self.parts():
            self.forget(part)
        self.write(REQUEST, {})

    def parts(self, prefix: str = "") -> list[str]:
        """The names of the parts that begin so, but for the request."""
        names = (path.name.removesuffix(SUFFIX) for path in self.folder.glob(f"*{SUFFIX}"))
        return sorted(name for name in names if name.startswith(prefix) and name != REQUEST)

    def read(self, name: str) -> Arrays | None:
        """The arrays of that name; None if there are none, or only damaged ones."""
        found = self._load(name)
        return None if found is None else found[1]

    def _load(self, name: str) -> tuple[Any, Arrays] | None:
        """The key that a part was made under, and its arrays."""
        try:
            key, cached = unpack(self._path(name).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, FormatError, KeyError, TypeError, ValueError):
            self.log(f"{self._path(name)}: is damaged; that part is done again")
            return None
        return key, cached.arrays

    def write(self, name: str, arrays: Arrays) -> None:
        """Keeps arrays under that name, in the place of those before.

        Raises:
            OutputError: when the disk is full.
        """
        path = self._path(name)
        temporary = path.with_name(f".{path.name}")
        try:
            temporary.write_bytes(pack(self.key, Cached(None, arrays)))
            os.replace(temporary, path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise OutputError(
                f"{self.folder}: cannot keep the work done so far ({error.strerror}); free some space and start again, "
                "it goes on from there"
            ) from None

    def forget(self, name: str) -> None:
        """Drops the arrays of that name, if there are any."""
        self._path(name).unlink(missing_ok=True)

    def scope(self, prefix: str, digest: str) -> None:
        """Drops the parts whose names begin with `prefix` unless they were made under the same digest."""
        mark = f"{prefix}-of-{digest}"
        if mark not in self.parts(prefix):
            for part in self.parts(prefix):
                self.forget(part)
            self.write(mark, {})

    def temporary(self) -> Path:
        """A new folder for files that no later run can use."""
        folder = self.folder / "temporary"
        folder.mkdir(exist_ok=True)
        return folder

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def close(self, *, remove: bool) -> None:
        """Gives the folder back, and removes it if nothing will go on from it."""
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


@contextmanager
def working(folder: Path, key: dict[str, Any], *, keep: bool = False, log: Log = no_log) -> Iterator[Work]:
    """A work folder during an export: removed when that is finished or has failed for good, kept when it was stopped.

    Args:
        keep: keeps it in any case.

    Raises:
        OutputError: as `Work` does.
    """
    work = Work(folder, key, log)
    try:
        yield work
    except BaseException as error:
        # Of a model or a plan that is wrong no work is of use; a full disk or a stop are no reasons to lose it.
        hopeless = isinstance(error, MpoError) and not isinstance(error, OutputError)
        work.close(remove=hopeless and not keep)
        if not hopeless:
            log(f"the work done so far is kept in {folder}; the same command goes on from there")
        raise
    work.close(remove=not keep)
