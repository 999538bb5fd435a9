"""mpo-export: a dense model in, a compressed `.mpo` file out. Commands import what they need when they run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mpo_exporter.cli import options as given
from mpo_runtime.cli import console
from mpo_runtime.cli.options import grouped

PROGRAM = "mpo-export"
# The command that is run if none is named: `mpo-export MODEL`.
DEFAULT = "export"
SETTINGS = {"help_option_names": ["-h", "--help"]}


class DefaultGroup(TyperGroup):
    """A group of commands that runs `export` if its first argument names none; a folder is then given as ./heal."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts `export` before arguments that begin with neither a command nor an option of the group itself."""
        own = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        if not args or (args[0] not in self.commands and args[0] not in own):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the help of `export`, and the other commands."""
        export = self.commands[DEFAULT]
        own = export.context_class(export, info_name=ctx.info_name, **export.context_settings)
        export.format_usage(own, formatter)
        export.format_help_text(own, formatter)
        export.format_options(own, formatter)
        self.format_commands(ctx, formatter)
        export.format_epilog(own, formatter)


app = typer.Typer(cls=DefaultGroup, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=SETTINGS)


def show_version(wanted: bool) -> None:
    """Prints the version and ends the program."""
    if wanted:
        from mpo_runtime import __version__

        typer.echo(f"mpo-runtime {__version__}")
        raise typer.Exit


@app.command(
    context_settings=SETTINGS,
    short_help="Compress a model; the default command.",
    epilog="Add --debug for a traceback. Exit codes: 0 done, 1 failed, 2 wrong usage.",
)
@grouped
def export(
    model: given.Model,
    *,
    chi: given.Chi = None,
    cores: given.CoreCount = 2,
    plan: given.PlanName = "auto",
    out: given.Out = None,
    target: given.TargetOptions,
    allocation: given.AllocationOptions,
    choice: given.ChoiceOptions,
    keys: given.KeyProjections,
    dry_run: given.DryRun = False,
    effort: given.EffortName = "normal",
    keep_work: given.KeepWork = False,
    save_plan: given.SavePlan = None,
    compare_cores: given.CompareCores = True,
    calibration: given.CalibrationOptions,
    force: given.Force = False,
    measure: given.MeasureOptions,
    task: given.Tasks = None,
    report: given.ReportFolder = None,
    certify_chi: given.Prefixes = None,
    heal: given.Heal = False,
    bounds: given.HealBounds,
    heal_text: given.HealText = None,
    machine: given.MachineOptions,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Compress a decoder model into one .mpo file and report what that cost."""
    from mpo_exporter.cli.export import run_export
    from mpo_exporter.request import ExportRequest, plan_options

    request = ExportRequest(
        model=model,
        options=plan_options(
            plan, chi, cores, target=target.record(), choice=choice.record(), keys=keys.record(), **allocation.record()
        ),
        out=out,
        force=force,
        calibration=calibration.record(),
        measure=measure.record(),
        tasks=tuple(task or ()),
        prefixes=tuple(certify_chi or ()),
        healing=bounds.request(heal, heal_text),
        report=report,
        dry_run=dry_run,
        save_plan=save_plan,
        compare_cores=compare_cores,
        effort=effort,
        keep_work=keep_work,
        machine=machine.record(),
    )
    run_export(request)


@app.command(
    "heal",
    context_settings=SETTINGS,
    short_help="Retrain a .mpo file briefly.",
    epilog="Several devices: torchrun --nproc-per-node N -m mpo_exporter.heal FILE … with the same options. "
    "A healing that was interrupted continues when the same command is given again.",
)
@grouped
def heal_command(
    file: given.File,
    *,
    teacher: given.Teacher,
    bounds: given.HealBounds,
    text: Annotated[
        Path | None,
        typer.Option(help="Text to train on: .jsonl (chat rows or text), .txt, .u16, .npy.", show_default="embedded"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file to write.", show_default="FILE-healed.mpo")
    ] = None,
    force: given.Force = False,
    settings: given.HealSettings,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder for checkpoints and the teacher's logits and states; is kept.",
            show_default="beside the output",
        ),
    ] = None,
    measure: given.MeasureOptions,
    machine: given.MachineOptions,
) -> None:
    """Retrain a compressed model briefly, so that it gives again what the dense model gives."""
    from mpo_exporter.cli.export import print_next_step
    from mpo_exporter.heal.command import HealCommand, run_heal

    healed = run_heal(
        HealCommand(
            file=file,
            teacher=teacher,
            settings=settings.record(bounds),
            out=out,
            force=force,
            text=text,
            work=work,
            measure=measure.record(),
            machine=machine.record(),
        )
    )
    if healed:
        print_next_step(healed.path)


@app.command(
    "profile",
    context_settings=SETTINGS,
    short_help="Show how much each layer matters.",
    epilog="Measurements are cached and reused by plans; MPO_CACHE names their folder.",
)
@grouped
def profile_command(
    model: given.Model,
    *,
    level: Annotated[
        str,
        typer.Option(
            help="fast: expected from gradients, minutes at 8B; full: each layer compressed alone and measured."
        ),
    ] = "fast",
    bits: Annotated[
        int, typer.Option(help="Bits of the integers that layers are judged with, 2, 3, 4, 5, 6 or 8.")
    ] = 2,
    chi: given.ProfileChi = 32,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for profile.json and plots (PNG).", show_default=False)
    ] = None,
    no_plots: Annotated[bool, typer.Option("--no-plots", help="Write no plots; these need matplotlib.")] = False,
    calibration: given.CalibrationOptions,
    machine: given.MachineOptions,
) -> None:
    """Tell how much each layer matters: by block, and by type of matrix."""
    from mpo_exporter.cli.profile import run_profile
    from mpo_exporter.request import ProfileRequest

    run_profile(
        ProfileRequest(
            model=model,
            level=level,
            bits=bits,
            chi=chi,
            out=out,
            plots=not no_plots,
            calibration=calibration.record(),
            machine=machine.record(),
        )
    )


@app.command(
    "report",
    context_settings=SETTINGS,
    short_help="Report on an existing .mpo file.",
    epilog="docs/report.md explains every figure. mpo-export MODEL --report DIR makes the report with the export, "
    "which also shows how the compression went.",
)
@grouped
def report_command(
    file: given.File,
    *,
    teacher: given.Teacher,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder for report.html and report.json.", show_default=False)
    ],
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Write into a folder that holds something else.")
    ] = False,
    measure: given.MeasureOptions,
    task: given.Tasks = None,
    calib: Annotated[
        Path | None,
        typer.Option(help="Text for the errors of the layers, .jsonl or .txt.", show_default="a built-in one"),
    ] = None,
    calib_windows: Annotated[
        int | None,
        typer.Option(
            help="Windows of 256 tokens of it; 0 measures layers by their weights alone.",
            show_default="32, fewer of a large model",
        ),
    ] = None,
    without_cores: given.WithoutCores = None,
    machine: given.MachineOptions,
) -> None:
    """Measure a .mpo file beside its dense model and write the report: a page, JSON, and a table here."""
    from mpo_exporter.report.command import ReportCommand, run_report

    run_report(
        ReportCommand(
            file=file,
            teacher=teacher,
            out=out,
            force=force,
            measure=measure.record(),
            tasks=tuple(task or ()),
            calib=calib,
            calib_windows=calib_windows,
            without_cores=without_cores,
            machine=machine.record(),
        )
    )


@app.command(
    "to-hf",
    context_settings=SETTINGS,
    short_help="Write a .mpo file as a Hugging Face folder.",
    epilog="docs/serving.md says which program reads what. --as compressed-tensors needs pip install 'mpo-runtime[hf]'.",
)
def to_hf_command(
    file: given.File,
    *,
    out: given.Folder,
    form: given.HfForm = "compressed-tensors",
    dtype: given.FloatType = "bf16",
    least_bits: given.LeastBits = 2,
    force: given.Force = False,
) -> None:
    """Write a .mpo file as a Hugging Face folder, for transformers, vLLM and other programs."""
    from mpo_exporter.convert.hf import HfRequest, write_hf

    for line in write_hf(HfRequest(file, out, form, dtype, least_bits, force)):
        typer.echo(line)


@app.command(
    "to-vllm",
    context_settings=SETTINGS,
    short_help="Write a .mpo file as a folder that vLLM serves.",
    epilog="docs/serving.md says how to serve it; vLLM needs the extra vllm of this package beside it.",
)
def to_vllm_command(file: given.File, *, out: given.Folder, force: given.Force = False) -> None:
    """Write a .mpo file, integers and cores as they are, as a folder for vLLM with the plugin mpo_vllm."""
    from mpo_exporter.convert.vllm import write_vllm

    for line in write_vllm(file, out, force=force):
        typer.echo(line)


@app.command(
    "to-gguf",
    context_settings=SETTINGS,
    short_help="Write a .mpo file of integers as a GGUF file.",
    epilog="docs/serving.md says what is exact and what is rounded.",
)
def to_gguf_command(
    file: given.File,
    *,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file to write.", show_default="FILE.gguf")
    ] = None,
    measure_tokens: Annotated[
        int, typer.Option(help="Tokens of the built-in text on which the loss of rounding is measured; 0: none.")
    ] = 2048,
    force: given.Force = False,
) -> None:
    """Write a .mpo file of integers for llama.cpp: granite, llama, mistral, qwen2, qwen3; rounded where need be, and measured."""
    from mpo_exporter.convert.gguf import GgufRequest, write_gguf

    target = file.with_suffix(".gguf") if out is None else out
    for line in write_gguf(GgufRequest(file, target, measure_tokens, force)):
        typer.echo(line)


def main() -> None:
    """The entry point of mpo-export; messages of a command name it, such as `mpo-export heal: error: …`."""
    names = {command.name for command in app.registered_commands if command.name}
    program = " ".join([PROGRAM, *(name for name in sys.argv[1:2] if name in names)])
    console.run(lambda prog_name: app(prog_name=PROGRAM), program)
