"""How much quality healing restores, by plan: quality before and after, tokens and minutes. Tables of docs/results.md.

    python benchmarks/healing.py                       # the table: 1 M tokens a row, test text
    python benchmarks/healing.py --only auto --tokens 500k --corpus ../shared/corpus
    python benchmarks/healing.py --split valid --corpus … # for choosing settings
    python benchmarks/healing.py --ablation            # tokens of healing by χ
    python benchmarks/healing.py --cost                # time and memory of a step beside a dense training step
    python benchmarks/healing.py --device cuda         # heals on a GPU; quality is measured on the CPU in any case

Every row is a file that the exporter writes, measured on held-out text of three domains, healed, and measured again; files
with cores also at half and quarter χ. The same settings heal every row. A row is appended to build/healing/rows.jsonl as
soon as it is done and is not run again; a healing that was stopped continues from its checkpoint. The text healed on is the
embedded one, or the corpus's train split with --corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import heal_cost
import numpy as np
import torch
from numpy.typing import NDArray
from parts.heal_rows import PAPER_BITS, Row, auto, based, cored, of_bytes, of_parameters, planned, smallest
from parts.judge import DOMAINS, domain_texts, figures
from parts.machine import device_name
from parts.results import write_results
from quality import Bench, add_options, open_bench

from mpo_exporter.export import ExportTask, export
from mpo_exporter.fit.layer import Method
from mpo_exporter.heal.run import Healed, heal
from mpo_exporter.heal.settings import DEFAULT_TOKENS, HealJob, Settings, parse_tokens
from mpo_exporter.heal.workers import Workers, shown
from mpo_exporter.plan.named import PLANS
from mpo_exporter.plan.options import Options
from mpo_exporter.source import data_folder, open_source
from mpo_formats import ConfigError, MpoFile
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.loading import check_device, read_text_files
from mpo_runtime.measure import compare, cut_windows
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.text.token_text import TokenText, read_tokens

# Multiply-adds per second from which the duration of the first row is estimated; later ones use measured times.
GUESSED_SPEED = 5e10
LENGTHS = (0, 100_000, 500_000, 1_000_000, 4_000_000)
CHIS = (0, 8, 32)
SVD = Method(cores="whitened")


def table_rows() -> Iterator[Row]:
    """The rows of the table of a million tokens."""
    for bits in (4.25, 3.3, 3.0, 2.5):
        yield Row(f"auto, {bits} bits", auto(bits))
    yield Row("auto, 3.0 bits, cores of χ = 8 among them", cored(3.0, 8))
    yield Row("auto, 2.5 bits, cores of χ = 4 among them", cored(2.5, 4))
    yield Row("integers and int4 cores, 2.0 bits", smallest(2.0))
    yield Row("paper, 30 % of the parameters", of_parameters(0.3, balanced=True))
    yield Row("whitened SVD, 30 % of the parameters", of_parameters(0.3, balanced=False), SVD)
    yield Row("paper, file 93 % below fp32", of_bytes(PAPER_BITS, balanced=True))
    yield Row("whitened SVD, file 93 % below fp32", of_bytes(PAPER_BITS, balanced=False), SVD)
    if "k-proj" in PLANS:
        yield Row("k-proj", planned("k-proj"))
    yield Row("2 bits g64, χ = 32", based(2, 64, 32))
    yield Row("2 bits g64, χ = 32, healed with χ-dropout", based(2, 64, 32), chi_dropout=0.5)


def parse_lengths(texts: Sequence[str] | None) -> Sequence[int]:
    """Lengths of healing such as 0, 100k and 2M; LENGTHS where none are asked for."""
    return [0 if text == "0" else parse_tokens(text) for text in texts] if texts else LENGTHS


def ablation_rows(lengths: Sequence[int]) -> Iterator[Row]:
    """Tokens of healing by χ of int8 cores beside 2 bits."""
    for chi in CHIS:
        for tokens in lengths:
            yield Row(f"2 bits g64, χ = {chi}, healed on {tokens:,}", based(2, 64, chi), tokens=tokens)


def chosen_rows(rows: list[Row], wanted: Sequence[str] | None) -> list[Row]:
    """The rows with one of these names, or containing it if no row has exactly that name; all rows if none is wanted."""
    names = {row.name for row in rows}
    return [
        row
        for row in rows
        if not wanted or any(row.name == part or (part not in names and part in row.name) for part in wanted)
    ]


class Noting(Decoder):
    """A model that records the most likely token after each token that it is run on."""

    def __init__(self, weights: MpoFile, chi: int | None) -> None:
        super().__init__(weights.spec.architecture, ReferenceOps(weights, chi=chi))
        self.tops: list[NDArray[np.int64]] = []

    def logits(self, hidden: Any) -> Any:
        """The logits of hidden states [B, S, E]."""
        found = super().logits(hidden)
        self.tops.append(found.argmax(-1).reshape(-1).numpy())
        return found


def accuracy(tops: list[NDArray[np.int64]], windows: list[NDArray[np.int64]]) -> float:
    """The share of tokens that the model predicted as the most likely ones."""
    hits = np.concatenate([top == window[1:] for top, window in zip(tops, windows, strict=True)])
    return float(hits.mean())


def measured(bench: Bench, path: Path) -> dict[str, dict[str, float]]:
    """A file at full, half and quarter χ: figures over all domains, KL of each, and next-token accuracy."""
    result = {}
    with MpoFile(path) as file:
        largest = file.spec.largest_bond()
        prefixes = {"full": None} | ({"half": largest // 2, "quarter": largest // 4} if largest > 3 else {})
        for name, chi in prefixes.items():
            model = Noting(file, chi)
            parts = {
                domain: compare(model, bench.judge.reference, text.ids) for domain, text in bench.judge.texts.items()
            }
            windows = [window for text in bench.judge.texts.values() for window in cut_windows(text.ids, model, None)]
            dense = [bench.judge.reference(window).argmax(-1) for window in windows]
            result[name] = figures(list(parts.values())) | {
                "accuracy": accuracy(model.tops, windows),
                "dense_accuracy": accuracy(dense, windows),
                **{f"kl_{domain}": part.kl_mean for domain, part in parts.items()},
            }
    return result


def healing_text(bench: Bench, corpus: Path | None, tokens: int) -> TokenText:
    """The embedded healing text, or as many tokens of each domain of the corpus's train split."""
    if corpus is None:
        return read_tokens(data_folder() / "healing.jsonl", *read_text_files(bench.source))
    parts = domain_texts(bench.source, corpus, "train", -(-tokens // len(DOMAINS)))
    digest = hashlib.sha256("".join(part.sha256 for part in parts.values()).encode()).hexdigest()
    ids = np.concatenate([part.ids for part in parts.values()])
    return TokenText("train split of the corpus", ids, 0, digest)


class Table:
    """The measured rows, kept in a file of JSON lines, and estimates of how long further rows take."""

    def __init__(
        self, bench: Bench, settings: Settings, text: TokenText, path: Path, workers: Workers | None = None
    ) -> None:
        self.bench, self.settings, self.text, self.path = bench, settings, text, path
        self.workers = workers or Workers()
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.done: dict[str, dict[str, Any]] = {row["key"]: row for row in map(json.loads, lines)}

    def file_key(self, row: Row) -> str:
        """A digest of everything that a row's file depends on besides the code."""
        parts = [
            row.name.split(", healed")[0],
            asdict(row.method),
            self.bench.source.sha256(),
            self.bench.calibration.sha256,
            int(self.bench.calibration.ids.size),
            self.bench.windows,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def row(self, row: Row) -> dict[str, Any]:
        """Makes a row's file, measures it, heals it and measures it again; or returns the row if it was measured before."""
        settings = replace(self.settings, chi_dropout=row.chi_dropout, tokens=row.tokens or self.settings.tokens)
        heals, file_key = row.tokens != 0, self.file_key(row)
        texts = [(name, text.sha256, int(text.ids.size)) for name, text in self.bench.judge.texts.items()]
        parts = [file_key, asdict(settings) if heals else None, texts, self.text.sha256, int(self.text.ids.size)]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        if key in self.done:
            return self.done[key]
        print(f"{row.name}: {self.expected(settings.tokens if heals and settings.tokens else 0)}", flush=True)
        begin = time.perf_counter()
        rough = self.bench.cache / f"{file_key}.mpo"
        if not rough.exists():
            task = ExportTask(
                rough,
                Options("int4"),
                layers=row.layers(self.bench),
                method=row.method,
                calibration=self.bench.calibration,
                windows=self.bench.windows,
                surveyed=self.bench.survey(),
            )
            with open_source(self.bench.source.folder) as source:
                export(source, task)
        before = measured(self.bench, rough)
        exported = time.perf_counter() - begin
        after, result = self.healed(row.name, rough, settings) if heals else (before, None)
        entry = {
            "key": key,
            "plan": row.name,
            "file_bytes": rough.stat().st_size,
            "bits_per_weight": 8 * rough.stat().st_size / self.bench.source.spec.architecture.parameters(),
            "parameters": stored(rough),
            "before": before,
            "after": after,
            "tokens": result.tokens if result else 0,
            "minutes": result.minutes if result else 0.0,
            "export_minutes": exported / 60,
            "all_minutes": (time.perf_counter() - begin) / 60,
            "settings": asdict(settings),
            "curve": thinned(result.curve) if result else [],
            "machine": device_name(self.workers.device),
            "threads": torch.get_num_threads(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.done[key] = entry
        return entry

    def healed(self, name: str, rough: Path, settings: Settings) -> tuple[dict[str, dict[str, float]], Healed]:
        """Heals a file and measures it; the teacher's scores are kept for the next row."""
        target = rough.with_suffix(".healed.mpo")
        job = HealJob(
            rough,
            target,
            settings,
            text=self.text,
            work=self.bench.cache / "work",
            force=True,
            discard_other=True,
        )
        with open_source(self.bench.source.folder) as source, shown(name) as update:
            result = heal(source, job, self.workers, update)
        found = measured(self.bench, target)
        return found, result

    def expected(self, tokens: int) -> str:
        """An estimate of how long a row will take, from the last row or from the model's size."""
        known = [row for row in self.done.values() if row["tokens"] and row["threads"] == torch.get_num_threads()]
        if known:
            last = known[-1]
            minutes = last["all_minutes"] - last["minutes"] + last["minutes"] * tokens / last["tokens"]
            return f"about {minutes:.0f} minutes, by the row before"
        measured_tokens = sum(text.ids.size for text in self.bench.judge.texts.values())
        work = self.bench.source.spec.architecture.parameters() * (4 * tokens + 6 * measured_tokens)
        return f"about {work / GUESSED_SPEED / 60:.0f} minutes of healing and measuring, by the model's size; and the export"


def stored(path: Path) -> int:
    """The numbers that a file stores; an integer with its scale counts as one for each weight."""
    with MpoFile(path) as file:
        return file.spec.stored_parameters()


def thinned(curve: list[float], points: int = 200) -> list[float]:
    """The curve reduced to at most `points` means of neighbouring losses."""
    parts = np.array_split(np.array(curve), min(points, len(curve)))
    return [round(float(part.mean()), 5) for part in parts]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; KL at full, half and quarter χ."""
    lines = [
        "| plan | MB | bits | KL before | KL healed | left | perplexity before | healed | next token before | healed "
        "| tokens | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for item in rows:
        before, after = item["before"], item["after"]
        kl = [" / ".join(f"{part['kl_mean']:.4f}" for part in side.values()) for side in (before, after)]
        ours, theirs = before["full"], after["full"]
        lines.append(
            f"| {item['plan']} | {item['file_bytes'] / 1e6:.2f} | {item['bits_per_weight']:.2f} | {kl[0]} | {kl[1]} | "
            f"{theirs['kl_mean'] / ours['kl_mean']:.2f} | {ours['perplexity']:.2f} | {theirs['perplexity']:.2f} | "
            f"{100 * ours['accuracy']:.2f} % | {100 * theirs['accuracy']:.2f} % | {item['tokens']:,} | {item['minutes']:.1f} |"
        )
    if rows:
        dense = rows[0]["before"]["full"]
        lines += [
            "",
            f"Dense: perplexity {dense['dense_perplexity']:.2f}, next token {100 * dense['dense_accuracy']:.2f} %.",
        ]
    return "\n".join(lines)


def save(arguments: argparse.Namespace, bench: Bench, text: TokenText, rows: list[dict[str, Any]]) -> None:
    """Writes the rows and what they were measured with."""
    facts = {
        "torch": torch.__version__,
        "source_sha256": bench.source.sha256(),
        "healing_text": {"name": text.name, "sha256": text.sha256, "tokens": int(text.ids.size)},
        "texts": {name: {"sha256": one.sha256, "tokens": int(one.ids.size)} for name, one in bench.judge.texts.items()},
        "split": arguments.split,
    }
    write_results(arguments.out, [{key: value for key, value in row.items() if key != "key"} for row in rows], **facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.set_defaults(rows=Path("build/healing/quality.jsonl"))
    parser.add_argument("--heal-tokens", default=str(DEFAULT_TOKENS), help="of each row, such as 500k or 2M")
    parser.add_argument(
        "--text-tokens", help="of the corpus to heal on, such as 2M; as many as --heal-tokens by default"
    )
    parser.add_argument("--only", nargs="*", help="names of the rows to run, or parts of names")
    parser.add_argument("--ablation", action="store_true", help="tokens of healing by χ, in the place of the table")
    parser.add_argument("--lengths", nargs="+", help="of healing in --ablation, such as 0 100k 500k")
    parser.add_argument("--cost", action="store_true", help="time and memory of a step, in the place of the table")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu", help="to heal on: cpu, or a torch device such as cuda")
    parser.add_argument(
        "--size", choices=["8b", "2b", "tiny"], help="of --cost: random weights of Granite 3.3's shapes"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="other settings of the healing")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        check_device(arguments.device)
    except ConfigError as error:
        parser.error(str(error))
    if arguments.size and not arguments.cost:
        parser.error("--size is of --cost: give both")
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    if arguments.cost:
        heal_cost.run(arguments)
        return
    changes = {name: json.loads(value) for name, value in (item.split("=", 1) for item in arguments.set)}
    settings = Settings(**({"tokens": parse_tokens(arguments.heal_tokens)} | changes))
    bench = open_bench(arguments)
    length = parse_tokens(arguments.text_tokens) if arguments.text_tokens else settings.tokens or DEFAULT_TOKENS
    text = healing_text(bench, arguments.corpus, length)
    kept, workers = arguments.rows.parent / "healing.jsonl", Workers(device=arguments.device)
    table, rows = Table(bench, settings, text, kept, workers), list[dict[str, Any]]()
    every = ablation_rows(parse_lengths(arguments.lengths)) if arguments.ablation else table_rows()
    for row in chosen_rows(list(every), arguments.only):
        rows.append(table.row(row))
        print(markdown(rows[-1:]).splitlines()[2], flush=True)
        if arguments.out:
            save(arguments, bench, text, rows)
    print(markdown(rows))


if __name__ == "__main__":
    main()
