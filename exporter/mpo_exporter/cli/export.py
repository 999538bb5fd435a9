"""What mpo-export does: find the source, export, report."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from mpo_exporter.calibrate.windows import COUNT, calibration_text
from mpo_exporter.cli.show_plan import print_plan
from mpo_exporter.export import Result, export, planned_spec, planner_for
from mpo_exporter.heal.exported import check_healing, heal_exported
from mpo_exporter.heal.settings import Settings
from mpo_exporter.plan.file import write_plan
from mpo_exporter.plan.named import Options
from mpo_exporter.plan.predict import predict
from mpo_exporter.report.folder import prepare
from mpo_exporter.report.gather import Job
from mpo_exporter.report.make import make_report
from mpo_exporter.report.record import Recorder
from mpo_exporter.report.terminal import print_healing, print_report
from mpo_exporter.request import Asked
from mpo_exporter.source import Source, find_source
from mpo_formats import ConfigError, ModelSpec, OutputError
from mpo_formats.architecture import full_rank
from mpo_runtime.cli import console
from mpo_runtime.loading import check_device, read_text_files, set_threads
from mpo_runtime.text.token_text import BUILT_IN_TEXT, TokenText, read_tokens
from mpo_runtime.weights.checkpoint import Checkpoint

# Plans that are fitted to the built-in calibration text where the user names none.
CALIBRATED_PLANS = ("auto", "corrected")
# Exports that --max-kl may take: what one measured corrects the next one's plan.
MOST_EXPORTS = 3
# Multiply-adds and tokens that measuring may take if the user says nothing: at most a minute on two slow cores.
MEASURE_BUDGET = 2e11
MOST_TOKENS = 20_000
LEAST_TOKENS = 512


def run_export(
    model: str,
    plan: str,
    chi: int,
    cores: int,
    out: Path | None,
    force: bool,
    text: Path | None,
    measure_tokens: int | None,
    prefixes: tuple[int, ...],
    device: str,
    threads: int | None,
    *,
    calib: Path | None = None,
    calib_windows: int = COUNT,
    asked: Asked | None = None,
    heal: Settings | None = None,
    heal_text: Path | None = None,
    report: Path | None = None,
) -> Result | None:
    """Exports a model, heals the file where `heal` is given, and prints the report; only a plan with --dry-run."""
    options = (asked := asked or Asked()).options(plan, chi, cores)
    check_asked(chi, measure_tokens, calib_windows, prefixes, device, threads)
    source = find_source(model)
    target = file_to_write(out or Path(f"{source.name}.mpo"), force or asked.dry_run)
    earlier = None if report is None or asked.dry_run else prepare(report, force)
    later = check_healing(source.folder, heal, heal_text) if heal else None
    held_out, reason = held_out_text(source.folder, text, measure_tokens)
    calibration, told = calibration_for(source.folder, options, plan, calib, calib_windows)
    options = for_model(asked, plan, options, source, calibration)
    if asked.dry_run or asked.save_plan:
        show_plan(asked, options, source, calibration, calib_windows, 0 if held_out is None else held_out.ids.size)
    if asked.dry_run:
        return None
    print(f"exporting {source.name} to {target} (plan {plan}, {wanted(options)}); {told}", flush=True)
    for number in range(MOST_EXPORTS):
        with console.progress("export") as update:
            recorder = Recorder(update)
            result = export(
                source.folder,
                target,
                options,
                force=force or number > 0,
                revision=source.revision,
                text=held_out,
                prefixes=prefixes,
                device=device,
                progress=recorder.progress,
                watch=recorder.watch if report else None,
                calibration=calibration,
                windows=calib_windows,
                tell=tell,
                later=later,
            )
        if not misses(result, options, number + 1 < MOST_EXPORTS):
            break
    tell_cut_bonds(result.spec, options)
    healed = heal_exported(result, source.folder, heal, heal_text, held_out, device) if heal else None
    if report is None:
        print_report(result, held_out, reason, healed)
        return result
    print_healing(healed)
    better = healed if healed and healed.written else result
    make_report(
        Job(
            file=target,
            teacher=source.folder,
            name=source.name,
            folder=report,
            text=held_out,
            why_no_text=reason,
            calibration=calibration,
            fit_windows=calib_windows,
            device=device,
            threads=threads,
            earlier=earlier,
            comparison=better.comparison,
            surveyed=result.surveyed,
            compression=recorder.compression(),
        )
    )
    return result


def file_to_write(target: Path, free: bool) -> Path:
    """The file to write; raises OutputError where it exists, unless that makes no difference."""
    if not free and os.path.lexists(target) and not target.is_dir():
        raise OutputError(f"{target}: exists already; give another name with --out or overwrite it with --force")
    return target


def check_asked(
    chi: int, measure_tokens: int | None, windows: int, prefixes: tuple[int, ...], device: str, threads: int | None
) -> None:
    """Raises ConfigError for numbers out of range or a device that is not there; sets the threads."""
    check_device(device)
    if measure_tokens is not None and measure_tokens < 0:
        raise ConfigError(f"--measure-tokens {measure_tokens}: expected 0 or more")
    if windows < 0:
        raise ConfigError(f"--calib-windows {windows}: expected 0 or more")
    set_threads(threads)
    for prefix in prefixes:
        if not 1 <= prefix < chi:
            raise ConfigError(f"--certify-chi {prefix}: expected 1 to {chi - 1}, below --chi")


def tell(message: str) -> None:
    """Prints what was found, stale or made among the kept measurements."""
    print(message, flush=True)


def tell_cut_bonds(spec: ModelSpec, options: Options) -> None:
    """Says where χ is above the full rank of operators, whose bonds end there."""
    terms = [term for linear in spec.linears for term in linear.terms if term.kind == "mpo"]
    ranks = [max(full_rank(term.out_dims, term.in_dims)) for term in terms]
    cut = [rank for rank in ranks if rank < options.chi]
    if cut and options.plan in ("paper", "corrected"):
        tell(
            f"χ of {options.chi:,} is above the full rank of {len(cut)} of {len(ranks)} operators: "
            f"their bonds end at {max(cut):,} or less"
        )


def for_model(asked: Asked, plan: str, options: Options, source: Source, calibration: TokenText | None) -> Options:
    """The options with what only the model tells: the target in bytes, the layers of a plan file."""
    checkpoint = Checkpoint(source.folder)
    try:
        return asked.resolved(plan, options, checkpoint.spec, calibration is not None)
    finally:
        checkpoint.close()


def wanted(options: Options) -> str:
    """What was asked for, in words."""
    if options.max_kl is not None:
        return f"KL of at most {options.max_kl:g}, χ ≤ {options.chi}"
    if options.plan == "k-proj":
        return f"rank ≤ {options.keys.rank}"
    return f"χ ≤ {options.chi}" + ("" if options.target_bytes is None else f", at most {options.target_bytes:,} bytes")


def misses(result: Result, options: Options, again: bool) -> bool:
    """Whether a measured KL is above what was asked for; says so."""
    if options.max_kl is None or result.comparison is None or result.comparison.kl_mean <= options.max_kl:
        return False
    follows = "planning again with what was learned" if again else "give a smaller one, or more --calib-windows"
    print(f"measured a KL of {result.comparison.kl_mean:.4g}, above --max-kl {options.max_kl:g}; {follows}", flush=True)
    return True


def show_plan(
    asked: Asked, options: Options, source: Source, calibration: TokenText | None, windows: int, tokens: int
) -> None:
    """Makes the plan, saves it where that was asked for, and prints it with its predictions for a dry run."""
    checkpoint = Checkpoint(source.folder)
    try:
        with tempfile.TemporaryDirectory(prefix="mpo-plan-") as work, console.progress("plan") as update:
            planner = planner_for(checkpoint, calibration, windows, Path(work), None, update, tell)
            spec = planned_spec(planner, options, source.revision)
            if asked.save_plan:
                write_plan(asked.save_plan, spec.linears)
            prediction = predict(planner, spec, tokens) if asked.dry_run else None
        if prediction:
            print_plan(spec, prediction, planner.surveyed)
    finally:
        checkpoint.close()


def calibration_for(
    folder: Path, options: Options, plan: str, calib: Path | None, windows: int
) -> tuple[TokenText | None, str]:
    """The text to calibrate on, or None, and what to tell about it.

    `auto`, `corrected` and plan files always calibrate, and what chooses layers by sensitivity; other plans when asked to.
    """
    unasked = plan not in CALIBRATED_PLANS and not plan.startswith("file:") and not options.chooses
    if windows == 0 or plan == "dense" or (calib is None and unasked):
        return None, "fitted to the weights alone, without calibration text"
    source = Checkpoint(folder)
    tokenizer, template = read_text_files(source)
    source.close()
    if tokenizer is None and calib is None:
        return None, "fitted to the weights alone: the model has no tokenizer.json to read calibration text with"
    text = calibration_text(calib, tokenizer, template)
    return text, f"fitted to the calibration text {text.name}"


def held_out_text(folder: Path, text: Path | None, tokens: int | None) -> tuple[TokenText | None, str]:
    """The tokens to measure on, or None and the reason why nothing is measured."""
    if tokens == 0:
        return None, "--measure-tokens 0"
    source = Checkpoint(folder)
    tokenizer, template = read_text_files(source)
    parameters = source.architecture.parameters()
    source.close()
    if tokenizer is None:
        return None, "the model has no tokenizer.json"
    whole = read_tokens(text or BUILT_IN_TEXT, tokenizer, template)
    budget = min(int(MEASURE_BUDGET / parameters), MOST_TOKENS) if tokens is None else tokens
    if tokens is None and budget < LEAST_TOKENS:
        return None, "the model is large for this machine; give --measure-tokens N to measure all the same"
    return whole.first(budget), ""
