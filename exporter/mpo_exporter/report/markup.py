"""Builds HTML and SVG from nested calls. Text is escaped by default: only what `element` made is taken as markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

# What neither HTML nor XML may hold: control characters but tab and line feed, surrogates, two non-characters.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
VOID = frozenset(("meta", "br", "col"))


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | None | Iterable["Child"]
Value = str | float | None


def element(tag: str, /, *children: Child, **attributes: Value) -> Markup:
    """An element with its children.

    Args:
        children: text, which is escaped; markup, which is not; lists of both; None, which is left out.
        attributes: `class_` means class, `stroke_width` stroke-width; None is left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if tag in VOID:
        return Markup(f"<{tag}{written}/>")
    return Markup(f"<{tag}{written}>{join(*children)}</{tag}>")


def join(*children: Child) -> Markup:
    """Children one after another."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(html.escape(plain(child), quote=False))
        elif child is not None:
            parts.append(join(*child))
    return Markup("".join(parts))


def plain(value: str | float) -> str:
    """A value as text that a page may hold; numbers with at most two decimals, as coordinates need."""
    if isinstance(value, str):
        return _FORBIDDEN.sub("�", value)
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
