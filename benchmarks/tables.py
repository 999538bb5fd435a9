"""Writes the tables of docs/results.md, paper.md and serving.md that follow a line `<!-- table: NAME -->` from the results.

    python benchmarks/tables.py            # writes them
    python benchmarks/tables.py --check    # ends with status 1 where one is not what the results say

A test checks them too, and demands that docs/results.md has no other tables of figures. To add a table, write a function that
returns its lines in parts/*_tables.py, name it in TABLES, and put the line into the document.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from parts import healing_tables, method_tables, quality_tables, speed_tables

ROOT = Path(__file__).resolve().parent.parent
PAGES = tuple(ROOT / "docs" / name for name in ("results.md", "paper.md", "serving.md"))
MARKER = re.compile(r"^(<!-- table: ([\w-]+) -->\n\n)((?:\|.*\n)*)", re.MULTILINE)
TABLES: dict[str, Callable[[], str]] = {
    "peers": quality_tables.peers,
    "smollm2": quality_tables.smollm2,
    "smollm2-tasks": quality_tables.smollm2_tasks,
    "smollm2-nominal": quality_tables.smollm2_nominal,
    "smollm2-samples": quality_tables.smollm2_samples,
    "paper-smollm2": method_tables.paper_smollm2,
    "speculation": speed_tables.speculation,
    "transforms-smollm2": partial(quality_tables.transforms, "2026-11-30-transforms-smollm2.json"),
    "columns": quality_tables.columns_of_both,
    "transforms-speed": speed_tables.transforms_speed,
    "transforms-2b": speed_tables.transforms_2b,
    "transforms-nano": partial(quality_tables.transforms, "2026-11-30-transforms-granite-nano.json"),
    "cores": quality_tables.cores,
    "calibration-domain": quality_tables.calibration_domain,
    "plans": quality_tables.plans,
    "allocation": quality_tables.allocation,
    "fits": quality_tables.fits,
    "fit-costs": speed_tables.fit_costs,
    "export-clock": speed_tables.export_clock,
    "export-speed": speed_tables.export_speed,
    "full-size": speed_tables.full_size,
    "healing": healing_tables.healing,
    "healing-corpus": healing_tables.healing_corpus,
    "healing-lengths": healing_tables.healing_lengths,
    "healing-prefixes": healing_tables.healing_prefixes,
    "healed-smollm2": healing_tables.healed_smollm2,
    "heal-cost": healing_tables.heal_cost,
    "decoding-2b": speed_tables.decoding_2b,
    "decoding-8b": speed_tables.decoding_8b,
    "decoding-transformers": speed_tables.decoding_transformers,
    "prompts-vnni": speed_tables.prompts_vnni,
    "prompts-long": partial(speed_tables.prompts_long, "2026-11-30-prefill-8k.json"),
    "prompts-long-amx": partial(speed_tables.prompts_long, "2026-12-01-prefill-8k-amx.json"),
    "batches-vnni": speed_tables.batches_vnni,
    "starting": speed_tables.starting,
    "onnx-runtime": partial(speed_tables.onnx_runtime, "2026-11-30-ort-granite-nano.json"),
    "onnx-runtime-smollm2": partial(speed_tables.onnx_runtime, "2026-11-30-ort-smollm2.json"),
    "serving-2b": partial(speed_tables.serving, "2026-11-30-serving-2b.json"),
    "serving-smollm2": partial(speed_tables.serving, speed_tables.SERVING),
    "serving-nano": partial(speed_tables.serving, "2026-11-30-serving-granite-nano.json"),
    "headline": method_tables.headline,
    "paper": method_tables.paper,
    "decoding-vnni": speed_tables.decoding_vnni,
    "decoding-peers": partial(speed_tables.decoding_peers, "2026-11-30-decode-2b-peers.json"),
    "decoding-amx": partial(speed_tables.decoding_peers, "2026-12-01-decode-2b-amx.json"),
    "batches-idle": partial(speed_tables.batches_idle, "2026-11-30-batch-2b-vnni-idle.json"),
    "batches-amx": partial(speed_tables.batches_idle, "2026-12-01-batch-2b-amx.json"),
    "prompts-idle": speed_tables.prompts_idle,
    "k-proj": method_tables.k_proj,
    "paper-8b": method_tables.paper_8b,
}


def written(text: str) -> str:
    """A document with its tables as the results have them; raises KeyError for a table that is not known."""

    def table(found: re.Match[str]) -> str:
        # An empty line ends a table, or what follows would be read as a row of it.
        return found[1] + TABLES[found[2]]() + ("\n" if re.match("[^\n]", text[found.end() :]) else "")

    return MARKER.sub(table, text)


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
