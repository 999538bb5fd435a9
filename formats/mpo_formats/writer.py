"""Writes a `.mpo` file that appears complete or not at all.

The header is written first, because the layer table determines every size; then tensors are written in file order and not
kept in memory. All goes to a temporary file beside the target, which is synced to disk and renamed over the target; then the
folder is synced. A failure before the rename leaves the target unchanged.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_formats import container
from mpo_formats.architecture import ModelSpec
from mpo_formats.codec import to_json
from mpo_formats.errors import FormatError, OutputError
from mpo_formats.layout import CERTIFICATE, CERTIFICATE_SIZE, PADDING, TensorSpec, file_tensors
from mpo_formats.packing import first_not_finite
from mpo_formats.provenance import Certificates
from mpo_formats.reader import FORMAT, NUMPY
from mpo_formats.spec import Layouts

TEMPORARY = ".partial"


def reserve(descriptor: int, size: int) -> bool:
    """Claims disk space for the first `size` bytes of a file; False where the system or the file system cannot do that.

    Raises:
        OSError: when the disk has less space left.
    """
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return False
    return True


class MpoWriter:
    """Writes the tensors of `spec` to `path`; a context manager that removes the temporary file unless committed.

        with MpoWriter(path, spec) as writer:
            for tensor in writer.pending():
                writer.write(tensor.name, array)
            writer.commit(measure)

    Args:
        folder: for the temporary file, on the disk of the target; None for the target's own.

    Raises:
        OutputError: when the target exists and `force` is not given, or the disk refuses the bytes.
    """

    def __init__(self, path: str | Path, spec: ModelSpec, *, force: bool = False, folder: Path | None = None) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise OutputError(f"{self.path}: is a folder; give the name of a file with --out")
        self._force = force
        self._refuse_existing()
        self.spec = spec
        self._tensors = file_tensors(spec)
        self._next = 0
        self._digests: list[bytes] = []
        self.temporary = (folder or self.path.parent) / f".{self.path.name}.{secrets.token_hex(4)}{TEMPORARY}"
        self._committed = False
        header = container.write_header(spec_metadata(spec), self._tensors)
        with self._disk_errors():
            self._file = self.temporary.open("xb")
        try:
            with self._disk_errors():
                self._reserve(len(header))
                self._append(header)
        except BaseException:
            self._discard()
            raise

    def _refuse_existing(self) -> None:
        if not self._force and os.path.lexists(self.path):
            raise OutputError(f"{self.path}: exists already; give another name with --out or overwrite it with --force")

    def _reserve(self, header_size: int) -> None:
        """Claims disk space for the whole file, so that a full disk is noticed before the work begins."""
        size = header_size + sum(tensor.size for tensor in self._tensors)
        reserve(self._file.fileno(), size)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            size = sum(tensor.size for tensor in self._tensors)
            raise OutputError(
                f"{self.path}: cannot write {size / 1e6:.1f} MB ({error.strerror or error}); "
                "free some space or give another folder with --out"
            ) from error

    def pending(self) -> Iterator[TensorSpec]:
        """Yields the content tensors that have not been written yet, in the order in which they must come."""
        while (tensor := self._tensors[self._next]).name != CERTIFICATE:
            yield tensor

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Appends one tensor, which must be the next pending one; bf16 is given as uint16 bit patterns.

        Raises:
            FormatError: when name, element type or shape is not the expected one, or a value is not finite.
            OutputError: when the disk refuses the bytes.
        """
        tensor = self._tensors[self._next]
        if name != tensor.name or array.shape != tensor.shape or array.dtype != NUMPY[tensor.dtype]:
            raise FormatError(
                f"{self.path.name}: expected tensor {tensor}, found {name} {array.dtype} {list(array.shape)}"
            )
        index = first_not_finite(array, tensor.dtype)
        if index is not None:
            raise FormatError(f"{self.path.name}: {name}: element {index} is not finite")
        with self._disk_errors():
            self._append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            self._next += 1
            if self._tensors[self._next].name.startswith(PADDING):
                self._append(bytes(self._tensors[self._next].size))
                self._next += 1

    def _append(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._digests.append(hashlib.sha256(content).digest())

    def commit(self, measure: Callable[[Path], Certificates] | None = None) -> None:
        """Finishes the file and puts it in place.

        Args:
            measure: called with the path of the finished temporary file, whose certificates are then written into it.

        Raises:
            FormatError: when tensors are missing.
            OutputError: when the disk refuses the bytes, or the target was created in the meantime without `force`.
        """
        if self._tensors[self._next].name != CERTIFICATE:
            raise FormatError(f"{self.path.name}: tensor {self._tensors[self._next].name} was never written")
        place = self._file.tell()
        self._finish(place, Certificates(()))
        if measure is not None:
            certificates = measure(self.temporary)
            del self._digests[-1]
            self._finish(place, certificates)
        with self._disk_errors():
            os.fsync(self._file.fileno())
            self._file.close()
            self._refuse_existing()  # it may have been created while the tensors were computed
            os.replace(self.temporary, self.path)
            self._committed = True
            sync_folder(self.path.parent)

    def _finish(self, place: int, certificates: Certificates) -> None:
        text = to_json(certificates).encode()
        if len(text) > CERTIFICATE_SIZE:
            raise FormatError(f"{CERTIFICATE}: {len(text)} bytes exceed {CERTIFICATE_SIZE}; record fewer prefixes")
        with self._disk_errors():
            self._file.seek(place)
            self._append(text.ljust(CERTIFICATE_SIZE))
            self._file.write(b"".join(self._digests))
            self._file.flush()

    def _discard(self) -> None:
        # Closing writes the buffered bytes, which fails again on a full disk.
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self.temporary.unlink()

    def __enter__(self) -> MpoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._committed:
            self._discard()


def spec_metadata(spec: ModelSpec) -> dict[str, str]:
    """The header's metadata strings, in the oldest version that can say what the model is."""
    version = spec.version
    return {
        "format": FORMAT,
        "version": version,
        "layouts": to_json(Layouts()),
        "architecture": to_json(spec.architecture, version),
        "layers": to_json(spec.linears, version),
        "vectors": to_json(spec.vectors, version),
        "files": to_json(spec.files, version),
        "provenance": to_json(spec.provenance),
    }


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk, so that a rename survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not support this call; they order renames themselves.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)
