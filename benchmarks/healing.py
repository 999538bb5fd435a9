"""What healing gives back, by plan: quality before and after, tokens and minutes. The README's table.

    python benchmarks/healing.py [--quick] [--tokens N] [--only NAME …] [--out benchmarks/results/healing-DATE.json]

The embedded model is compressed, measured on held-out text (the embedded evaluation slice), healed on the embedded
healing text, and measured again, at full, half and quarter χ where it has cores. `--quick` heals for 60,000 tokens and
measures on 8,000.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine

from mpo_exporter.export import export, measure_file
from mpo_exporter.heal.progress import shown
from mpo_exporter.heal.run import heal
from mpo_exporter.heal.settings import Settings
from mpo_exporter.plan import Options
from mpo_exporter.sources import data_folder, find_source
from mpo_formats import LinearSpec, ModelSpec, MpoFile, Quantized
from mpo_formats.architecture import EMBEDDING
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.checkpoint import Checkpoint
from mpo_runtime.measure import Comparison
from mpo_runtime.model import read_text_files
from mpo_runtime.models.granite import GraniteModel
from mpo_runtime.texts import TokenText, read_tokens

Layers = Callable[[ModelSpec], tuple[LinearSpec, ...] | None]
QUICK_TOKENS, QUICK_MEASURE = 60_000, 8_000


@dataclass(frozen=True, slots=True)
class Case:
    """A compressed file and how to heal it."""

    name: str
    options: Options
    settings: Settings
    layers: Layers = lambda spec: None


def bits(matrices: int, embedding: int) -> Layers:
    """Integers of so many bits in groups of 32, rounded to the nearest."""

    def layers(spec: ModelSpec) -> tuple[LinearSpec, ...]:
        return tuple(
            replace(
                linear, terms=(Quantized("quantized", embedding if linear.name == EMBEDDING else matrices, 32, False),)
            )
            for linear in spec.linears
        )

    return layers


PLAIN = Settings()
CASES = (
    Case("3 bits, embedding 4", Options("int4"), PLAIN, bits(3, 4)),
    Case("3 bits, embedding 4, codes trained", Options("int4"), replace(PLAIN, train_codes=True), bits(3, 4)),
    Case("2 bits, embedding 4", Options("int4"), PLAIN, bits(2, 4)),
    Case("2 bits, embedding 4, codes trained", Options("int4"), replace(PLAIN, train_codes=True), bits(2, 4)),
    Case("int4", Options("int4"), PLAIN),
    Case("auto, χ ≤ 4", Options("auto", chi=4), PLAIN),
    Case("paper, χ = 128", Options("paper", chi=128), PLAIN),
    Case("paper, χ = 32", Options("paper", chi=32), PLAIN),
    Case("paper, χ = 32, χ-dropout 0.5", Options("paper", chi=32), replace(PLAIN, chi_dropout=0.5)),
)


def figures(comparison: Comparison) -> dict[str, float]:
    """What the table shows of a comparison."""
    return {
        "kl_mean": comparison.kl_mean,
        "perplexity": comparison.model.perplexity,
        "dense_perplexity": comparison.reference.perplexity,
        "same_top1": comparison.same_top1,
    }


def measured(path: Path, dense: GraniteModel, text: TokenText) -> dict[str, dict[str, float]]:
    """The file at full, half and quarter χ."""
    with MpoFile(path) as file:
        largest = file.spec.largest_bond()
    prefixes = {"full": None, "half": largest // 2, "quarter": largest // 4} if largest > 3 else {"full": None}
    return {
        name: figures(measure_file(path, chi, dense, text, "cpu", lambda stage, done, total: None))
        for name, chi in prefixes.items()
    }


def run(case: Case, settings: Settings, text: TokenText, folder: Path, work: Path) -> dict[str, Any]:
    """One row of the table."""
    source = find_source("demo")
    opened = Checkpoint(source.folder)
    rough, target = folder / "rough.mpo", folder / "healed.mpo"
    export(source.folder, rough, case.options, layers=case.layers(opened.spec), force=True)
    dense = GraniteModel(opened.architecture, ReferenceOps(opened))
    before = measured(rough, dense, text)
    with shown(case.name) as update:
        result = heal(rough, source.folder, target, settings, work=work, force=True, progress=update)
    after = measured(target, dense, text)
    opened.close()
    return {
        "plan": case.name,
        "bytes": rough.stat().st_size,
        "bits_per_weight": 8 * rough.stat().st_size / opened.architecture.parameters(),
        "before": before,
        "after": after,
        "tokens": result.tokens,
        "minutes": result.minutes,
        "settings": asdict(settings),
        "curve": result.curve,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; perplexity and top token of the whole file, KL at full, half and quarter χ."""
    lines = [
        "| plan | MB | KL before | KL healed | perplexity before | healed | same top token before | healed | tokens | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for item in rows:
        before, after = item["before"], item["after"]
        kl = [" / ".join(f"{part['kl_mean']:.4f}" for part in side.values()) for side in (before, after)]
        ours, theirs = before["full"], after["full"]
        lines.append(
            f"| {item['plan']} | {item['bytes'] / 1e6:.2f} | {kl[0]} | {kl[1]} | {ours['perplexity']:.2f} | "
            f"{theirs['perplexity']:.2f} | {100 * ours['same_top1']:.1f} % | {100 * theirs['same_top1']:.1f} % | "
            f"{item['tokens']:,} | {item['minutes']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--measure-tokens", type=int, default=40_000)
    parser.add_argument("--only", nargs="*", help="parts of the names of the rows to run")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    tokens = QUICK_TOKENS if arguments.quick else arguments.tokens
    count = QUICK_MEASURE if arguments.quick else arguments.measure_tokens
    checkpoint = Checkpoint(find_source("demo").folder)
    text = read_tokens(data_folder() / "evaluation.jsonl", *read_text_files(checkpoint))
    checkpoint.close()
    text = replace(text, ids=text.ids[:count])
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"  # one for all: the teacher's logits are computed once
        for case in CASES:
            if not arguments.only or any(part in case.name for part in arguments.only):
                rows.append(run(case, replace(case.settings, tokens=tokens), text, Path(folder), work))
                print(markdown(rows[-1:]).splitlines()[-1], flush=True)
                save(arguments.out, rows, text)
    print(markdown(rows))


def save(path: Path | None, rows: list[dict[str, Any]], text: TokenText) -> None:
    """Writes what was measured so far."""
    if path is None:
        return
    facts = {
        "date": datetime.date.today().isoformat(),
        "machine": asdict(describe_machine()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "text_sha256": text.sha256,
        "measured_tokens": int(text.ids.size),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
