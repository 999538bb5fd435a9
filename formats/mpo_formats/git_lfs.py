"""Git LFS pointers: the few lines of text that a clone without git-lfs holds in the place of each large file."""

from __future__ import annotations

from typing import Final

_FIRST_LINE: Final = b"version https://git-lfs.github.com/spec/"
_UTF8_MARK: Final = b"\xef\xbb\xbf"


def is_pointer(head: bytes) -> bool:
    """Whether a file that starts with `head` (64 bytes are enough) is a Git LFS pointer."""
    return head.removeprefix(_UTF8_MARK).lstrip().startswith(_FIRST_LINE)


def pointer_message(name: object) -> str:
    """What is wrong with the file `name`, which is a pointer, and the remedy."""
    return (
        f"{name}: is a Git LFS pointer, not the file itself; install Git LFS, then run in its folder: "
        "git lfs install && git lfs pull"
    )
