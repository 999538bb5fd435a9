"""Tables of quality: files beside llama.cpp's, tasks, transforms, cores, plans and fits."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from parts.cells import Row, kl, percent, rows_of, table

SMOLLM2 = "2026-11-30-smollm2.json"
SMOLLM2_TASKS = "2026-11-30-smollm2-tasks.json"
SMOLLM2_NOMINAL = "2026-12-01-smollm2-nominal.json"


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


def smollm2_nominal() -> str:
    """SmolLM2: llama.cpp's types with the bits that they have here, and ours with those that they have on wider rows."""
    ours = {row["name"]: row for row in rows_of(SMOLLM2_NOMINAL) if row["family"] == "auto"}
    theirs = {row["name"]: row for row in rows_of(SMOLLM2_TASKS) if row["family"] == "llama.cpp"}
    body = []
    for name, mine in sorted(ours.items(), key=lambda item: -item[1]["file_bytes"]):
        bits, kind = name.split(" bits, as ")
        other = theirs[kind]
        change = 100 * (mine["accuracy_mean"] - other["accuracy_mean"])
        cells = [kind, bits, f"{other['bits_per_weight']:.2f}"]
        for row in (other, mine):
            cells += [f"{row['file_bytes'] / 1e6:.1f}", kl(row["kl_mean"]), f"{100 * row['accuracy_mean']:.1f}"]
        body.append([*cells, f"{change:+.1f} ± {100 * paired_error(mine, other):.1f}"])
    sides = [f"{what} {whose}" for whose in ("theirs", "ours") for what in ("MB", "KL", "accuracy")]
    return table(("llama.cpp", "bits by name", "bits here", *sides, "ours minus theirs"), body)


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


# The columns of quality.py --columns, in the order of the table.
COLUMNS = ("integers", "rotated", "rotated, fitted", "with cores")


def columns(files: Mapping[str, str]) -> str:
    """The table of quality.py --columns; `files` are its results by the model's name."""
    return columns_table({model: rows_of(name) for model, name in files.items()})


def columns_table(models: Mapping[str, Sequence[Row]]) -> str:
    """For each model and size, before and after healing: KL of the best file of every column; of cores with its χ."""
    body = []
    for model, rows in models.items():
        for size in sorted({row["size"] for row in rows}):
            for when in ("before", "after"):
                own = [row for row in rows if row["size"] == size and when in row]
                cells = []
                for column in COLUMNS:
                    found = [row for row in own if row["column"] == column]
                    least = min(found, key=lambda row: float(row[when]["kl_mean"]), default=None)
                    refused = any(
                        row["size"] == size and row["column"] == column and "no_such_file" in row for row in rows
                    )
                    cells.append(column_cell(least, when, refused=refused))
                if own:
                    body.append([model, f"{size:g}", "no" if when == "before" else "yes", *cells])
    return table(("model", "bits per weight", "healed", *COLUMNS), body)


def columns_of_both() -> str:
    """The columns of SmolLM2 and granite-nano."""
    return columns(
        {
            "SmolLM2-135M": "2026-12-01-quality-columns-smollm2.json",
            "granite-nano": "2026-12-01-quality-columns-granite-nano.json",
        }
    )


def column_cell(row: Row | None, when: str, *, refused: bool) -> str:
    """KL and χ; a dash where no file is that small, and `not measured` where there is no figure."""
    if row is None:
        return "–" if refused else "not measured"
    return kl(row[when]["kl_mean"]) + (f" (χ = {row['chi']})" if row["chi"] else "")


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
