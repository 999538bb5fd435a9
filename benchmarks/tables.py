"""Writes the tables of docs/results.md, paper.md and serving.md that follow a line `<!-- table: NAME -->` from the results.

    python benchmarks/tables.py            # writes them
    python benchmarks/tables.py --check    # ends with status 1 where one is not what the results say

A test checks them too, and demands that docs/results.md has no other tables of figures. To add a table, write a function that
returns its lines, name it in TABLES, and put the line into the document.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = tuple(ROOT / "docs" / name for name in ("results.md", "paper.md", "serving.md"))
RESULTS = ROOT / "benchmarks" / "results"
MARKER = re.compile(r"^(<!-- table: ([\w-]+) -->\n\n)((?:\|.*\n)*)", re.MULTILINE)
HEADLINE = "2026-11-30-headline.json"
SMOLLM2 = "2026-11-30-smollm2.json"
SMOLLM2_TASKS = "2026-11-30-smollm2-tasks.json"
METHODS_8B = "2026-11-30-decode-8b-methods.json"
KEYS_NEO = "2026-11-30-k-proj-neo.json"
KEYS_SMOLLM2 = "2026-11-30-k-proj-smollm2.json"
SERVING = "2026-11-30-serving-smollm2.json"
# Numbers in granite-nano's embedding, which no plan replaces.
NANO_EMBEDDING = 4096 * 512
HEALED = "2026-11-27-healing-h200.json"
Row = dict[str, Any]


def rows_of(name: str) -> list[Row]:
    """The rows of a file of results."""
    return list(json.loads((RESULTS / name).read_text(encoding="utf-8"))["rows"])


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(line) + " |" for line in (head, *body)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


def digits(value: float, count: int = 2) -> str:
    """A figure with `count` digits that count, and none behind the point from 10 on where two are enough."""
    if value == 0:
        return "0"
    whole = len(str(int(abs(value))))
    behind = count - whole if abs(value) >= 1 else count - 1 - int(f"{value:e}".split("e")[1])
    return f"{value:.{max(behind, 0)}f}"


def kl(value: float) -> str:
    """A divergence with as many places as count."""
    places = 4 if value < 0.2 else 3 if value < 2 else 2 if value < 10 else 1
    return f"{value:.{5 if 0 < value < 1e-4 else places}f}"


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{100 * share:.1f} %"


def peers() -> str:
    """granite-nano: llama.cpp's types, and ours with as many bytes of tensors."""
    rows = rows_of("2026-11-25-peers.json")
    body = []
    for row in rows:
        if row["family"] == "llama.cpp":
            their, our = row["measured"]["all"], ours_at(rows, row["size"])
            ratio = f"{our['kl_mean'] / their['kl_mean']:.2f}"
            cells = [row["size"], f"{row['tensor_bytes'] / 1e6:.2f}", kl(their["kl_mean"]), kl(our["kl_mean"]), ratio]
            body.append([*cells, f"{their['perplexity']:.2f}", f"{our['perplexity']:.2f}"])
    return table(("llama.cpp", "MB", "KL theirs", "KL ours", "ours / theirs", "perplexity theirs", "ours"), body)


def ours_at(rows: Iterable[Row], kind: str) -> Row:
    """What was measured of our file with as many bytes of tensors as a type of llama.cpp."""
    found: Row = next(row["measured"]["all"] for row in rows if row["size"] == f"tensor bytes of {kind}")
    return found


def smollm2() -> str:
    """SmolLM2: llama.cpp's types, and ours at the same bytes, with and without transforms."""
    rows = rows_of(SMOLLM2)
    found = {(row["family"], row["name"]): row for row in rows}
    body = []
    for row in sorted(rows, key=lambda row: row["file_bytes"]):
        if row["family"] != "llama.cpp":
            continue
        ours, plain = (found.get((family, f"bytes of {row['name']}")) for family in ("auto", "auto, no transforms"))
        cells = [f"{row['file_bytes'] / 1e6:.2f}", row["name"], kl(row["kl_mean"])]
        cells += ["" if one is None else kl(one["kl_mean"]) for one in (plain, ours)]
        cells.append("" if ours is None else f"{ours['kl_mean'] / row['kl_mean']:.2f}")
        cells += [f"{row['perplexity']:.2f}", "" if ours is None else f"{ours['perplexity']:.2f}"]
        body.append(cells)
    head = (
        "MB",
        "llama.cpp",
        "KL theirs",
        "ours, no transforms",
        "KL ours",
        "ours / theirs",
        "perplexity theirs",
        "ours",
    )
    return table(head, body)


def name_of(row: Row) -> str:
    """What a row of trained_model.py is called in a table."""
    name = (
        f"{row['family']} {row['name']}".strip().replace("auto bytes of", "ours, bytes of").replace("auto ", "ours, ")
    )
    return name + (", healed" if row.get("healed") else "")


def paired_error(row: Row, other: Row) -> float:
    """The standard error of the difference of two models' mean accuracies on the same questions."""
    variance = 0.0
    for task, mine in row["right"].items():
        differences = [int(one) - int(two) for one, two in zip(mine, other["right"][task], strict=True)]
        variance += statistics.variance(differences) / len(differences)
    return float(variance**0.5) / len(row["right"])


def smollm2_tasks() -> str:
    """SmolLM2: accuracy on six tasks, of llama.cpp's types and of ours, by size."""
    rows = sorted(rows_of(SMOLLM2_TASKS), key=lambda row: (row["file_bytes"], row["family"]))
    dense = next(row for row in rows if row["family"] == "dense")
    tasks = list(dense["accuracy"])
    body = []
    for row in rows:
        cells = [name_of(row), f"{row['file_bytes'] / 1e6:.1f}", kl(row["kl_mean"]), f"{row['perplexity']:.2f}"]
        cells += [f"{100 * row['accuracy'][task]:.0f}" for task in tasks]
        change = "" if row is dense else f"{100 * (row['accuracy_mean'] - dense['accuracy_mean']):+.1f}"
        error = "" if row is dense else f" ± {100 * paired_error(row, dense):.1f}"
        body.append([*cells, f"{100 * row['accuracy_mean']:.1f}", change + error])
    names = [task.replace("_", " ").removesuffix(" openai") for task in tasks]
    return table(("file", "MB", "KL", "perplexity", *names, "mean", "minus dense"), body)


def paper_smollm2() -> str:
    """CompactifAI's claims beside SmolLM2's figures, on six tasks."""
    rows = rows_of(SMOLLM2_TASKS)
    dense = next(row for row in rows if row["family"] == "dense")
    parameters = 8 * dense["file_bytes"] / dense["bits_per_weight"]
    columns = [row for row in rows if row["family"] in ("paper", "int4") or row["name"] in ("3.0 bits", "2.5 bits")]
    columns.sort(key=lambda row: (row["family"] != "paper", row["file_bytes"], row.get("healed", False)))

    def left(row: Row) -> str:
        return "100 %" if row["core_share"] is None else percent(row["core_share"])

    def points(row: Row) -> str:
        change = 100 * (row["accuracy_mean"] - dense["accuracy_mean"])
        return f"{100 * row['accuracy_mean']:.1f} ({change:+.1f} ± {100 * paired_error(row, dense):.1f})"

    body = [
        ("memory below fp32", "93 %", *(percent(1 - row["file_bytes"] / (4 * parameters)) for row in columns)),
        ("parameters of the matrices that are left", "30 %", *map(left, columns)),
        (f"accuracy, six tasks (dense {100 * dense['accuracy_mean']:.1f})", "2 to 3 fewer", *map(points, columns)),
        (
            "perplexity (dense " + f"{dense['perplexity']:.2f})",
            "not given",
            *(f"{r['perplexity']:.1f}" for r in columns),
        ),
        ("KL to the dense model", "not given", *(kl(row["kl_mean"]) for row in columns)),
    ]
    names = [f"`{row['family']}`" + (f", {row['name']}" if row["name"] else "") for row in columns]
    names = [name + (", healed" if row.get("healed") else "") for name, row in zip(names, columns, strict=True)]
    return table(("", "LLaMA-2 7B, as published", *names), body)


def smollm2_samples() -> str:
    """What files of SmolLM2 answer to two prompts, most likely token by token."""
    body = []
    for row in sorted(rows_of(SMOLLM2_TASKS), key=lambda row: -row["kl_mean"]):
        answers = [shortened(text) for text in list(row["samples"].values())[:2]]
        body.append((name_of(row), kl(row["kl_mean"]), *answers))
    return table(("file", "KL", *list(rows_of(SMOLLM2_TASKS)[0]["samples"])[:2]), body)


def shortened(text: str, most: int = 110) -> str:
    """A text as one cell of a table: on one line, cut after `most` characters, at a word."""
    line = " ".join(text.split()).replace("|", "\\|")
    if not line:
        return "(nothing)" if not text else "(line breaks)"
    return line if len(line) <= most else line[:most].rsplit(" ", 1)[0] + " …"


def speculation() -> str:
    """Decoding with and without drafts from the text itself."""
    body = []
    for row in rows_of("2026-11-30-speculation-smollm2.json"):
        cells = [row["task"], *(str(row[key]) for key in ("prompt_tokens", "tokens", "drafted", "accepted"))]
        cells += [f"{row[f'{way}_tokens_per_second']:.0f}" for way in ("plain", "ngram")]
        body.append([*cells, f"{row['ratio']:.2f}"])
    return table(("task", "prompt", "tokens", "drafted", "kept", "plain, tokens/s", "with drafts", "ratio"), body)


def transforms_speed() -> str:
    """What transforms cost a step and a prompt."""
    rows = {row["name"]: row for row in rows_of("2026-11-30-decode-2b-transforms.json")}
    body = []
    for bits in ("4", "2"):
        for name, row in ((f"{bits} bits", rows[f"mpo {bits}"]), ("… of transformed inputs", rows[f"mpo {bits}/h"])):
            body.append((name, f"{row['decode_tokens_per_second']:.2f}", f"{row['prompt_tokens_per_second']:.1f}"))
    return table(("file", "decoding, tokens/s", "prompt of 256, tokens/s"), body)


def transforms(name: str) -> str:
    """What transforms of a layer's input do to the error of integers."""
    body = [
        (
            row["transform"],
            str(row["layers"]),
            f"{row['spread']:.2f}",
            *(f"{row[f'error_{bits}']:.3f}" for bits in (2, 3, 4)),
        )
        for row in rows_of(name)
    ]
    return table(("transform", "matrices", "spread", "2 bits", "3 bits", "4 bits"), body)


def cores() -> str:
    """granite-nano: integers, cores beside them, and cores alone, by bits per weight of the whole file."""
    rows = [row for row in rows_of("2026-11-26-quality.json") if isinstance(row["size"], float)]
    sizes = sorted({row["size"] for row in rows})
    names = {"nearest": "rounded to nearest", "compensated": "error-compensated"}
    body = []
    for family in ("nearest", "compensated", "plain SVD", "whitened SVD", "naive MPO", "ALS MPO"):
        for chi in sorted({row["chi"] for row in rows if row["family"] == family}):
            found = {
                row["size"]: row["measured"]["all"]["kl_mean"]
                for row in rows
                if (row["family"], row["chi"]) == (family, chi)
            }
            name = f"… + cores χ = {chi}" if chi else names.get(family, f"{family} alone")
            body.append([name, *(kl(found[size]) if size in found else "–" for size in sizes)])
    return table(("bits per weight", *(f"{size:g}" for size in sizes)), body)


def calibration_domain() -> str:
    """Calibrated on one domain or on all three: KL by domain."""
    alone = {row["size"]: row for row in rows_of("2026-11-26-quality-calibrated-on-chat.json")}
    every = {
        row["size"]: row
        for row in rows_of("2026-11-26-quality.json")
        if (row["family"], row["chi"]) == ("compensated", 0)
    }
    body = []
    for size, row in alone.items():
        sides = (row["measured"], every[size]["measured"])
        body.append(
            [
                f"{size:g}",
                *(" / ".join(kl(side[name]["kl_mean"]) for name in ("stories", "web", "chat")) for side in sides),
            ]
        )
    return table(("bits per weight", "calibrated on chat", "calibrated on all three"), body)


def plan_name(row: Row) -> str:
    """What a row of bench_plans.py is called."""
    if row["plan"] == "auto":
        return f"`auto`, {row['bits_per_weight']:.2f} bits"
    size = f", χ ≤ {row['chi']}" if row["plan"] in ("corrected", "paper") else ""
    return f"`{row['plan']}`{size}{', calibrated' if row['calibrated'] else ''}"


def plans() -> str:
    """The named plans."""
    rows = sorted(rows_of("2026-11-25-plans.json"), key=lambda row: -float(row["bits_per_weight"]))
    body = [
        (
            plan_name(row),
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['bits_per_weight']:.2f}",
            str(row["layers_with_cores"]),
            f"{row['model']['perplexity']:.2f} ± {row['model']['error']:.2f}",
            f"{row['kl_mean']:.4f}",
            percent(row["same_top1"]),
        )
        for row in rows
    ]
    return table(("plan", "MB", "bits per weight", "layers with cores", "perplexity", "KL", "same top token"), body)


def allocation() -> str:
    """Bits chosen layer by layer, against the better of the files with one width for all."""
    body = []
    for row in rows_of("2026-11-25-allocation.json"):
        pair = row["uniform"]
        sides = (pair["other"], pair["auto"])
        body.append([f"{row['bits']:g}", *(kl(side["kl_mean"]) for side in sides), f"{pair['kl_ratio']:.2f}"])
    return table(("bits per weight", "KL, one width for all", "KL, `auto`", "ratio"), body)


def fits() -> str:
    """The median error of each fit over all matrices of granite-nano."""
    rows = rows_of("2026-11-26-fits.json")
    names = {
        "sequential SVD, balanced": "sequential SVD, balanced factors",
        "ALS, balanced": "ALS, same shapes",
        "plain SVD": "plain SVD",
        "whitened SVD": "whitened SVD",
        "search": "search over shapes",
    }
    medians = [f"{statistics.median(row['errors'][name] for row in rows):.3f}" for name in names]
    return table(list(names.values()), [medians])


def fit_costs() -> str:
    """Seconds and MB of single fits, by the size of the matrix."""
    rows = rows_of("2026-11-26-fits-sizes.json")
    sizes = list(dict.fromkeys((row["rows"], row["columns"]) for row in rows))
    found: dict[str, dict[tuple[int, int], str]] = {}
    for row in rows:
        name = row["fit"].rsplit(" g", 1)[0]
        name += {"": "", "half": ", half"}.get(row["chi"], f", χ = {row['chi']}")
        cell = f"{digits(row['seconds'])}{' (by the clock)' if row['clock'] else ''}, {row['peak_bytes'] / 1e6:.0f}"
        found.setdefault(name.replace("sweeps, 3 cores", "sweeps of 3 cores"), {})[row["rows"], row["columns"]] = cell
    body = [[name, *(cells.get(size, "") for size in sizes)] for name, cells in found.items()]
    return table(("", *(f"{rows}×{columns}" for rows, columns in sizes)), body)


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


FILES = {
    "mpo 4": "4 bits",
    "mpo 4/chi32": "4 bits + χ = 32 int8 cores",
    "mpo 3+4": "3 and 4 bits in turns",
    "mpo 2+3": "2 and 3 bits in turns",
    "mpo 2": "2 bits",
    "mpo dense": "dense bf16",
}


def decoding(file: str, beside: dict[str, tuple[str, ...]]) -> str:
    """Decoding speeds; `beside` names the peers that each row is compared with, at equal bytes."""
    rows = {row["name"]: row for row in rows_of(file)}
    dense = rows.get("mpo dense")
    body = []
    for key, name in FILES.items():
        if key not in rows:
            continue
        row = rows[key]
        speed = row["decode_tokens_per_second"]
        cells = [name, f"{row['bytes'] / 1e9:.2f}", f"{speed:.1f}", f"{row['share_of_bandwidth']:.2f}"]
        cells += [f"{speed / dense['decode_tokens_per_second']:.1f}"] if dense else []
        other = []
        for peer in beside.get(key, ()):
            their = rows[f"llama.cpp {peer}"]
            ratio = row["gigabytes_per_second"] / their["gigabytes_per_second"]
            sizes = f"{their['bytes'] / 1e9:.2f}, {their['decode_tokens_per_second']:.1f}"
            other.append(f"{ratio:.2f} × {peer.removeprefix('8b-')} ({sizes})")
        body.append([*cells, ", ".join(other)])
    head = ["file", "GB", "tokens/s", "of the read bandwidth", *(["over dense bf16 here"] if dense else [])]
    return table([*head, "beside llama.cpp (GB, tokens/s), at equal bytes"], body)


def decoding_2b() -> str:
    """Decoding at 2B beside llama.cpp on a CPU with AVX2."""
    beside = {"mpo 4": ("Q4_0", "Q4_K_M"), "mpo 3+4": ("Q3_K_M",), "mpo 2+3": ("Q2_K",), "mpo 2": ("IQ2_XS",)}
    return decoding("2026-11-26-decode-2b.json", beside)


def decoding_vnni() -> str:
    """Decoding at 2B beside llama.cpp on a CPU with AVX-512 VNNI."""
    return decoding("2026-11-30-decode-2b-vnni.json", {"mpo 4": ("Q4_0",), "mpo 2+3": ("Q2_K",)})


def batches_idle() -> str:
    """Steps of several texts at 2B on an idle CPU with AVX-512 VNNI."""
    body = [
        (
            str(row["batch"]),
            f"{row['step_ms']:.1f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['step_over_1']:.2f}",
            f"{row['tokens_per_second_over_1']:.2f}",
        )
        for row in rows_of("2026-11-30-batch-2b-vnni-idle.json")
    ]
    return table(("texts", "step, ms", "tokens/s", "step over one text", "tokens/s over one text"), body)


def prompts_idle() -> str:
    """Prompts of 512 tokens at 2B by the clock on an idle CPU with AVX-512 VNNI."""
    rows = rows_of("2026-11-30-prefill-2b-vnni-idle.json")
    speeds = {row["name"]: row["tokens_per_second"]["512"] for row in rows}
    theirs = speeds["llama.cpp Q4_0"]
    body = [(FILES.get(name, name), f"{speed:.1f}", f"{speed / theirs:.2f}") for name, speed in speeds.items()]
    return table(("file", "prompt, tokens/s", "over Q4_0"), body)


def decoding_8b() -> str:
    """Decoding at 8B beside llama.cpp on a CPU with AVX2."""
    return decoding("2026-11-26-decode-8b.json", {"mpo 4": ("8b-Q4_0",), "mpo 2+3": ("8b-Q2_K",)})


def decoding_transformers() -> str:
    """Decoding at 2B beside transformers in bf16."""
    rows = rows_of("2026-11-26-decode-2b-transformers.json")
    theirs = next(row for row in rows if row["name"] == "transformers bf16")["decode_tokens_per_second"]
    body = [
        (FILES.get(row["name"], row["name"]), f"{row['bytes'] / 1e9:.2f}", f"{speed:.1f}", f"{speed / theirs:.1f}")
        for row in rows
        for speed in (row["decode_tokens_per_second"],)
    ]
    return table(("file", "GB", "tokens/s", "over transformers bf16"), body)


def prompts_vnni() -> str:
    """Prompts of 512 tokens beside llama.cpp on a CPU with AVX-512 VNNI, by processor time."""
    rows = rows_of("2026-11-30-prefill-2b-vnni.json")
    speeds = [(row["name"], row["bytes"], row["tokens_per_second"]["512"]) for row in rows]
    best = max(speed for name, _, speed in speeds if name.startswith("llama.cpp"))
    body = [
        (FILES.get(name, name.replace(" 2b-", " ")), f"{size / 1e9:.2f}", f"{speed:.1f}", f"{speed / best:.2f}")
        for name, size, speed in speeds
    ]
    return table(("file", "GB", "tokens for a second of processor time", "over llama.cpp's best"), body)


def batches_vnni() -> str:
    """Steps of several texts on a CPU with AVX-512 VNNI, in two runs."""
    runs = [rows_of(f"2026-11-30-batch-2b-vnni{suffix}.json") for suffix in ("", "-again")]
    body = [
        (
            str(pair[0]["batch"]),
            *(f"{row['step_ms']:.0f} ({row['step_over_1']:.2f})" for row in pair),
            " / ".join(f"{row['tokens_per_second_over_1']:.2f}" for row in pair),
        )
        for pair in zip(*runs, strict=True)
    ]
    return table(("texts", "ms a step (of one text's)", "again", "tokens/s, of one text's"), body)


def amx() -> str:
    """Decoding on a CPU with AMX, written down by hand."""
    rows = rows_of("2026-11-29-amx-by-hand.json")
    shown = [[row["name"], *(row.get(key, "") for key in ("gigabytes", "decode", "share", "prompt"))] for row in rows]
    body = [[str(cell) for cell in row] for row in shown]
    return table(("file", "GB", "decode tokens/s", "of the bandwidth", "prompt tokens/s"), body)


def starting() -> str:
    """What starting a 2B or 8B file costs."""
    body = []
    for file, size in (("2026-11-26-decode-2b.json", "2B"), ("2026-11-26-decode-8b.json", "8B")):
        for row in rows_of(file):
            if started := row["launch"]:
                cells = [f"{size}, {FILES[row['name']]}", f"{row['bytes'] / 1e9:.2f}", f"{started['open_ms']:.0f}"]
                body.append([*cells, f"{started['first_token_s']:.2f}", f"{started['peak_bytes'] / 1e9:.2f}"])
    return table(("file", "GB", "opens in ms", "first token after s", "peak GB"), body)


def onnx_runtime(name: str) -> str:
    """A model in ONNX Runtime."""
    body = []
    for row in rows_of(name):
        rounds = f"{min(row['decode_rounds']):.0f} to {max(row['decode_rounds']):.0f}"
        cells = (row["name"], f"{row['cpu_ms']:.2f}", f"{row['decode']:.0f} ({rounds})", f"{row['prompt']:.0f}")
        body.append([*cells, f"{row['peak_bytes'] / 1e6:.0f}"])
    return table(("row", "CPU ms a token", "decode tokens/s (rounds)", "prompt tokens/s", "peak MB"), body)


def serving(name: str) -> str:
    """Servers at several numbers of clients."""
    body = [
        (
            row["server"],
            str(row["clients"]),
            f"{row['tokens_per_second']:.1f}",
            f"{row['first_token_s']:.2f}",
            f"{row['between_tokens_s'] * 1e3:.1f}",
            f"{row['cpu_s'] * 1e3:.2f}",
        )
        for row in rows_of(name)
    ]
    head = ("server", "clients", "tokens/s of all", "first token s", "between tokens ms", "CPU ms a token")
    return table(head, body)


def export_speed() -> str:
    """The processor's seconds of exports by stage, before and after, and of llama.cpp's tools."""
    names = {"opening": "open", "gradients": "forward", "surveying": "backward, candidates", "fitting": "fit"}
    names |= {"measuring": "measure", "imatrix": "imatrix", "quantize": "quantize"}
    body = []
    for row in rows_of("2026-11-30-export-speed-again.json"):
        parts = [
            f"{names[name]} {digits(stage['processor_seconds'])}"
            for name, stage in row["stages"].items()
            if name in names and stage["processor_seconds"] >= 0.5
        ]
        told = f"{row['predicted']['processor_seconds']:.0f}" if "predicted" in row else ""
        loss = "" if row.get("kl_mean") is None else f"{row['kl_mean']:.5f}"
        megabytes, peak = f"{row['bytes'] / 1e6:.2f}", f"{row['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in row else ""
        asked = row["asked"] if row["asked"] in ("default", "Q4_K_M") else f"{row['asked']} bits"
        body.append(
            (
                row["model"],
                asked,
                row["code"],
                f"{row['processor_seconds']:.0f}",
                told,
                ", ".join(parts),
                megabytes,
                peak,
                loss,
            )
        )
    head = ("model", "asked", "code", "processor s", "predicted", "stages", "MB", "memory, GB", "KL")
    return table(head, body)


def headline() -> str:
    """granite-nano's files: size, quality, speed and memory, in one run."""
    body = [
        (
            row["name"],
            f"{row['bytes'] / 1e6:.2f}",
            kl(row["kl_mean"]),
            percent(row["same_top1"]),
            f"{row['decode_tokens_per_second']:.0f} ± {row['decode_deviation']:.0f}",
            f"{row['prompt_tokens_per_second']:.0f} ± {row['prompt_deviation']:.0f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        )
        for row in rows_of(HEADLINE)
    ]
    return table(("file", "MB", "KL", "same top token", "decoding, tokens/s", "prompt, tokens/s", "peak MB"), body)


def paper() -> str:
    """CompactifAI's claims beside granite-nano's figures."""
    found = {row["plan"]: row for row in rows_of(HEALED)}
    columns = [
        found["paper, 30 % of the parameters, healed and measured on the corpus"],
        found["paper, file 93 % below fp32"],
        found["auto, 2.5 bits"],
    ]
    dense = columns[-1]["parameters"]
    whole = dense - NANO_EMBEDDING
    memory = [percent(1 - row["file_bytes"] / (4 * dense)) for row in columns]
    share = [percent((row["parameters"] - NANO_EMBEDDING) / whole) for row in columns[:2]]
    tokens = [f"{row['tokens'] / 1e6:.0f} million" for row in columns]
    sides = [(row["after"]["full"]["dense_accuracy"], row["after"]["full"]["accuracy"]) for row in columns]
    points = [f"{100 * before:.1f} → {100 * after:.1f} ({100 * (after - before):+.1f})" for before, after in sides]
    distance = [kl(row["after"]["full"]["kl_mean"]) for row in columns]
    body = [
        ("memory below fp32", "93 % (88 % with fp16 beside the cores)", *memory),
        ("parameters of the matrices that are left", "30 %", *share, "100 %"),
        ("tokens of healing", "under one epoch of three chat sets", *tokens),
        ("accuracy, points", "2 to 3 fewer", *points),
        ("KL to the dense model", "not given", *distance),
    ]
    names = ("`paper`, 30 % of the parameters", "`paper`, 93 % below fp32", "`auto`, 2.5 bits")
    return table(("", "LLaMA-2 7B, as published", *names), body)


def before_and_after(before: float, after: float, digits: int) -> str:
    """Both figures and the relative change."""
    return f"{before:.{digits}f} → {after:.{digits}f} ({100 * (after / before - 1):+.1f} %)"


def ranks(row: Row) -> str:
    """The ranks of the blocks' key projections: the inner blocks', and those at the boundary."""
    if "ranks" not in row:
        return "–"
    first, *inner, last = row["ranks"]
    boundary = f"{first}" if first == last else f"{first} and {last}"
    return f"{' to '.join(str(one) for one in sorted(set(inner)))}; first and last block {boundary}"


def k_proj() -> str:
    """The conservative compressor's claims beside our figures: at its own model's geometry, and on two trained models."""
    found = [{row["name"]: row for row in rows_of(name)} for name in (KEYS_NEO, KEYS_SMOLLM2, HEADLINE)]
    pairs = [(rows["dense"], rows["k-proj, rank 128"]) for rows in found]
    ours = [row for _, row in pairs]
    body = [
        ("rank", "128, more at the boundary", *(ranks(row) for row in ours)),
        ("cosine of the logits", "0.999", *(f"{row['cosine']:.4f}" if "cosine" in row else "–" for row in ours)),
        ("mean squared error of the logits", "0.70", *(f"{row['mse']:.3f}" if "mse" in row else "–" for row in ours)),
        (
            "resident memory, MB",
            "−29 to −35 %",
            *(before_and_after(dense["peak_bytes"] / 1e6, row["peak_bytes"] / 1e6, 0) for dense, row in pairs),
        ),
        (
            "tokens/s",
            "+3 to +8 %",
            *(
                before_and_after(*(one["decode_tokens_per_second"] for one in pair), 2 if index == 0 else 0)
                for index, pair in enumerate(pairs)
            ),
        ),
        ("same top token", "not given", *(percent(row["same_top1"]) if "same_top1" in row else "–" for row in ours)),
    ]
    head = ("", "GPT-Neo 1.3B, as published", "its geometry, random weights", "SmolLM2-135M", "granite-nano")
    return table(head, body)


def paper_8b() -> str:
    """Both published methods at Granite 3.3 8B's sizes with random weights: bytes, memory and speed."""
    rows = {row["name"]: row for row in rows_of(METHODS_8B)}
    dense, columns = (
        rows["mpo dense"],
        [rows[name] for name in ("mpo paper/chi870", "mpo k-proj", "mpo 4", "mpo dense")],
    )
    parameters = dense["bytes"] / 2

    def beside_dense(row: Row, figure: str, digits: int) -> str:
        change = "" if row is dense else f" ({100 * (row[figure] / dense[figure] - 1):+.0f} %)"
        return f"{row[figure]:.{digits}f}{change}"

    body = [
        ("file, GB", "", "", *(f"{row['bytes'] / 1e9:.2f}" for row in columns)),
        ("memory below fp32", "93 %", "", *(percent(1 - row["bytes"] / (4 * parameters)) for row in columns)),
        (
            "peak memory of a process, GB",
            "",
            "−29 to −35 %",
            *(
                f"{row['launch']['peak_bytes'] / 1e9:.1f}"
                + (
                    ""
                    if row is dense
                    else f" ({100 * (row['launch']['peak_bytes'] / dense['launch']['peak_bytes'] - 1):+.0f} %)"
                )
                for row in columns
            ),
        ),
        (
            "decoding, tokens/s",
            "+25 %",
            "+3 to +8 %",
            *(beside_dense(row, "decode_tokens_per_second", 2) for row in columns),
        ),
        (
            "prompt of 128, tokens/s",
            "",
            "",
            *(beside_dense(row, "prompt_tokens_per_second", 1) for row in columns),
        ),
        ("first token of a new process, s", "", "", *(f"{row['launch']['first_token_s']:.1f}" for row in columns)),
    ]
    head = (
        "",
        "CompactifAI, published",
        "key projections, published",
        "`paper`, χ = 870",
        "`k-proj`",
        "4 bits",
        "dense bf16",
    )
    return table(head, body)


TABLES: dict[str, Callable[[], str]] = {
    "peers": peers,
    "smollm2": smollm2,
    "smollm2-tasks": smollm2_tasks,
    "smollm2-samples": smollm2_samples,
    "paper-smollm2": paper_smollm2,
    "speculation": speculation,
    "transforms-smollm2": partial(transforms, "2026-11-30-transforms-smollm2.json"),
    "transforms-speed": transforms_speed,
    "transforms-nano": partial(transforms, "2026-11-30-transforms-granite-nano.json"),
    "cores": cores,
    "calibration-domain": calibration_domain,
    "plans": plans,
    "allocation": allocation,
    "fits": fits,
    "fit-costs": fit_costs,
    "export-speed": export_speed,
    "healing": healing,
    "healing-corpus": healing_corpus,
    "healing-lengths": healing_lengths,
    "healing-prefixes": healing_prefixes,
    "heal-cost": heal_cost,
    "decoding-2b": decoding_2b,
    "decoding-8b": decoding_8b,
    "decoding-transformers": decoding_transformers,
    "amx": amx,
    "prompts-vnni": prompts_vnni,
    "batches-vnni": batches_vnni,
    "starting": starting,
    "onnx-runtime": partial(onnx_runtime, "2026-11-30-ort-granite-nano.json"),
    "onnx-runtime-smollm2": partial(onnx_runtime, "2026-11-30-ort-smollm2.json"),
    "serving-2b": partial(serving, "2026-11-30-serving-2b.json"),
    "serving-smollm2": partial(serving, SERVING),
    "serving-nano": partial(serving, "2026-11-30-serving-granite-nano.json"),
    "headline": headline,
    "paper": paper,
    "decoding-vnni": decoding_vnni,
    "batches-idle": batches_idle,
    "prompts-idle": prompts_idle,
    "k-proj": k_proj,
}


def written(text: str) -> str:
    """A document with its tables as the results have them; raises KeyError for a table that is not known."""
    return MARKER.sub(lambda found: found[1] + TABLES[found[2]](), text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = written(before)
        if not arguments.check:
            page.write_text(after, encoding="utf-8")
        elif after != before:
            sys.exit(f"{page}: a table is not what the results say; run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
