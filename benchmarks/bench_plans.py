"""Quality against bytes of the export plans on the embedded model: a table of docs/results.md.

    python benchmarks/bench_plans.py [--tokens 40000] [--out benchmarks/results/plans-DATE.json]

Held-out text of three domains (the embedded evaluation slice). Nothing is healed.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
from parts.results import write_results

from mpo_exporter.export import ExportTask, Result, export
from mpo_exporter.plan.options import Options, Target
from mpo_exporter.source import data_folder, open_source
from mpo_exporter.texts import calibration_text
from mpo_runtime import __version__
from mpo_runtime.text.token_text import read_tokens

# Bits of the whole file per weight for the plan `auto`.
BITS = (4.25, 3.5, 3.0, 2.6)
# The plans, each with whether it is fitted to the built-in calibration text.
PLANS = (
    (Options("dense"), False),
    (Options("corrected", chi=32), True),
    (Options("corrected", chi=32), False),
    (Options("int4"), True),
    (Options("int4"), False),
    (Options("k-proj"), True),
    (Options("paper", chi=128), True),
    (Options("paper", chi=32), True),
    (Options("paper", chi=32), False),
)


def row(options: Options, calibrated: bool, result: Result) -> dict[str, object]:
    """One measured plan as plain data."""
    if result.comparison is None:
        raise RuntimeError("nothing was measured")
    return {
        "plan": options.plan,
        "chi": options.chi,
        "target_bytes": options.target.bytes_of(result.source),
        "calibrated": calibrated,
        "bytes": result.file_bytes,
        "bits_per_weight": result.bits_per_weight,
        "layers_with_cores": result.core_layers,
        **asdict(result.comparison),
    }


def markdown(rows: list[dict[str, object]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| plan | MB | bits per weight | layers with cores | perplexity | KL to dense | same top token |",
        "|---|---|---|---|---|---|---|",
    ]
    for item in rows:
        name = f"`{item['plan']}`"
        if item["plan"] in ("corrected", "paper"):
            name += f", χ ≤ {item['chi']}"
        name += ", calibrated" if item["calibrated"] else ""
        model = item["model"]
        lines.append(
            f"| {name} | {item['bytes'] / 1e6:.2f} | {item['bits_per_weight']:.2f} | {item['layers_with_cores']} | "
            f"{model['perplexity']:.2f} ± {model['error']:.2f} | {item['kl_mean']:.4f} | {100 * item['same_top1']:.1f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    with open_source("demo") as source, tempfile.TemporaryDirectory() as folder:
        text = read_tokens(data_folder() / "evaluation.jsonl", *source.text_files)
        text = replace(text, ids=text.ids[: arguments.tokens])
        allocated = ((Options("auto", target=Target(bits_per_weight=bits)), True) for bits in BITS)
        for options, calibrated in (*PLANS, *allocated):
            calibration = calibration_text(source) if calibrated else None
            target = Path(folder) / "plan.mpo"
            result = export(source, ExportTask(target, options, force=True, text=text, calibration=calibration))
            rows.append(row(options, calibrated, result))
            print(f"measured {options.plan}", flush=True)
    print(markdown(sorted(rows, key=lambda item: -float(str(item["bits_per_weight"])))))
    facts = {"text_sha256": text.sha256, "tokens": int(text.ids.size), "threads": torch.get_num_threads()}
    write_results(arguments.out, rows, version=__version__, torch=torch.__version__, **facts)


if __name__ == "__main__":
    main()
