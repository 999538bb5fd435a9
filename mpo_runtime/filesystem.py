"""The user's folders, which a user in a container may not have, and files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path


def home_folder() -> Path | None:
    """The user's home folder; None where neither HOME nor the list of users names one."""
    if os.name == "posix" and not os.environ.get("HOME"):
        import pwd

        try:
            return Path(pwd.getpwuid(os.getuid()).pw_dir)
        except KeyError:
            return None
    try:
        return Path.home()
    except RuntimeError:
        return None


def user_folder(variable: str, default: str) -> Path | None:
    """The folder that an XDG variable names, else `default` in the home folder, None without one.

    The XDG specification has relative paths ignored.
    """
    chosen = os.environ.get(variable, "")
    if os.path.isabs(chosen):
        return Path(chosen)
    home = home_folder()
    return None if home is None else home / default


def expand_user(path: str) -> Path:
    """A path in which `~` and `~name` stand for home folders, as far as there are such folders."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def replace_file(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Writes a file through a sibling that takes its place once it is complete and on the disk.

    A new file has the rights that the umask says, as any other program's files do; an existing one keeps its own.

    Raises:
        OSError: where it cannot be written; what was there before is kept.
    """
    temporary = path.with_name(f".{path.name[:64]}.{secrets.token_hex(4)}.partial")
    try:
        with temporary.open("xb") as file:
            for part in [content] if isinstance(content, bytes) else content:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
