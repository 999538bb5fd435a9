"""How figures are written on the page: units, digits, short names."""

from __future__ import annotations

from mpo_exporter.report.facts import Layer

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


def short(matrix: str) -> str:
    """A matrix's short name."""
    return SHORT.get(matrix, matrix)


def compact(value: float, digits: int = 3) -> str:
    """A number in so many significant digits, without an exponent down to a millionth."""
    if value == 0:
        return "0"
    if 1e-6 <= abs(value) < 1e6:
        text = f"{value:.{digits}g}"
        return f"{float(text):.7f}".rstrip("0").rstrip(".") if "e" in text else text
    return f"{value:.{digits - 1}e}"


def tick(value: float) -> str:
    """A number on an axis."""
    return f"{value:.6g}" if 1e-4 <= abs(value) < 1e6 or value == 0 else f"{value:.0e}".replace("e-0", "e-")


def percent(share: float, digits: int = 1) -> str:
    """A share in per cent."""
    return f"{100 * share:.{digits}f} %"


def change(after: float, before: float) -> str:
    """The change in per cent, with its sign."""
    return f"{100 * (after / before - 1):+.1f} %".replace("-", "−")


def times(ratio: float) -> str:
    """A ratio, in digits that show what it is made of."""
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.1f}×"


def seconds(value: float) -> str:
    """A time."""
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 100:
        return f"{value:.1f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 100 else f"{value / 3600:.1f} h"


def byte_unit(largest: float) -> tuple[float, str]:
    """The unit for sizes up to `largest`, in bytes, and its name."""
    for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= size:
            return size, name
    return 1.0, "B"


def place(layer: Layer) -> str:
    """Where a layer is, in words."""
    return short(layer.matrix) if layer.block is None else f"block {layer.block} {short(layer.matrix)}"


def terms(layer: Layer) -> str:
    """What a layer is stored as."""
    return " + ".join(term.text for term in layer.terms)
