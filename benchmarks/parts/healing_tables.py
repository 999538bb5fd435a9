"""Tables of healing: what it gives back and what it costs."""

from __future__ import annotations

import statistics

from parts.cells import Row, kl, percent, rows_of, table
from parts.quality_tables import name_of, paired_error, shortened

HEALED = "2026-11-27-healing-h200.json"
# Files of results, and whether blocks were matched. A row of a later file takes the place of the same row of an earlier one.
HEALED_SMOLLM2 = {
    "2026-12-01-smollm2-healed.json": "yes",
    "2026-12-01-smollm2-healed-more.json": "yes",
    "2026-12-01-smollm2-healed-again.json": "no",
    "2026-12-01-smollm2-healed-long.json": "no",
}
HEALED_NAMES = {
    "auto, 4.25 bits": "`auto`, 4.25 bits",
    "auto, 3.3 bits": "`auto`, 3.3 bits",
    "auto, 3.0 bits": "`auto`, 3 bits",
    "auto, 3.0 bits, cores of χ = 8 among them": "… with cores of χ = 8 among them",
    "auto, 2.5 bits": "`auto`, 2.5 bits",
    "auto, 2.5 bits, cores of χ = 4 among them": "… with cores of χ = 4 among them",
    "integers and int4 cores, 2.0 bits": "integers and int4 cores, 2 bits over everything",
    "paper, 30 % of the parameters": "`paper`, 30 % of the attention and MLP parameters",
    "whitened SVD, 30 % of the parameters": "whitened SVD, as many parameters",
    "paper, file 93 % below fp32": "`paper`, file 93 % below fp32",
    "whitened SVD, file 93 % below fp32": "whitened SVD, file 93 % below fp32",
    "k-proj": "`k-proj`, key projections alone",
}
HEALED_HEAD = ("plan", "bits per weight", "KL before → healed (left)", "perplexity", "next token", "minutes")


def healed_line(row: Row, name: str) -> list[str]:
    """A row of a table of healing."""
    before, after = row["before"]["full"], row["after"]["full"]
    left = after["kl_mean"] / before["kl_mean"]
    return [
        name,
        f"{row['bits_per_weight']:.2f}",
        f"{kl(before['kl_mean'])} → {kl(after['kl_mean'])} ({left:.2f})",
        f"{before['perplexity']:.1f} → {after['perplexity']:.1f}",
        f"{100 * before['accuracy']:.1f} → {percent(after['accuracy'])}",
        f"{row['minutes']:.1f}",
    ]


def healing(suffix: str = "") -> str:
    """Plans before and after healing; `suffix` chooses the rows with more text."""
    found = {row["plan"]: row for row in rows_of(HEALED)}
    named = [(found[key + suffix], name) for key, name in HEALED_NAMES.items() if key + suffix in found]
    return table(HEALED_HEAD, [healed_line(row, name) for row, name in named])


def healing_corpus() -> str:
    """Plans before and after healing on more text."""
    return healing(", healed and measured on the corpus")


def healing_lengths() -> str:
    """KL by χ and by the tokens of healing."""
    body = []
    for chi in (0, 8, 32):
        found = {row["plan"]: row for row in rows_of(HEALED)}
        named = [
            found[f"2 bits g64, χ = {chi}, healed on {count}"]
            for count in ("100,000", "500,000", "1,000,000", "4,000,000")
        ]
        left = [kl(row["after"]["full"]["kl_mean"]) for row in named]
        body.append([str(chi), f"{named[0]['bits_per_weight']:.2f}", kl(named[0]["before"]["full"]["kl_mean"]), *left])
    return table(("χ", "bits per weight", "not healed", "100k", "500k", "1M", "4M"), body)


def healing_prefixes() -> str:
    """KL of prefixes of χ, healed with and without χ-dropout."""
    found = {row["plan"]: row for row in rows_of(HEALED)}
    plain, dropped = (
        found["2 bits g64, χ = 32, healed on 1,000,000"],
        found["2 bits g64, χ = 32, healed with χ-dropout"],
    )
    sides = {"before healing": plain["before"], "healed without": plain["after"], "healed with": dropped["after"]}
    parts = ("full", "half", "quarter")
    body = [[name, *(kl(side[part]["kl_mean"]) for part in parts)] for name, side in sides.items()]
    return table(("", "full χ", "half", "quarter"), body)


def heal_cost() -> str:
    """Time and memory of a healing step over a dense one: medians of the runs."""
    names = {
        "fp16 cores (O,1)×(1,I), 30 % of the parameters": "cores (O,1)×(1,I), 30 % of the parameters",
        "fp16 cores (balanced), 30 % of the parameters": "balanced cores, 30 %",
        "3 bits, codes too": "integers of 3 bits, with codes",
        "3 bits, scales and norms": "integers of 3 bits, scales alone",
    }
    body = []
    for part, name in names.items():
        cells = [name]
        for file in ("2026-11-26-heal-cost-matching.json", "2026-11-27-heal-cost-2b-h200.json"):
            rows = rows_of(file)
            runs = sorted({row.get("run", 0) for row in rows})
            by = {(row.get("run", 0), row["trained_part"]): row for row in rows}
            ratios = [
                statistics.median(by[run, part][key] / by[run, "dense training"][key] for run in runs)
                for key in ("seconds", "peak_bytes")
            ]
            cells.append(" / ".join(f"{ratio:.2f}" for ratio in ratios))
        body.append(cells)
    return table(("what is trained", "granite-nano, 2 CPU threads", "2B sizes, H200"), body)


def healed_smollm2() -> str:
    """SmolLM2 before and after a short healing: divergence, perplexity, accuracy on six tasks, and an answer."""
    dense = next(row for row in rows_of(next(iter(HEALED_SMOLLM2))) if row["family"] == "dense")
    pairs: dict[tuple[str, ...], tuple[Row, Row, str]] = {}
    for file, matched in HEALED_SMOLLM2.items():
        rows = rows_of(file)
        found = {(row["family"], row["name"]): row for row in rows if row.get("healed") is False}
        for row in rows:
            if row.get("healed"):
                key = row["family"], row["name"]
                pairs[(*key, row.get("heal_tokens", "40k"))] = found[key], row, matched
    body = [
        (
            "dense",
            "",
            "",
            f"{dense['file_bytes'] / 1e6:.1f}",
            "",
            f"{dense['perplexity']:.2f}",
            points(dense),
            "",
            answer(dense),
        )
    ]
    for before, after, matched in pairs.values():
        change = 100 * (after["accuracy_mean"] - before["accuracy_mean"])
        body.append(
            (
                name_of(before),
                after.get("heal_tokens", "40k"),
                matched,
                f"{after['file_bytes'] / 1e6:.1f}",
                f"{kl(before['kl_mean'])} → {kl(after['kl_mean'])} ({after['kl_mean'] / before['kl_mean']:.2f})",
                f"{before['perplexity']:.1f} → {after['perplexity']:.1f}",
                f"{points(before)} → {points(after)}",
                f"{change:+.1f} ± {100 * paired_error(after, before):.1f}",
                answer(after),
            )
        )
    head = (
        "file",
        "tokens",
        "blocks matched",
        "MB",
        "KL before → healed (left)",
        "perplexity",
        "accuracy, six tasks",
        "change",
        "says, healed",
    )
    return table(head, body)


def points(row: Row) -> str:
    """The mean accuracy of a row."""
    return f"{100 * row['accuracy_mean']:.1f}"


def answer(row: Row) -> str:
    """What a file answers to the first prompt."""
    return shortened(next(iter(row["samples"].values())), 60)
