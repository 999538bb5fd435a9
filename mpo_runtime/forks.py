"""New locks after a fork: a lock that another thread held at the fork would never be released in the child process."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Renewed(Protocol):
    """An object that holds locks."""

    def renew_after_fork(self) -> None:
        """Replaces the locks and drops the unfinished work of other threads."""


_renewed: weakref.WeakSet[Renewed] = weakref.WeakSet()


def renew_in_children(holder: Renewed) -> None:
    """Calls `holder.renew_after_fork` in every forked child of this process, as long as the holder exists."""
    _renewed.add(holder)


def _renew_all() -> None:
    for holder in list(_renewed):
        holder.renew_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
