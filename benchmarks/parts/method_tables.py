"""Tables of docs/paper.md: the published methods beside our figures."""

from __future__ import annotations

from parts.cells import Row, before_and_after, kl, percent, rows_of, table
from parts.healing_tables import HEALED
from parts.quality_tables import SMOLLM2_TASKS, paired_error

HEADLINE = "2026-11-30-headline.json"
METHODS_8B = "2026-11-30-decode-8b-methods.json"
KEYS_NEO = "2026-11-30-k-proj-neo.json"
KEYS_SMOLLM2 = "2026-11-30-k-proj-smollm2.json"
# Numbers in granite-nano's embedding, which no plan replaces.
NANO_EMBEDDING = 4096 * 512


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
    """Both published methods at Granite 3.3 8B's sizes with random weights: bytes and speed."""
    rows = {row["name"]: row for row in rows_of(METHODS_8B)}
    dense, columns = (
        rows["mpo dense"],
        [rows[name] for name in ("mpo paper/chi870", "mpo k-proj", "mpo 4", "mpo dense")],
    )
    parameters = dense["bytes"] / 2

    def speed(row: Row) -> str:
        found = row["decode_tokens_per_second"]
        change = found / dense["decode_tokens_per_second"] - 1
        return f"{found:.2f}" + ("" if row is dense else f" ({100 * change:+.0f} %)")

    body = [
        ("file, GB", "", "", *(f"{row['bytes'] / 1e9:.2f}" for row in columns)),
        ("memory below fp32", "93 %", "", *(percent(1 - row["bytes"] / (4 * parameters)) for row in columns)),
        ("memory below bf16", "", "29 to 35 %", *(percent(1 - row["bytes"] / (2 * parameters)) for row in columns)),
        ("decoding, tokens/s", "+25 %", "+3 to +8 %", *map(speed, columns)),
        ("of the read bandwidth", "", "", *(f"{row['share_of_bandwidth']:.2f}" for row in columns)),
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
