"""Forks: locks that another thread held at that moment would stay shut in the child for ever, so it gets new ones."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Renewed(Protocol):
    """What holds a lock."""

    def renew_after_fork(self) -> None:
        """Makes the locks anew, and forgets what another thread was in the middle of."""


_renewed: weakref.WeakSet[Renewed] = weakref.WeakSet()


def renew_in_children(holder: Renewed) -> None:
    """Has `holder.renew_after_fork` called in every child of this process, for as long as the holder lives."""
    _renewed.add(holder)


def _renew_all() -> None:
    for holder in list(_renewed):
        holder.renew_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
