"""The GPU backend in one command: is it right, and how near is it to the memory and to the matrix units?

    python benchmarks/gpu.py --work DIR --out benchmarks/results/DATE-gpu.json     # everything, within --minutes
    python benchmarks/gpu.py --work DIR --smollm2 FILE --sections agreement        # single sections, by name
    python benchmarks/gpu.py --work DIR --sections tune                            # tiles for this card, takes long
    TRITON_INTERPRET=1 python benchmarks/gpu.py --work DIR --dry                   # does the script run? no figures

Sections, in this order; one that fails is reported, and the others go on:

    card       bandwidth of a copy, rate of a bf16 product of torch
    parity     small models of every kind of layer and KV cache against the reference on the same device; memory that kernels
               write their results to is poisoned first
    agreement  the most likely next token, teacher-forced, step by step: granite-nano in 4 bits, and --smollm2
    decode     recorded steps of one token at 8B for 4, 3 and 2 bits and dense bf16: medians of rounds in turns
    batch      the same with 16 texts
    prompt     2,048 tokens at once
    serve      16 texts through the scheduler, sampling on the host included
    gemlite    a block's products beside GemLite's, where that is installed
    export     `mpo-export --device` of one and of two blocks at 8B, and from their difference the whole model
    heal       a healing step at 2B, recorded, beside a step of the dense model
    tune       (by name only) tiles on cold caches, written to --tiles

`replay` is the device's time of the recorded launches, `step` what the host sees, with the copy of the logits. A table of all
figures comes last.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fullsize
import numpy as np
import torch
from batch import prompts
from parts import gpu_tune
from parts.gpu_models import (
    Contestant,
    RandomWeights,
    architecture_of,
    reference_network,
    seconds_of,
    triton_network,
)
from parts.machine import device_name
from parts.results import write_results

from mpo_exporter.export import ExportTask, export
from mpo_exporter.plan.options import Options
from mpo_exporter.source import data_folder, open_source
from mpo_runtime.backends.triton import ops as triton_ops
from mpo_runtime.backends.triton.tiles import SHIPPED
from mpo_runtime.engine import Engine, Request, Scheduler
from mpo_runtime.engine.pages import PagePool
from mpo_runtime.engine.sequence import Part, Sequence, run_step
from mpo_runtime.loading import check_device, open_weights, read_text_files
from mpo_runtime.measure import piecewise_logits
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.sampler import SamplingOptions
from mpo_runtime.text.token_text import read_tokens

Row = dict[str, Any]
PARITY = ("8", "6", "5", "4", "3", "2", "2,3,4", "4+chi8", "4+h", "dense")


@dataclass
class Run:
    """What the sections share: the sizes to run, and models that several of them time."""

    arguments: argparse.Namespace
    figures: dict[str, float] = field(default_factory=dict)
    contestants: list[Contestant] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dry, self.device = self.arguments.dry, "cpu" if self.arguments.dry else self.arguments.device
        self.size, self.rounds = ("dry", 1) if self.dry else (self.arguments.size, self.arguments.rounds)
        self.context, self.batch, self.prompt = (20, 2, 20) if self.dry else (1024, 16, 2048)
        if self.dry:  # the interpreter runs programs one after another
            triton_ops.ATTENTION_PROGRAMS = 16

    def timed(self) -> list[Contestant]:
        """The models of random weights, timed in turns; made once."""
        if not self.contestants:
            plans = ("4", "dense") if self.dry else self.arguments.plans.split("/")
            found = [Contestant(plan, self.size, self.device, self.context, (1, self.batch)) for plan in plans]
            for index in range(self.rounds + 1):
                for one in found:
                    one.step(1)
                    one.step(self.batch)
                    if index < 4:
                        one.prompt(self.prompt)
            self.contestants = found
        return self.contestants


def card(run: Run) -> Iterator[Row]:
    """What the card can do at best."""
    size = 1 << (30 if not run.dry else 20)
    source = torch.zeros(size, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    copied = min(seconds_of(lambda: target.copy_(source), run.device) for _ in range(5))
    run.figures["bandwidth"] = 2 * size / copied
    side = 8192 if not run.dry else 64
    a = torch.randn((side, side), device=run.device, dtype=torch.bfloat16)
    seconds = min(seconds_of(lambda: a @ a, run.device) for _ in range(5))
    run.figures["rate"] = 2 * side**3 / seconds
    yield {"what": "copy", "value": run.figures["bandwidth"] / 1e9, "unit": "GB/s"}
    yield {"what": "bf16 product of torch", "value": run.figures["rate"] / 1e12, "unit": "TFLOP/s"}


def logits_of_steps(network: Decoder, lengths: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The logits after prompts of some lengths, and after three steps of all texts together [4, texts, vocabulary]."""
    pool, vocabulary = PagePool(network.ops.new_pages(network.architecture)), network.architecture.vocab_size
    texts, first = [Sequence(pool) for _ in lengths], []
    for text, ids in zip(texts, prompts(len(lengths), max(lengths), vocabulary), strict=True):
        [outcome] = run_step(network, [Part(text, ids[: lengths[len(first)]], few=False)], together=True)
        first.append(outcome.last[0])
    found = [np.stack(first)]
    for step in range(3):
        parts = [Part(text, [(7 * step + index) % vocabulary], few=True) for index, text in enumerate(texts)]
        found.append(np.stack([outcome.last[0] for outcome in run_step(network, parts, together=True)]))
    return np.stack(found)


def parity(run: Run) -> Iterator[Row]:
    """Errors as a share of the largest logit."""
    size, lengths = ("dry", (9, 5)) if run.dry else ("small", (70, 40, 3))
    cases: list[tuple[str, dict[str, Any], float]] = [(plan, {}, 5e-2) for plan in (PARITY if not run.dry else ("3",))]
    cases += [("4", {"exact": True, "kv_type": "f32"}, 1e-3)]
    cases += [("4", {"kv_type": kind}, 5e-2) for kind in (("f32", "bf16", "int8") if not run.dry else ("int8",))]
    if not run.dry:  # torch then fills new memory with NaN
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for plan, options, bar in cases:
            weights: Any = RandomWeights(architecture_of(size), plan)
            expected = logits_of_steps(reference_network(weights, run.device), lengths)
            found = logits_of_steps(triton_network(weights, run.device, **options), lengths)
            error = float(np.abs(found - expected).max() / np.abs(expected).max())
            told = " ".join(f"{name} {value}" for name, value in options.items())
            yield {"what": f"{plan} {told}".strip(), "value": error, "unit": "of the largest logit", "most": bar}
    finally:
        torch.use_deterministic_algorithms(False)


def forced(ours: Decoder, reference: Decoder, ids: np.ndarray[Any, Any], window: int) -> tuple[float, int]:
    """The share of steps with the reference's most likely next token, in the second halves of windows, and their number."""
    same = count = 0
    for start in range(0, len(ids) - window + 1, window):
        part = ids[start : start + window]
        expected = np.concatenate(list(piecewise_logits(reference, part, window))).argmax(-1)
        engine = Engine(ours, context=window)
        half = window // 2
        rows = [engine.prefill(part[:half].tolist())]
        rows += [engine.advance([token]) for token in part[half:-1].tolist()]
        same += int((np.stack(rows).argmax(-1) == expected[half - 1 :]).sum())
        count += len(rows)
    return same / count, count


def agreement(run: Run) -> Iterator[Row]:
    """The same most likely token, of a file against the reference on the same file."""
    if run.dry:
        weights: Any = RandomWeights(architecture_of("dry"), "4")
        files, ids = {"random": weights}, {"random": np.arange(12) * 7 % 96}
    else:
        files, ids = {}, {}
        path = run.arguments.work / "nano-int4.mpo"
        with open_source("demo") as source:
            export(source, ExportTask(path, Options("int4"), force=True))
        for name, file in (("granite-nano, 4 bits", path), ("SmolLM2", run.arguments.smollm2)):
            if file is not None:
                files[name] = open_weights(file)
                text = read_tokens(data_folder() / "evaluation.jsonl", *read_text_files(files[name]))
                ids[name] = text.ids[: run.arguments.tokens]
    for name, weights in files.items():
        networks = triton_network(weights, run.device), reference_network(weights, run.device)
        same, count = forced(*networks, ids[name], 256 if not run.dry else 12)
        yield {"what": f"{name}: same token in {count} steps", "value": same, "unit": "", "bar": 0.995}
    if not run.dry and run.arguments.smollm2 is None:
        yield {"what": "SmolLM2: not compared, give --smollm2 FILE", "value": None, "unit": ""}


def decode(run: Run) -> Iterator[Row]:
    """Steps of one token."""
    found = run.timed()
    dense = next((one.median("replay 1") for one in found if one.plan == "dense"), None)
    for one in found:
        replay, step = one.median("replay 1"), one.median("step 1")
        bar = None if one.plan == "dense" else 0.6 if one.plan == "4" else 0.5
        yield {"what": f"{one.plan}: {one.bytes / 1e9:.2f} GB, replay", "value": 1e3 * replay, "unit": "ms"}
        yield {"what": f"{one.plan}: step with logits on the host", "value": 1 / step, "unit": "tokens/s"}
        if "bandwidth" in run.figures:
            share = one.bytes / replay / run.figures["bandwidth"]
            yield {"what": f"{one.plan}: replay, of the copy's bandwidth", "value": share, "unit": "", "bar": bar}
        if dense is not None and one.plan != "dense":
            bar = 2.8 if one.plan == "4" else None
            yield {"what": f"{one.plan}: replay, over dense", "value": dense / replay, "unit": "×", "bar": bar}


def batch(run: Run) -> Iterator[Row]:
    """Steps of several texts."""
    for one in run.timed():
        single, several = one.median("replay 1"), one.median(f"replay {run.batch}")
        gain, bar = run.batch * single / several, None if one.plan == "dense" or run.dry else 8.0
        yield {"what": f"{one.plan}: batch of {run.batch}", "value": run.batch / several, "unit": "tokens/s"}
        yield {"what": f"{one.plan}: over batch 1", "value": gain, "unit": "×", "bar": bar}


def prompt(run: Run) -> Iterator[Row]:
    """Prompts that are run at once; the products of the blocks are counted, attention is not."""
    for one in run.timed():
        seconds = one.median("prompt")
        work = sum(2 * a.out_features * a.in_features for a in one.spec.linears[1:]) * run.prompt
        yield {"what": f"{one.plan}: {run.prompt} tokens", "value": run.prompt / seconds, "unit": "tokens/s"}
        if "rate" in run.figures:
            share, bar = work / seconds / run.figures["rate"], 0.5 if one.plan != "dense" else None
            yield {"what": f"{one.plan}: of torch's bf16 rate", "value": share, "unit": "", "bar": bar}


def serve(run: Run) -> Iterator[Row]:
    """Texts through the scheduler, which come and go."""
    network = run.timed()[0].network
    length, tokens = (6, 3) if run.dry else (64, 64)
    scheduler = Scheduler(network, context=length + tokens + 8, parallel=run.batch, deterministic=False)
    try:
        for _ in range(2):  # the first round records
            start = time.perf_counter()
            asked = [
                scheduler.submit(Request(tuple(ids), SamplingOptions(temperature=0), tokens, ()))
                for ids in prompts(run.batch, length, network.architecture.vocab_size)
            ]
            made = sum(len(list(text)) for text in asked)
            seconds = time.perf_counter() - start
    finally:
        scheduler.close()
    yield {
        "what": f"{run.batch} texts of {tokens} tokens",
        "value": made / seconds,
        "unit": "tokens/s",
    }


def gemlite(run: Run) -> Iterator[Row]:
    """Products beside GemLite's."""
    yield from gpu_tune.gemlite("dry" if run.dry else "8b", run.device, run.rounds)


def program(run: Run, *words: str) -> str:
    """Runs a program in a process of its own and returns its output; its error is raised."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=60 * run.arguments.minutes, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[:3])}: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


def exports(run: Run) -> Iterator[Row]:
    """Exports of one and of two blocks; the embedding and what does not grow with blocks is in both."""
    config, blocks = fullsize.CONFIGS["tiny" if run.dry else "8b"], 40
    options = ["--device", run.device, "--force", "--measure-tokens", "0"]
    options += ["--calib-windows", "2", "--plan", "int4"] if run.dry else []
    seconds = []
    for count in (1, 2):
        folder = run.arguments.work / f"blocks-{run.size}-{count}"
        if not folder.exists():
            fullsize.write_checkpoint(folder, config | {"num_hidden_layers": count})
        start = time.perf_counter()
        script = str(Path(sys.executable).with_name("mpo-export"))
        program(run, script, str(folder), "--out", str(run.arguments.work / f"blocks-{count}.mpo"), *options)
        seconds.append(time.perf_counter() - start)
        yield {"what": f"{count} blocks", "value": seconds[-1], "unit": "s"}
    whole = (seconds[0] + (blocks - 1) * (seconds[1] - seconds[0])) / 60
    yield {"what": f"extrapolated to {blocks} blocks", "value": whole, "unit": "minutes", "most": 15.0}


def heal(run: Run) -> Iterator[Row]:
    """Seconds of a healing step over those of a dense training step."""
    from heal_cost import start
    from parts.heal_rows import uniform
    from synthetic import SyntheticPlan, write_layers, write_synthetic

    size, work = "tiny" if run.dry else "2b", run.arguments.work
    dense, ours = work / f"heal-{size}-dense.mpo", work / f"heal-{size}-3.mpo"
    write_synthetic(size, SyntheticPlan.parse("dense"), dense)
    write_layers(size, tuple(uniform(open_weights(dense).spec.linears, 3, 64)), ours)
    asked: dict[str, Any] = {
        "file": str(dense),
        "dense": True,
        "codes": False,
        "batch": 4 if not run.dry else 1,
        "window": 256 if not run.dry else 16,
    }
    asked |= {"recompute": False, "threads": torch.get_num_threads(), "device": run.device}
    base = start(asked)
    found = start(asked | {"file": str(ours), "dense": False, "codes": True})
    dense.unlink()
    ours.unlink()
    yield {"what": "dense step", "value": base["seconds"], "unit": "s"}
    yield {"what": "healing step of 3 bits, codes too", "value": found["seconds"], "unit": "s"}
    yield {"what": "over the dense step", "value": found["seconds"] / base["seconds"], "unit": "×", "most": 1.0}


def tune(run: Run) -> Iterator[Row]:
    """Tiles for this card."""
    bits = (4,) if run.dry else tuple(map(int, run.arguments.bits.split(",")))
    table = run.arguments.work / "tiles.json" if run.dry else run.arguments.tiles
    yield from gpu_tune.tune("dry" if run.dry else "8b", bits, run.device, table, run.rounds)


SECTIONS: dict[str, Callable[[Run], Iterator[Row]]] = {
    "card": card,
    "parity": parity,
    "agreement": agreement,
    "decode": decode,
    "batch": batch,
    "prompt": prompt,
    "serve": serve,
    "gemlite": gemlite,
    "export": exports,
    "heal": heal,
    "tune": tune,
}
BY_NAME = ("tune",)


def measured(run: Run, names: list[str]) -> list[Row]:
    """The rows of sections, printed as they come; a section that fails gives a row that says so."""
    rows: list[Row] = []
    begin = time.monotonic()
    for name in names:
        if time.monotonic() - begin > 60 * run.arguments.minutes:
            rows.append({"section": name, "what": "not begun: --minutes are over", "value": None, "unit": ""})
            continue
        start = time.monotonic()
        try:
            with torch.inference_mode():
                for row in SECTIONS[name](run):
                    if run.dry and name not in ("parity", "agreement"):
                        row.update(bar=None, most=None)
                    rows.append({"section": name, **row})
                    print(line(rows[-1]), flush=True)
        except Exception as error:
            traceback.print_exc()
            text = (str(error).splitlines() or [""])[0][:200]
            rows.append({"section": name, "what": f"failed: {type(error).__name__}: {text}", "value": None, "unit": ""})
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return rows


def reached(row: Row) -> bool | None:
    """Whether a bar was reached, None where there is none."""
    if row.get("value") is None:
        return None
    if row.get("bar") is not None:
        return bool(row["value"] >= row["bar"])
    return bool(row["value"] <= row["most"]) if row.get("most") is not None else None


def line(row: Row) -> str:
    """A row of the table."""
    value = "" if row["value"] is None else f"{row['value']:.4g}"
    bar = (
        f"≥ {row['bar']:g}"
        if row.get("bar") is not None
        else f"≤ {row['most']:g}"
        if row.get("most") is not None
        else ""
    )
    verdict = {True: "yes", False: "NO", None: ""}[reached(row)]
    return f"| {row['section']} | {row['what']} | {value} | {row['unit']} | {bar} | {verdict} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for files")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sections", help="names with commas; all but tune where left out")
    parser.add_argument("--size", choices=("8b", "2b"), default="8b", help="of the models that are timed")
    parser.add_argument("--plans", default="4/3/2/dense", help="what is timed, as synthetic.py reads it, with slashes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=2048, help="of agreement's text")
    parser.add_argument("--smollm2", help="SmolLM2, for agreement: a .mpo file, a folder, or a name in the store")
    parser.add_argument("--bits", default="4,3,2,8", help="of tune")
    parser.add_argument("--tiles", type=Path, default=SHIPPED, help="of tune: the table to write to")
    parser.add_argument("--minutes", type=float, default=7.5, help="no section is begun after these")
    parser.add_argument("--dry", action="store_true", help="tiny sizes in Triton's interpreter: tests this script")
    parser.add_argument("--out", type=Path, help="JSON")
    arguments = parser.parse_args()
    if arguments.dry and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--dry: set TRITON_INTERPRET=1")
    names = arguments.sections.split(",") if arguments.sections else [one for one in SECTIONS if one not in BY_NAME]
    if unknown := sorted(set(names) - set(SECTIONS)):
        parser.error(f"--sections {', '.join(unknown)}: expected some of {', '.join(SECTIONS)}")
    run = Run(arguments)
    check_device(run.device)
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = measured(run, names)
    name = "Triton's interpreter: these are no figures of a GPU" if run.dry else device_name(run.device)
    print(f"\n{name}\n\n| section | what | value | unit | bar | reached |\n|---|---|---|---|---|---|")
    print("\n".join(map(line, rows)))
    if not run.dry:
        write_results(arguments.out, rows, device=name, size=run.size, context=run.context)
    if any(row["what"].startswith("failed") for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
