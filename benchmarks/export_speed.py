"""How long an export takes, stage by stage, and what its file loses; beside another checkout and beside llama.cpp.

    python benchmarks/export_speed.py demo smollm2 --bits 4.25 3 2.5 [--before CHECKOUT] [--llama FOLDER] [--out FILE]
    python benchmarks/export_speed.py 2b 8b:10 --bits default --efforts normal quick [--out FILE]

`2b` and `8b` are Granite 3.3's sizes with random weights, which `fullsize.py` writes; `8b:10` has the first 10 of 40 blocks,
and its times are extrapolated: those of the blocks times four, those of the embedding and the head once.
Every export runs in a process of its own. Each stage has seconds by the clock and seconds of the processor: on a machine that
others use the second figure is the one to compare. `--before` names a checkout of an older commit with its environment in
.venv; the two take turns. `--predict` adds what `--dry-run` would say, in seconds of the processor. `--llama` names a folder
with llama-imatrix and llama-quantize: they make a Q4_K_M of each model given as a GGUF file, from the same windows of text.
`--survey` compares what normal effort estimates with what the best one does: the rank correlation of all candidates, and by how
much the expected loss of its plans, by the estimates of the best, is above that of the best plans.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# The text that layers are calibrated on has so many windows of 256 tokens.
WINDOWS, WINDOW = 96, 256
MARK = "export_speed: "
EMBEDDING = "embedding"
SYNTHETIC = ("2b", "8b")
# Stages that take longer the more blocks there are.
BY_BLOCK = ("gradients", "surveying", "fitting")


def child(model: str, bits: str, effort: str, out: Path, weights: int = 0) -> Row:
    """One export in this process, with the code that Python finds: also that of an older checkout.

    Args:
        weights: of the model that this one has some blocks of, which is exported with that one's effort and not measured.
    """
    from dataclasses import replace

    from mpo_exporter.cli import export as cli
    from mpo_exporter.export import Listener, export
    from mpo_exporter.plan.options import Options, Target
    from mpo_exporter.request import ExportRequest
    from mpo_exporter.source import open_source

    stages: dict[str, list[float]] = {}
    last = [time.perf_counter(), time.process_time()]

    def passed(stage: str, done: int = 0, total: int = 0) -> None:
        """Counts the time since the last call to a stage, what the embedding and the head take apart: work that is done."""
        if (stage == "fitting" and done == 1) or (stage == "surveying" and done in (1, total)):
            stage = EMBEDDING
        now = [time.perf_counter(), time.process_time()]
        clock, processor = stages.get(stage, [0.0, 0.0])
        stages[stage] = [clock + now[0] - last[0], processor + now[1] - last[1]]
        last[:] = now

    target = Target() if bits == "default" else Target(bits_per_weight=float(bits))
    others = {} if effort == "before" else {"effort": effort}
    request = ExportRequest(model=model, options=Options(target=target), out=out, force=True, **others)
    request.machine.prepare()
    with open_source(model) as source:
        task = cli.resolved(request, source, out, {})[0]
        if weights:
            from mpo_exporter.effort import EFFORTS

            suited = EFFORTS[effort].suited(weights)
            task = replace(task, windows=suited.windows, effort=suited, text=None)
        passed("opening")
        result = export(source, task, Listener(passed))
        passed("closing")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "bytes": result.file_bytes,
        "bits_per_weight": result.bits_per_weight,
        "kl_mean": None if result.comparison is None else result.comparison.kl_mean,
        "seconds": sum(stage[0] for stage in stages.values()),
        "processor_seconds": sum(stage[1] for stage in stages.values()),
        "peak_bytes": usage.ru_maxrss * 1024,
        "stages": {name: {"seconds": one, "processor_seconds": two} for name, (one, two) in stages.items()},
    }


def exported(python: Path, model: str, bits: str, effort: str, folder: Path, weights: int = 0) -> Row:
    """One export by the code of an environment; measurements are cached in the folder, so that one survey serves all bits."""
    words = [str(python), __file__, model, "--bits", bits, "--child", effort, "--work", str(folder)]
    words += ["--weights", str(weights)]
    # As the programs set it (mpo_runtime/cli/console.py).
    quiet = {"OMP_WAIT_POLICY": "passive", "OPENBLAS_THREAD_TIMEOUT": "4"}
    environment = {**quiet, **os.environ, "MPO_CACHE": str(folder / f"cache-{effort}-{Path(model).stem}")}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    found = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not found:
        raise SystemExit(f"{model} {bits} {effort}: {done.stderr.strip()[-500:]}")
    row: Row = {"model": Path(model).name, "asked": bits, "code": effort, **json.loads(found[0])}
    return row


def written(name: str, folder: Path) -> tuple[Path, float, int]:
    """A checkpoint of a size with random weights, perhaps of some blocks only; the share of the blocks, and all weights."""
    import fullsize

    from mpo_runtime.weights.config import architecture_from_config

    size, _, blocks = name.partition(":")
    config = fullsize.CONFIGS[size]
    whole = int(config["num_hidden_layers"])
    some = int(blocks or whole)
    model = folder / name.replace(":", "-")
    if not model.exists():
        fullsize.write_checkpoint(model, config | {"num_hidden_layers": some})
    return model, some / whole, architecture_from_config(config, {}, name).parameters()


def extrapolated(row: Row, share: float) -> Row:
    """A row of a model with a share of its blocks, with the seconds of all of them."""
    found = {}
    for key in ("seconds", "processor_seconds"):
        blocks = sum(stage[key] for name, stage in row["stages"].items() if name in BY_BLOCK)
        found[key] = row[key] + blocks * (1 / share - 1)
    return {**row, "blocks_share": share, "extrapolated": found}


def llama(folder: Path, model: Path, work: Path, threads: int) -> Row:
    """llama.cpp's importance matrix and its quantiser on the text that our exports calibrate on."""
    from mpo_exporter.calibrate.windows import cut_calibration
    from mpo_exporter.source import open_source
    from mpo_exporter.texts import calibration_text

    with open_source(model) as source:
        windows = cut_calibration(calibration_text(source), source.architecture, count=WINDOWS)
        if source.tokenizer is None:
            raise SystemExit(f"{model}: has no tokenizer to write the text with")
        text = "".join(source.tokenizer.decode(window.tolist()) for window in windows)
    (work / "text.txt").write_text(text, encoding="utf-8")
    matrix, out, threads_ = work / "imatrix.gguf", work / "llama.gguf", ["-t", str(threads)]
    steps = {
        "imatrix": [
            folder / "llama-imatrix",
            "-m",
            model,
            "-f",
            work / "text.txt",
            "-o",
            matrix,
            "-c",
            WINDOW,
            *threads_,
        ],
        "quantize": [
            folder / "llama-quantize",
            "--allow-requantize",
            "--imatrix",
            matrix,
            model,
            out,
            "Q4_K_M",
            threads,
        ],
    }
    stages = {}
    for name, words in steps.items():
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([str(word) for word in words], check=True, capture_output=True, cwd=work)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        stages[name] = {"seconds": time.perf_counter() - start, "processor_seconds": processor}
    total = {key: sum(stage[key] for stage in stages.values()) for key in ("seconds", "processor_seconds")}
    return {
        "model": model.name,
        "asked": "Q4_K_M",
        "code": "llama.cpp",
        "bytes": out.stat().st_size,
        **total,
        "stages": stages,
    }


def predicted(model: str, row: Row, weights: int = 0) -> Row:
    """What `--dry-run` would say of an export, with the processor's time in the place of the clock's."""
    from mpo_exporter.effort import EFFORTS
    from mpo_exporter.measure.cost import export_cost, measured_rates
    from mpo_exporter.source import open_source
    from mpo_exporter.texts import held_out_text
    from mpo_formats.layout import content_tensors

    with open_source(model) as source:
        effort = EFFORTS[row["code"]].suited(weights or source.architecture.parameters())
        text = None if weights else held_out_text(source, None, None)[0]
        cost = export_cost(
            source.architecture,
            measured_rates(source.architecture, time.process_time),
            effort,
            windows=effort.windows,
            window=WINDOW,
            file_bytes=row["bytes"],
            source_bytes=sum(tensor.size for tensor in content_tensors(source.spec)),
            measured_tokens=0 if text is None else text.ids.size,
            surveyed="surveying" in row["stages"],
        )
    return {
        "processor_seconds": cost.seconds,
        "stages": cost.stages,
        "memory_bytes": cost.memory,
        "disk_bytes": cost.disk,
    }


def agreement(model: str, bits: list[float], folder: Path) -> Row:
    """The survey of normal effort beside that of the best."""
    import numpy as np

    from mpo_exporter.effort import BEST, NORMAL
    from mpo_exporter.measure.survey import survey
    from mpo_exporter.plan.budget import allocated_layers
    from mpo_exporter.source import open_source
    from mpo_exporter.texts import calibration_text, calibration_walk

    with open_source(model) as source:
        walk = calibration_walk(source, calibration_text(source), folder, WINDOWS)
        found, seconds = [], []
        for effort in (NORMAL, BEST):
            start = time.process_time()
            found.append(survey(source.weights, walk, care=effort.care, complete=False))
            seconds.append(time.process_time() - start)
        normal, best = found
        pairs = []
        for name, row in best.candidates.items():
            losses = {one.terms: one.loss for one in normal.candidates[name]}
            pairs += [(losses[one.terms], one.loss) for one in row if one.loss > 0 and one.terms in losses]
        ranks = np.argsort(np.argsort(np.array(pairs), axis=0), axis=0)
        excess = {}
        for each in bits:
            size = int(each * source.architecture.parameters() / 8)
            plans = [allocated_layers(source.spec, one.candidates, size) for one in found]
            ours, theirs = (best.total_loss(plan) or 0.0 for plan in plans)
            excess[f"{each:g}"] = ours / theirs - 1
    return {
        "model": Path(model).name,
        "code": "survey",
        "candidates": len(pairs),
        "rank_correlation": float(np.corrcoef(ranks.T)[0, 1]),
        "excess_of_plans": excess,
        "processor_seconds": {"normal": seconds[0], "best": seconds[1]},
    }


def shown(row: Row) -> str:
    """A row in one line."""
    kl = "" if row.get("kl_mean") is None else f" KL {row['kl_mean']:.5f}"
    stages = ", ".join(
        f"{name} {stage['seconds']:.1f} ({stage['processor_seconds']:.1f})" for name, stage in row["stages"].items()
    )
    whole = f", {row['extrapolated']['seconds']:.0f} with all blocks" if "extrapolated" in row else ""
    told = f"; predicted {row['predicted']['processor_seconds']:.0f}" if "predicted" in row else ""
    return (
        f"{row['model']} {row['asked']} {row['code']}: {row['seconds']:.0f} s ({row['processor_seconds']:.0f} of the processor"
        f"{told}){whole}, {row['bytes']:,} bytes, {row.get('peak_bytes', 0) / 1e9:.1f} GB{kl}: {stages}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="as mpo-export takes them")
    parser.add_argument("--bits", nargs="+", default=["4.25"], help="bits per weight, or `default`")
    parser.add_argument("--efforts", nargs="+", default=["normal"])
    parser.add_argument("--before", type=Path, help="another checkout")
    parser.add_argument("--llama", type=Path, help="folder of llama.cpp's programs")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of llama.cpp")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--survey", action="store_true")
    parser.add_argument("--work", type=Path, help="folder for files and caches", default=None)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        out = arguments.work / "speed.mpo"
        row = child(arguments.models[0], arguments.bits[0], arguments.child, out, arguments.weights)
        print(MARK + json.dumps(row), flush=True)
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        folder = Path(work)
        for model in arguments.models:
            share, weights = 1.0, 0
            if model.partition(":")[0] in SYNTHETIC:
                path, share, weights = written(model, folder)
                model = str(path)
            given = str(Path(model).resolve()) if Path(model).exists() else model
            codes = [("before", arguments.before / ".venv" / "bin" / "python")] if arguments.before else []
            codes += [(effort, Path(sys.executable)) for effort in arguments.efforts]
            for bits in arguments.bits:
                for code, python in codes:
                    row = exported(python.absolute(), given, bits, code, folder, weights)
                    if share < 1:
                        row = extrapolated(row, share)
                    if arguments.predict and code != "before":
                        row["predicted"] = predicted(given, row, weights)
                    rows.append(row)
                    print(shown(row), flush=True)
            if arguments.survey:
                numbers = [float(bits) for bits in arguments.bits if bits != "default"]
                rows.append(agreement(given, numbers, folder))
                print(json.dumps(rows[-1]), flush=True)
            if arguments.llama and given.endswith(".gguf"):
                rows.append(llama(arguments.llama.resolve(), Path(given), folder, arguments.threads))
                print(shown(rows[-1]), flush=True)
    from parts.results import write_results

    write_results(arguments.out, rows)


if __name__ == "__main__":
    main()
