"""The results of benchmarks/quality.py in words: the table, where cores help and where they do not, and the plot."""

from __future__ import annotations

from typing import Any

from parts.judge import DOMAINS
from parts.rows import ALONE, METHODS

Entry = dict[str, Any]
# Smaller relative differences of the KL are called no difference.
NOISE = 0.05


def markdown(rows: list[Entry]) -> str:
    """The rows as a Markdown table, by size."""
    lines = [
        "| bits a weight | MB file | MB tensors | family | χ | perplexity | KL to dense | stories / web / chat | 99.9 % | "
        "same top token |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        whole = row["measured"]["all"]
        parts = " / ".join(f"{row['measured'][name]['kl_mean']:.4f}" for name in DOMAINS)
        lines.append(
            f"| {row['bits_per_weight']:.2f} | {row['file_bytes'] / 1e6:.3f} | {row['tensor_bytes'] / 1e6:.3f} | "
            f"{row['family']}{', ' + row['size'] if isinstance(row['size'], str) else ''} | {row['chi'] or ''} | "
            f"{whole['perplexity']:.2f} ± {whole['perplexity_error']:.2f} | {whole['kl_mean']:.4f} | {parts} | "
            f"{whole['kl_999']:.3f} | {100 * whole['same_top1']:.1f} % |"
        )
    return "\n".join(lines)


def divergence(row: Entry) -> float:
    """KL to the dense model over all domains."""
    return float(row["measured"]["all"]["kl_mean"])


def where_cores_help(rows: list[Entry]) -> str:
    """For every method, the KL with cores divided by that without at the same bytes; and of cores alone by that of integers."""
    found = {(row["family"], row["size"], row["chi"]): divergence(row) for row in rows}
    lines = ["Cores beside integers: KL over that of the same bytes without cores (below 1 they help)."]
    for family in METHODS:
        chis = sorted({chi for name, _, chi in found if name == family and chi})
        sizes = sorted({size for name, size, chi in found if name == family and chi and (name, size, 0) in found})
        if not sizes:
            continue
        lines += [
            "",
            f"| {family}, bits | " + " | ".join(f"χ={chi}" for chi in chis) + " |",
            "|---" * (len(chis) + 1) + "|",
        ]
        best = {}
        for size in sizes:
            ratios = {
                chi: found[family, size, chi] / found[family, size, 0] for chi in chis if (family, size, chi) in found
            }
            best[size] = min(ratios.values())
            cells = (f"{ratios[chi]:.2f}" if chi in ratios else "–" for chi in chis)
            lines.append(f"| {size} | " + " | ".join(cells) + " |")
        lines += ["", f"{family.capitalize()}: {sentence(best)}"]
    lines += ["", *cores_alone(found)]
    return "\n".join(lines)


def sentence(best: dict[float, float]) -> str:
    """Where the best χ of each size helps, hurts, or makes no difference."""
    helps = [f"{size}" for size, ratio in best.items() if ratio < 1 - NOISE]
    hurts = [f"{size}" for size, ratio in best.items() if ratio > 1 + NOISE]
    level = [f"{size}" for size in best if str(size) not in helps + hurts]
    parts = [
        f"{words} at {', '.join(sizes)} bits"
        for words, sizes in (
            ("the best χ lowers the KL", helps),
            ("even the best χ raises it", hurts),
            (f"the best χ changes it by less than {NOISE:.0%}", level),
        )
        if sizes
    ]
    return "; ".join(parts) + "."


def cores_alone(found: dict[tuple[str, float, int], float]) -> list[str]:
    """A sentence on cores instead of integers, compared with error-compensated integers of the same bytes."""
    lines = []
    for family in ALONE:
        ratios = {
            size: value / found["compensated", size, 0]
            for (name, size, _), value in sorted(found.items(), key=lambda item: str(item[0]))
            if name == family and ("compensated", size, 0) in found
        }
        if ratios:
            words = ", ".join(f"{ratio:.0f}× at {size}" for size, ratio in sorted(ratios.items()))
            better = [size for size, ratio in ratios.items() if ratio < 1]
            lines.append(
                f"{family} alone: KL {words} bits that of compensated integers; "
                f"{'better at ' + str(better) if better else 'never better'}."
            )
    return lines
