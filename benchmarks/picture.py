"""Draws docs/quality.svg, the picture of the README: KL against the size of the file, from the results of other benchmarks.

    python benchmarks/picture.py
    python benchmarks/picture.py --out build/quality.png

Left granite-nano, from results of quality.py (with rows of peers.py) and healing.py; right SmolLM2, from figures measured by
hand. Needs matplotlib (`pip install 'mpo-runtime[report]'`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
QUALITY = RESULTS / "2026-11-26-quality.json"
HEALING = RESULTS / "2026-11-27-healing-h200.json"
SMOLLM2 = RESULTS / "2026-11-29-smollm2-by-hand.json"
# Files of integers that healing.py healed on a million tokens of the embedded text.
HEALED = ("auto, 4.25 bits", "auto, 3.3 bits", "auto, 3.0 bits", "auto, 2.5 bits")
OURS, THEIRS, CORES = "#0b62a4", "#d1495b", "#4c956c"
Point = tuple[float, float]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of results."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def quality_points(rows: Iterable[dict[str, Any]], family: str, chi: int | None = None) -> list[Point]:
    """(MB of the file, KL) of a family of quality.py, by size; `chi` None takes any."""
    return sorted(
        (row["file_bytes"] / 1e6, row["measured"]["all"]["kl_mean"])
        for row in rows
        if row["family"] == family and chi in (None, row["chi"])
    )


def healed_points(rows: Iterable[dict[str, Any]]) -> list[Point]:
    """(MB of the file, KL after healing) of files of integers."""
    return sorted((row["file_bytes"] / 1e6, row["after"]["full"]["kl_mean"]) for row in rows if row["plan"] in HEALED)


def label(axes: Any, point: Point, text: str, color: str, offset: Point = (6, 0), align: str = "left") -> None:
    """Writes beside a point what it is."""
    axes.annotate(
        text, point, xytext=offset, textcoords="offset points", color=color, fontsize=9, ha=align, va="center"
    )


def draw_nano(axes: Any) -> None:
    """granite-nano: ours before and after healing, llama.cpp's types, and cores beside and instead of integers."""
    rows = rows_of(QUALITY)
    ours = quality_points(rows, "compensated", 0)
    cores = quality_points(rows, "compensated", 8)
    published, fitted = quality_points(rows, "naive MPO"), quality_points(rows, "ALS MPO")
    healed = healed_points(rows_of(HEALING))
    axes.plot(*zip(*published, strict=True), ":", color=CORES, linewidth=1.4)
    axes.plot(*zip(*fitted, strict=True), "-.", color=CORES, linewidth=1.4)
    label(axes, published[3], "cores alone, as published", CORES, (10, 9))
    label(axes, fitted[3], "cores alone, fitted to activations", CORES, (10, 9))
    axes.plot(
        *zip(*cores, strict=True), "--", color=CORES, linewidth=1.4, label="this project, integers + cores (χ = 8)"
    )
    axes.plot(*zip(*ours, strict=True), "o-", color=OURS, linewidth=2, markersize=5, label="this project, integers")
    axes.plot(
        *zip(*healed, strict=True), "v", color=OURS, markersize=7, markerfacecolor="white", label="… after healing"
    )
    axes.plot([], [], "s", color=THEIRS, label="llama.cpp, same calibration text")
    types = [row for row in rows if row["family"] == "llama.cpp"]
    draw_types(axes, [(row["size"], *quality_points([row], "llama.cpp")) for row in types], {"IQ3_XXS": (7, -8)})
    axes.legend(fontsize=9, loc="lower left", frameon=False)
    axes.set(title="granite-nano (18 M parameters, ships here)", xlim=(4.6, 12.8), ylim=(0.0002, 30), xlabel="file, MB")


def draw_types(axes: Any, types: Iterable[tuple[str, Point]], offsets: Mapping[str, Point]) -> None:
    """llama.cpp's types, each with its name, at an offset of its own where it would stand on another."""
    for name, point in types:
        axes.plot(*point, "s", color=THEIRS, markersize=6)
        label(axes, point, name, THEIRS, offsets.get(name, (7, 7)))


def draw_smollm2(axes: Any) -> None:
    """SmolLM2: ours at the bytes of llama.cpp's types."""
    rows = rows_of(SMOLLM2)
    ours = sorted((row["megabytes"], row["kl_mean"]) for row in rows if row["family"] == "auto")
    axes.plot(*zip(*ours, strict=True), "o-", color=OURS, linewidth=2, markersize=5)
    label(axes, ours[1], "this project", OURS, (-12, -9), "right")
    default = next((row["megabytes"], row["kl_mean"]) for row in rows if row["size"].startswith("default"))
    axes.plot(*default, "o", color=OURS, markersize=6, markerfacecolor="white")
    label(axes, default, "default", OURS, (-6, -13))
    types = [row for row in rows if row["family"] == "llama.cpp"]
    points = [(row["size"], (row["megabytes"], row["kl_mean"])) for row in types]
    draw_types(axes, points, {"Q4_0": (7, -8), "IQ3_XXS": (5, 9)})
    axes.set(
        title="SmolLM2-135M (trained by others; measured by hand)",
        xlim=(69, 113),
        ylim=(0.009, 0.5),
        xlabel="file, MB",
    )


def draw(path: Path) -> None:
    """Writes the figure, .svg or .png; the same bytes every time."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "mpo", "svg.fonttype": "none", "font.size": 10}
    matplotlib.rcParams["font.sans-serif"] = ["Helvetica", "Arial", "DejaVu Sans"]
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.8))
    draw_nano(left)
    draw_smollm2(right)
    left.set_ylabel("KL to the uncompressed model (lower is better)")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter("")
        axes.title.set_fontsize(11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "quality.svg", help=".svg or .png")
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
