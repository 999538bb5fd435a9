"""Tables of speed: decoding, prompts, batches, starting, serving, and exports."""

from __future__ import annotations

import statistics

from parts.cells import digits, rows_of, table

SERVING = "2026-11-30-serving-smollm2.json"
FILES = {
    "mpo 4": "4 bits",
    "mpo 4/chi32": "4 bits + χ = 32 int8 cores",
    "mpo 3+4": "3 and 4 bits in turns",
    "mpo 2+3": "2 and 3 bits in turns",
    "mpo 2": "2 bits",
    "mpo dense": "dense bf16",
}


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


def full_size() -> str:
    """Time and memory of each step at 8B."""
    rows = rows_of("2026-11-30-fullsize-8b.json")
    body = [(row["name"], f"{row['seconds']:.0f}", f"{row['peak_bytes'] / 1e9:.1f}") for row in rows]
    return table(("step", "seconds", "largest resident size, GB"), body)


def transforms_2b() -> str:
    """What a step and a prompt cost with transformed inputs, relative to the same file without."""
    rows = {row["name"]: row for row in rows_of("2026-11-30-decode-2b-peers.json")}
    body = []
    for bits in ("4", "2"):
        plain = rows[f"mpo {bits}"]
        for mark, name in (("h", "Hadamard"), ("t", "stored, 4 bits")):
            if row := rows.get(f"mpo {bits}/{mark}"):
                found = [row[key] / plain[key] for key in ("decode_tokens_per_second", "prompt_tokens_per_second")]
                body.append((f"{bits} bits", name, *(f"{one:.3f}" for one in found)))
    return table(("file", "transform", "decoding, of that without", "prompt of 512, of that without"), body)


def decoding_peers(file: str) -> str:
    """Decoding and prompts beside llama.cpp and its fork with interleaved rows."""
    rows = rows_of(file)
    body = []
    for row in rows:
        if row["name"].endswith(("/h", "/t")):  # transforms have a table of their own
            continue
        gigabytes, speed = row["bytes"] / 1e9, row["decode_tokens_per_second"]
        cells = [FILES.get(row["name"], row["name"]), f"{gigabytes:.2f}", f"{speed:.1f}"]
        cells += [f"{gigabytes * speed:.1f}", f"{row['prompt_tokens_per_second']:.1f}"]
        body.append(cells)
    return table(("file", "GB", "decoding, tokens/s", "GB/s", "prompt of 512, tokens/s"), body)


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


def batches_idle(file: str) -> str:
    """Steps of several texts at 2B on an idle CPU."""
    body = [
        (
            str(row["batch"]),
            f"{row['step_ms']:.1f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['step_over_1']:.2f}",
            f"{row['tokens_per_second_over_1']:.2f}",
        )
        for row in rows_of(file)
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


def prompts_long(file: str) -> str:
    """Prompts of several lengths at 2B, by the clock and by processor time."""
    [row] = rows_of(file)
    clock = row["tokens_per_second"]
    busy = {length: statistics.median(speeds) for length, speeds in row["by_processor"].items()}
    shortest = next(iter(clock))
    body = [
        (
            f"{int(length):,}",
            str(len(row["rounds"][length])),
            f"{clock[length]:.1f}",
            f"{clock[length] / clock[shortest]:.2f}",
            f"{busy[length]:.1f}",
            f"{busy[length] / busy[shortest]:.2f}",
        )
        for length in clock
    ]
    over = f"of that at {shortest}"
    return table(("prompt, tokens", "rounds", "tokens/s", over, "tokens for a second of one thread", over), body)


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


def export_clock() -> str:
    """Exports on an idle machine: seconds by the clock and of the processor, and the stages by the clock."""
    body = []
    for row in rows_of("2026-12-01-export-clock.json"):
        parts = [
            f"{name} {digits(stage['seconds'])}" for name, stage in row["stages"].items() if stage["seconds"] >= 0.5
        ]
        asked = row["asked"] if row["asked"] == "default" else f"{row['asked']} bits"
        seconds = [f"{one:.0f}" for one in (row["seconds"], row["processor_seconds"])]
        told = f"{row['predicted']['processor_seconds']:.0f}" if "predicted" in row else ""
        sizes = f"{row['bytes'] / 1e6:.2f}", f"{row['peak_bytes'] / 1e9:.1f}", f"{row['kl_mean']:.5f}"
        body.append((row["model"], asked, *seconds, told, ", ".join(parts), *sizes))
    head = ("model", "asked", "clock, s", "processor, s", "predicted", "stages by the clock", "MB", "memory, GB", "KL")
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
