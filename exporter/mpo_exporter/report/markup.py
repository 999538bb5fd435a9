"""The building blocks of the page: HTML and SVG elements, and how figures and names are written in them.

Text is escaped unless `element` or `join` made it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from mpo_exporter.report.facts import Layer

# Characters that neither HTML nor XML may contain: control characters (except tab and line feed), surrogates, two others.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
# Short names of matrices.
SHORT = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
    "model.embed_tokens": "embedding",
    "lm_head": "head",
}
# Elements without an end tag.
VOID = frozenset(("meta", "br", "col"))


class Markup(str):
    """Text that is markup and is not escaped again."""

    __slots__ = ()


Child = str | None | Iterable["Child"]
Value = str | float | None


def element(tag: str, /, *children: Child, **attributes: Value) -> Markup:
    """An element with its children.

    Args:
        children: text, which is escaped; markup, which is not; lists of both; None, which is left out.
        attributes: `class_` is written as class, `stroke_width` as stroke-width; None is left out.
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
    """The children one after another, escaped where needed."""
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
    """A value as text without forbidden characters; numbers with at most two decimals, enough for coordinates."""
    if isinstance(value, str):
        return _FORBIDDEN.sub("�", value)
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def short(matrix: str) -> str:
    """A matrix's short name, such as `q` for `self_attn.q_proj`."""
    return SHORT.get(matrix, matrix)


def compact(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits; with an exponent only below 1e-6 and from 1e6 on."""
    if value == 0:
        return "0"
    if 1e-6 <= abs(value) < 1e6:
        text = f"{value:.{digits}g}"
        return f"{float(text):.7f}".rstrip("0").rstrip(".") if "e" in text else text
    return f"{value:.{digits - 1}e}"


def tick(value: float) -> str:
    """A number as the label of an axis."""
    return f"{value:.6g}" if 1e-4 <= abs(value) < 1e6 or value == 0 else f"{value:.0e}".replace("e-0", "e-")


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{100 * share:.{digits}f} %"


def change(after: float, before: float) -> str:
    """The relative change as a percentage, with its sign."""
    return f"{100 * (after / before - 1):+.1f} %".replace("-", "−")


def times(ratio: float) -> str:
    """A ratio such as 0.25×."""
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.1f}×"


def seconds(value: float) -> str:
    """A duration, in milliseconds to hours."""
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 100:
        return f"{value:.1f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 100 else f"{value / 3600:.1f} h"


def byte_unit(largest: float) -> tuple[float, str]:
    """The unit for sizes up to `largest`: its number of bytes, and its name."""
    for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= size:
            return size, name
    return 1.0, "B"


def place(layer: Layer) -> str:
    """A layer's block and matrix, such as `block 3 q`."""
    return short(layer.matrix) if layer.block is None else f"block {layer.block} {short(layer.matrix)}"


def terms(layer: Layer) -> str:
    """A layer's terms, such as `int4/32 + mpo χ=8`; `of H128` where they take the transform of blocks of 128 inputs."""
    return " + ".join(term.text for term in layer.terms) + transform(layer)


def transform(layer: Layer) -> str:
    """Which transform of its input a layer takes, such as ` of H128`; ` of T64` for a stored one."""
    if layer.transform:
        return f" of T{layer.transform}"
    return f" of H{layer.hadamard}" if layer.hadamard else ""
