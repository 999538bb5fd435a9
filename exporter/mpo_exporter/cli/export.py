"""What mpo-export does: check the request, read the texts, plan, export, heal, report."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mpo_exporter.calibrate.windows import WINDOW
from mpo_exporter.cli.progress import Pace, export_progress
from mpo_exporter.effort import QUICK, find_effort
from mpo_exporter.export import ExportTask, Listener, Result, export, planned_spec, planner_for, without_cores
from mpo_exporter.heal.command import check_healing, heal_exported, healing_notes
from mpo_exporter.measure.cost import NOMINAL, Cost, export_cost
from mpo_exporter.measure.survey import Survey
from mpo_exporter.plan.budget import default_bytes
from mpo_exporter.plan.file import write_plan
from mpo_exporter.plan.options import Options
from mpo_exporter.plan.planner import Planner, with_default_target
from mpo_exporter.plan.predict import Prediction, predict
from mpo_exporter.report.accuracy import measured_accuracy
from mpo_exporter.report.command import make_report
from mpo_exporter.report.facts import Accuracy, WithoutCores
from mpo_exporter.report.job import Job, prepare
from mpo_exporter.report.layers import Recorder
from mpo_exporter.report.terminal import HealedStage, print_report
from mpo_exporter.request import ExportRequest
from mpo_exporter.source import Source, open_source
from mpo_exporter.terms import stored_bytes
from mpo_exporter.texts import calibration_for, held_out_text, read_tasks
from mpo_exporter.work import work_folder, working
from mpo_formats import ModelSpec, MpoFile, OutputError
from mpo_formats.architecture import EMBEDDING, HEAD, full_rank
from mpo_formats.layout import content_tensors
from mpo_runtime import __version__
from mpo_runtime.cli import console
from mpo_runtime.cli.console import size_text
from mpo_runtime.cli.inspect import layer_text
from mpo_runtime.evaluation.questions import Task

# Exports that --max-kl may take: each one's measured KL corrects the next one's plan.
MOST_EXPORTS = 3


def run_export(request: ExportRequest) -> Result | None:
    """Carries out an export and prints its result; with `dry_run` it only makes a plan, and returns None.

    Raises:
        MpoError: for a request that cannot be honoured, before any long work where that can be known.
    """
    request.machine.prepare()
    with open_source(request.model) as source:
        target = request.target(source.name)
        request.check_paths(target)
        tasks = read_tasks(source, request.tasks)
        earlier = None if request.report is None or request.dry_run else prepare(request.report, request.force)
        reserved = check_healing(source, request.healing) if request.healing else {}
        task, reason, fitted_to = resolved(request, source, target, reserved)
        if request.dry_run:
            show_plan(source, task, request.save_plan)
            return None
        print(f"exporting {source.name} to {target} ({asked(task.options, source.spec)}); {fitted_to}", flush=True)
        check_disk(source, task)
        with working(work_folder(target), work_key(source, task), keep=request.keep_work, log=log) as work:
            result, recorder = export_within_kl(source, replace(task, work=work), recorded=request.report is not None)
        print_cut_bonds(result.spec, task.options)
        compare_cores = request.compare_cores and task.options.demands_cores
        # A report makes and measures the file without cores itself.
        plain = compared_without_cores(source, task, result) if compare_cores and not request.report else None
        if request.save_plan:
            write_plan(request.save_plan, result.spec.linears, force=request.force)
        healed = heal_exported(source, result, request.healing, task.text, task.device) if request.healing else None
        notes = healing_notes(healed) if healed else []
        if request.report is None:
            stage = HealedStage(healed.comparison, notes) if healed else None
            print_report(result, task.text, reason, stage, plain, accuracy_of(source, target, tasks, task.device))
            print_next_step(target)
            return result
        for note in notes:
            log(note)
        better = healed if healed and healed.written else result
        make_report(
            source,
            Job(
                file=target,
                name=source.name,
                folder=request.report,
                text=task.text,
                why_no_text=reason,
                calibration=task.calibration,
                fit_windows=task.windows,
                device=task.device,
                threads=request.machine.threads,
                tasks=tasks,
                without_cores=request.compare_cores if task.options.demands_cores else None,
                earlier=earlier,
                comparison=better.comparison,
                surveyed=result.surveyed,
                compression=recorder.compression(),
            ),
        )
        return result


def accuracy_of(source: Source, path: Path, tasks: tuple[Task, ...], device: str) -> tuple[Accuracy, ...]:
    """The accuracy of both models on the tasks; nothing where there are none."""
    if not tasks:
        return ()
    with console.progress("questions") as update:
        return measured_accuracy(source, path, tasks, device, update)


def work_key(source: Source, task: ExportTask) -> dict[str, Any]:
    """What the work of an export depends on, so that another one does not go on with it."""
    return {
        "mpo-runtime": __version__,
        "model": source.weights.sha256(),
        "text": None if task.calibration is None else task.calibration.sha256,
        "windows": task.windows,
        "effort": task.effort.name,
        "device": task.device,
        "options": repr(task.options),
    }


def print_next_step(path: Path) -> None:
    """Prints that a file was written, and how to use it: a chat needs a chat template, a text needs a tokenizer."""
    with MpoFile(path) as file:
        if file.file("tokenizer.json") is None:
            step = f"see what is in it: mpo-run info {path}"
        elif file.file("chat_template.jinja") is None:
            step = f'it has no chat template, let it continue a text: mpo-run generate {path} -p "…"'
        else:
            step = f"talk to it: mpo-run chat {path}"
    log(f"wrote {path}; {step}")


def resolved(
    request: ExportRequest, source: Source, target: Path, reserved: Mapping[str, str]
) -> tuple[ExportTask, str, str]:
    """The task of a request for an open model; the reason why nothing is measured; and what layers are fitted to, in words.

    Args:
        reserved: the longest entries that healing will add to the provenance.
    """
    text, reason = held_out_text(source, request.measure.text, request.measure.tokens)
    effort = find_effort(request.effort).suited(source.architecture.parameters())
    chosen = request.calibration.windows
    windows = effort.windows if chosen is None else chosen
    calibration, fitted_to = calibration_for(source, request.options, request.calibration.text, windows)
    task = ExportTask(
        target=target,
        options=with_default_target(request.options) if calibration or effort == QUICK else request.options,
        force=request.force,
        calibration=calibration,
        windows=windows,
        text=text,
        prefixes=request.prefixes,
        device=request.machine.device,
        reserved=reserved,
        effort=effort,
    )
    return task, reason, fitted_to


def export_within_kl(source: Source, task: ExportTask, *, recorded: bool) -> tuple[Result, Recorder]:
    """Exports, and again with a corrected plan as long as the measured KL is above the one that was asked for.

    Args:
        recorded: whether the fits are recorded for a report.
    """
    cost = expected_cost(source, task)
    for number in range(MOST_EXPORTS):
        pace = Pace(cost.stages, expected_bytes(source, task) / 1e6)
        with export_progress(pace) as update:
            recorder = Recorder(update)
            listener = Listener(recorder.progress, log, recorder.fitted if recorded else None, pace.planned)
            result = export(source, replace(task, force=task.force or number > 0), listener)
        if not exceeds_kl(result, task.options, again=number + 1 < MOST_EXPORTS):
            break
    return result, recorder


def expected_bytes(source: Source, task: ExportTask) -> int:
    """About the bytes of the file to write: the target, or what the default would be."""
    return task.options.target.bytes_of(source.spec) or default_bytes(source.spec)


def expected_cost(source: Source, task: ExportTask) -> Cost:
    """What an export takes on a nominal machine: memory and disk, and how its time is shared out among the stages."""
    text = task.calibration
    window = min(WINDOW, source.architecture.max_position_embeddings)
    return export_cost(
        source.architecture,
        NOMINAL,
        task.effort,
        windows=0 if text is None else min(task.windows, text.ids.size // window),
        window=window,
        file_bytes=expected_bytes(source, task),
        source_bytes=sum(tensor.size for tensor in content_tensors(source.spec)),
        measured_tokens=0 if task.text is None else task.text.ids.size,
        surveyed=task.options.allocates,
    )


def check_disk(source: Source, task: ExportTask) -> None:
    """Raises OutputError, before the work, where the disk of the target has less room than the export takes."""
    folder, needed = task.target.absolute().parent, expected_cost(source, task).disk
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder}: this export takes about {size_text(needed)} of disk, {size_text(free)} are free; "
            "free some, or give another folder with --out"
        )


def log(message: str) -> None:
    """Prints a message, such as that a measurement was found in the cache."""
    print(message, flush=True)


def asked(options: Options, source: ModelSpec) -> str:
    """What was asked for, in words."""
    name = options.plan if options.file is None else f"file:{options.file.path}"
    if options.named.replaces_keys:
        return f"plan {name}, rank ≤ {options.keys.rank}"
    chi = options.largest_chi
    bonds = f"cores of χ = {chi} in every attention and MLP matrix" if options.demands_cores else f"χ ≤ {chi}"
    if options.target.max_kl is not None:
        return f"plan {name}, KL of at most {options.target.max_kl:g}, {bonds}"
    size = options.target.bytes_of(source)
    return f"plan {name}, {bonds}" + ("" if size is None else f", at most {size:,} bytes")


def exceeds_kl(result: Result, options: Options, *, again: bool) -> bool:
    """Whether the measured KL is above the one that was asked for; prints so, and what follows from it."""
    most = options.target.max_kl
    if most is None or result.comparison is None or result.comparison.kl_mean <= most:
        return False
    follows = "planning again with what was learned" if again else "give a smaller one, or more --calib-windows"
    log(f"measured a KL of {result.comparison.kl_mean:.4g}, above --max-kl {most:g}; {follows}")
    return True


def compared_without_cores(source: Source, task: ExportTask, result: Result) -> WithoutCores | None:
    """A file of the same size without cores, fitted and measured; None, saying why, where that cannot be done."""
    missing = "no text to measure on" if task.text is None else "no calibration text" if not task.calibration else ""
    if missing:
        log(f"the same bytes without cores: not measured, there is {missing}")
        return None
    log("exporting the same bytes without cores, to compare (--no-compare-cores leaves this out)")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="without-cores-", dir=task.target.parent) as work:
        plain = replace(task, target=Path(work) / "plain.mpo", prefixes=(), surveyed=result.surveyed)
        with console.progress("export") as update:
            found = without_cores(source, result.spec, result.file_bytes, plain, Listener(update))
    if found.comparison is None:
        return None
    return WithoutCores.of(found.file_bytes, found.comparison, time.perf_counter() - start)


def print_cut_bonds(spec: ModelSpec, options: Options) -> None:
    """Prints how many operators have a full rank below χ, at which their bonds end; and what has no cores despite a demand."""
    terms = [term for linear in spec.linears for term in linear.terms if term.kind == "mpo"]
    ranks = [max(full_rank(term.out_dims, term.in_dims)) for term in terms]
    cut = [rank for rank in ranks if rank < options.largest_chi]
    if cut and (options.named.takes_chi or options.demands_cores):
        log(
            f"χ of {options.largest_chi:,} is above the full rank of {len(cut)} of {len(ranks)} operators: "
            f"their bonds end at {max(cut):,} or less"
        )
    bare = [one.name for one in spec.linears if one.name not in (EMBEDDING, HEAD) and one.terms[0].kind == "dense"]
    if bare and options.demands_cores and options.choice.pattern is None and options.file is None:
        log(f"{len(bare)} matrices have no integers that cores could stand beside, such as {bare[0]}: no cores there")


def show_plan(source: Source, task: ExportTask, save_plan: Path | None) -> None:
    """Makes a plan, saves it if a file is named, and prints it with its predictions."""
    tokens = 0 if task.text is None else task.text.ids.size
    with tempfile.TemporaryDirectory(prefix="mpo-plan-") as work, console.progress("plan") as update:
        planner = planner_for(source, task, Path(work), Listener(update, log))
        spec = planned_spec(source, task, planner)
        if save_plan:
            write_plan(save_plan, spec.linears, force=task.force)
        prediction = predict(planner, spec, tokens, task.effort, walk_window(planner))
    print_plan(spec, prediction, None if planner.blind else planner.surveyed)


def walk_window(planner: Planner) -> int:
    """Tokens of a window of the planner's calibration text."""
    return WINDOW if planner.walk is None else planner.walk.windows.shape[1]


def print_plan(spec: ModelSpec, prediction: Prediction, surveyed: Survey | None) -> None:
    """Prints every layer's terms, and the predictions for the whole file."""
    table = Table("layer", "terms", "bytes", "bits", "expected KL")
    table.columns[0].no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for linear in spec.linears:
        size = stored_bytes(linear)
        loss = None if surveyed is None else surveyed.loss(linear)
        table.add_row(
            linear.name.removeprefix("model.").removeprefix("layers."),
            layer_text(linear),
            f"{size:,}",
            f"{8 * size / (linear.out_features * linear.in_features):.2f}",
            "" if loss is None else f"{loss:.2g}",
        )
    out = Console(highlight=False)
    out.print(table)
    for line in prediction_lines(spec, prediction):
        out.print(line)


def prediction_lines(spec: ModelSpec, prediction: Prediction) -> list[str]:
    """The predictions in words."""
    size = prediction.file_bytes
    parameters = spec.architecture.parameters()
    unknown = "unknown"
    kl = unknown if prediction.kl is None else f"{prediction.kl:.4f} nats per token"
    speed = unknown if prediction.tokens_per_second is None else f"{prediction.tokens_per_second:.4g} tokens/s"
    cores = sum(any(term.kind == "mpo" for term in linear.terms) for linear in spec.linears)
    return [
        f"predicted bytes: {size:,} ({size_text(size)}, {8 * size / parameters:.2f} bits per weight)",
        f"predicted memory: {size_text(prediction.memory_bytes)} with a full context of {prediction.context:,} tokens",
        f"predicted KL: {kl}",
        f"predicted speed: {speed}, one conversation, on this machine",
        *(
            f"predicted export with --effort {name}: {time_text(cost.seconds)}, {size_text(cost.memory)} of memory, "
            f"{size_text(cost.disk)} of disk"
            for name, cost in prediction.costs.items()
        ),
        f"layers with cores: {cores} of {len(spec.linears)}",
        *prediction.reasons,
    ]


def time_text(seconds: float) -> str:
    """A time as seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
