"""Draws the pictures of README and docs from the results of other benchmarks: docs/quality.svg, accuracy.svg, speed.svg, chi.svg.

    python benchmarks/pictures.py
    python benchmarks/pictures.py --out build --format png

quality: KL against the size of the file; left granite-nano (quality.py with rows of peers.py, healing.py), right SmolLM2
(trained_model.py). accuracy: six tasks on SmolLM2 against size and KL (trained_model.py --tasks). speed: tokens per second
against the size of the file, with the limit of the read bandwidth, and peak memory (decode.py). chi: what smaller χ of one file
and healing give (healing.py). Needs matplotlib (`pip install 'mpo-runtime[report]'`).
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
DECODING = RESULTS / "2026-11-26-decode-2b.json"
SMOLLM2 = RESULTS / "2026-11-30-smollm2.json"
ACCURACY = RESULTS / "2026-11-30-smollm2-tasks.json"
# Files of integers that healing.py healed on a million tokens of the embedded text.
HEALED = ("auto, 4.25 bits", "auto, 3.3 bits", "auto, 3.0 bits", "auto, 2.5 bits")
OURS, THEIRS, CORES = "#0b62a4", "#d1495b", "#4c956c"
SHORT = {"4": "4 bits", "3+4": "3+4", "2+3": "2+3", "2": "2 bits", "4/chi32": "+ χ = 32", "dense": "dense bf16"}
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
    """SmolLM2: ours at the bytes of llama.cpp's types, with and without transforms of inputs."""
    rows = rows_of(SMOLLM2)

    def points(family: str) -> list[Point]:
        return sorted((row["file_bytes"] / 1e6, row["kl_mean"]) for row in rows if row["family"] == family)

    ours, plain = points("auto"), points("auto, no transforms")
    axes.plot(*zip(*ours, strict=True), "o-", color=OURS, linewidth=2, markersize=5)
    label(axes, ours[len(ours) // 2], "this project", OURS, (-8, -10), "right")
    if plain:
        axes.plot(*zip(*plain, strict=True), "o:", color=OURS, linewidth=1.2, markersize=4, markerfacecolor="white")
        label(axes, plain[0], "without transforms", OURS, (9, 4))
    types = [row for row in rows if row["family"] == "llama.cpp"]
    draw_types(axes, [(row["name"], (row["file_bytes"] / 1e6, row["kl_mean"])) for row in types], {"IQ3_XXS": (7, -3)})
    axes.set(title="SmolLM2-135M (trained by others)", xlim=(74, 114), ylim=(0.006, 0.7), xlabel="file, MB")


def draw_accuracy(left: Any, right: Any) -> None:
    """SmolLM2: mean accuracy on six tasks against the size of the file, and against KL, for every file that was asked."""
    rows = rows_of(ACCURACY)
    dense = next(row for row in rows if row["family"] == "dense")
    groups = (
        ("auto", "o", OURS, "this project, auto"),
        ("llama.cpp", "s", THEIRS, "llama.cpp"),
        ("int4", "^", OURS, "this project, int4"),
        ("paper", "D", CORES, "paper (cores)"),
        ("k-proj", "v", CORES, "k-proj (low rank)"),
    )
    for axes, along in ((left, lambda row: row["file_bytes"] / 1e6), (right, lambda row: row["kl_mean"])):
        axes.axhline(100 * dense["accuracy_mean"], color="#666666", linewidth=1.2, linestyle=":")
        for family, marker, color, text in groups:
            for healed in (False, True):
                found = [row for row in rows if row["family"] == family and row.get("healed", False) == healed]
                if found:
                    points = sorted((along(row), 100 * row["accuracy_mean"]) for row in found)
                    face = "white" if healed else color
                    name = f"{text}, healed" if healed else text
                    axes.plot(
                        *zip(*points, strict=True), marker, color=color, markersize=6, markerfacecolor=face, label=name
                    )
    left.set(
        title="SmolLM2-135M: six tasks", xlabel="file, MB", xscale="log", ylabel="mean accuracy, % of the questions"
    )
    left.set_xticks([40, 60, 80, 100, 200])
    left.xaxis.set_minor_formatter("")
    left.legend(fontsize=9, loc="lower right", frameon=False)
    right.set(title="the same against KL", xlabel="KL to the uncompressed model", xscale="log")
    right.annotate("dense", (right.get_xlim()[1], 100 * dense["accuracy_mean"]), fontsize=9, ha="right", va="bottom")


def draw_quality(left: Any, right: Any) -> None:
    """KL against the size of the file, for both models."""
    draw_nano(left)
    draw_smollm2(right)
    left.set_ylabel("KL to the uncompressed model (lower is better)")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("")


def draw_speed(left: Any, right: Any) -> None:
    """Tokens per second against the size of the file, below the limit that reading it sets; and peak memory."""
    content = json.loads(DECODING.read_text(encoding="utf-8"))
    bandwidth, rows = content["read_bandwidth"], content["rows"]
    sizes = [0.7 + 0.05 * step for step in range(90)]
    left.plot(sizes, [bandwidth / size for size in sizes], ":", color="#666666", linewidth=1.4)
    label(left, (2.6, bandwidth / 2.6), f"read bandwidth, {bandwidth:.0f} GB/s", "#666666", (8, 8))
    for ours, color in ((True, OURS), (False, THEIRS)):
        found = sorted(
            (row["bytes"] / 1e9, row["decode_tokens_per_second"], row["name"].split(" ", 1)[1])
            for row in rows
            if row["name"].startswith("mpo") == ours
        )
        points = [(size, speed) for size, speed, _ in found]
        left.plot(*zip(*points, strict=True), "o" if ours else "s", color=color, markersize=6)
        for point, (_, _, name) in zip(points, found, strict=True):
            chi = name == "4/chi32"
            offset, align = ((-7, -7), "right") if ours or name == "Q3_K_M" else ((7, -2), "left")
            label(left, point, SHORT.get(name, name), color, (7, 6) if chi else offset, "left" if chi else align)
    left.set(title="decoding, Granite 3.3 2B's sizes, 2 cores with AVX2", xlabel="file, GB", ylabel="tokens per second")
    left.set(xscale="log", yscale="log", xlim=(0.6, 7), ylim=(4, 60))
    left.set_xticks([0.7, 1, 2, 5])
    left.set_yticks([5, 10, 20, 40])
    left.xaxis.set_minor_formatter("")
    left.yaxis.set_minor_formatter("")
    right.plot((0, 5.5), (0, 5.5), ":", color="#666666", linewidth=1.4)
    label(right, (3.6, 3.6), "size of the file", "#666666", (8, -8))
    for row in rows:
        if row["launch"]:
            point = (row["bytes"] / 1e9, row["launch"]["peak_bytes"] / 1e9)
            right.plot(*point, "o", color=OURS, markersize=6)
    right.set(title="memory while it runs (512 positions of context)", xlabel="file, GB", ylabel="peak memory, GB")


def draw_chi(left: Any, right: Any) -> None:
    """KL by χ: what one file gives at smaller χ, and what files of different χ give by tokens of healing."""
    found = {row["plan"]: row for row in rows_of(HEALING)}
    plain = found["2 bits g64, χ = 32, healed on 1,000,000"]
    dropped = found["2 bits g64, χ = 32, healed with χ-dropout"]
    sides = {"not healed": plain["before"], "healed": plain["after"], "healed with χ-dropout": dropped["after"]}
    for (name, side), style in zip(sides.items(), ("o:", "o-", "v-"), strict=True):
        points = [(chi, side[part]["kl_mean"]) for chi, part in ((8, "quarter"), (16, "half"), (32, "full"))]
        left.plot(*zip(*points, strict=True), style, color=CORES, linewidth=1.6, label=name)
    left.set(title="one file of χ = 32, opened at smaller χ", xlabel="χ", ylabel="KL to the uncompressed model")
    left.set_xticks([8, 16, 32])
    lengths = {100: "100,000", 500: "500,000", 1000: "1,000,000", 4000: "4,000,000"}
    for chi, style in ((0, "o:"), (8, "o--"), (32, "o-")):
        points = [
            (count, found[f"2 bits g64, χ = {chi}, healed on {word}"]["after"]["full"]["kl_mean"])
            for count, word in lengths.items()
        ]
        right.plot(*zip(*points, strict=True), style, color=CORES if chi else OURS, linewidth=1.6, label=f"χ = {chi}")
    right.set(title="files of different χ (and bytes), healed", xlabel="thousands of tokens of healing", xscale="log")
    right.xaxis.set_minor_formatter("")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=9, frameon=False)


FIGURES = {"quality": draw_quality, "speed": draw_speed, "accuracy": draw_accuracy, "chi": draw_chi}


def draw(name: str, path: Path) -> None:
    """Writes a figure, .svg or .png; the same bytes every time."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "mpo", "svg.fonttype": "none", "font.size": 10}
    matplotlib.rcParams["font.sans-serif"] = ["Helvetica", "Arial", "DejaVu Sans"]
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, pair = pyplot.subplots(1, 2, figsize=(11, 4.8))
    FIGURES[name](*pair)
    for axes in pair:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.title.set_fontsize(11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="the folder to write to")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    arguments = parser.parse_args()
    for name in FIGURES:
        draw(name, arguments.out / f"{name}.{arguments.format}")


if __name__ == "__main__":
    main()
