"""mpo-export: a dense model in, a compressed `.mpo` file out."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mpo_exporter.cli import options as given
from mpo_exporter.cli.heal import HealEpochs, HealMinutes, HealTokens
from mpo_runtime.cli import console

# Kept here so that --help need not import torch; a test compares it with the calibration's own default.
CALIBRATION_WINDOWS = 96

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=True)


def show_version(wanted: bool) -> None:
    """Prints the version and ends the program."""
    if wanted:
        from mpo_runtime import __version__

        typer.echo(f"mpo-runtime {__version__}")
        raise typer.Exit


@app.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="mpo-export heal FILE --teacher MODEL retrains a file briefly. "
    "mpo-export profile MODEL tells how much each layer matters. "
    "mpo-export report FILE --teacher MODEL --out DIR reports on a file. "
    "Add --debug for a traceback. Exit codes: 0 done, 1 failed, 2 wrong usage.",
)
def export(
    model: given.Model,
    chi: given.Chi = 32,
    cores: given.CoreCount = 2,
    plan: given.PlanName = "auto",
    out: given.Out = None,
    target_size: given.TargetSize = None,
    target_bpw: given.TargetBits = None,
    target_ratio: given.TargetRatio = None,
    max_kl: given.MostKl = None,
    for_speed: given.ForSpeed = False,
    layers: given.Layers = None,
    top_k: given.TopK = None,
    compression_ratio: given.Ratio = None,
    sensitivity: given.Sensitivity = "fast",
    rank: given.Rank = 128,
    quant_bits: given.QuantBits = 8,
    norm_correction: given.Norm = True,
    min_dim: given.LeastSide = 64,
    dry_run: given.DryRun = False,
    save_plan: given.SavePlan = None,
    calib: given.Calib = None,
    calib_windows: given.Windows = CALIBRATION_WINDOWS,
    force: given.Force = False,
    text: given.EvalText = None,
    measure_tokens: given.MeasureTokens = None,
    report: given.ReportFolder = None,
    certify_chi: given.Certify = None,
    heal: given.Heal = False,
    heal_tokens: HealTokens = None,
    heal_epochs: HealEpochs = None,
    heal_minutes: HealMinutes = None,
    heal_text: given.HealText = None,
    device: given.Device = "cpu",
    threads: given.Threads = None,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Compress a decoder model into one .mpo file and report what that cost."""
    from mpo_exporter.cli.export import run_export
    from mpo_exporter.heal.command import heal_settings
    from mpo_exporter.request import Asked

    asked = Asked(
        target_size,
        target_bpw,
        target_ratio,
        max_kl,
        for_speed,
        layers,
        top_k,
        compression_ratio,
        sensitivity,
        rank,
        quant_bits,
        norm_correction,
        min_dim,
        dry_run,
        save_plan,
    )
    run_export(
        model,
        plan,
        chi,
        cores,
        out,
        force,
        text,
        measure_tokens,
        tuple(certify_chi or ()),
        device,
        threads,
        calib=calib,
        calib_windows=calib_windows,
        asked=asked,
        report=report,
        heal=heal_settings(heal, heal_tokens, heal_epochs, heal_minutes, heal_text),
        heal_text=heal_text,
    )


def main() -> None:
    """The entry point of mpo-export; `heal`, `profile` and `report` are programs of their own (a folder: ./heal)."""
    if sys.argv[1:2] == ["heal"]:
        from mpo_exporter.cli import heal as cli

        sys.argv = [sys.argv[0], *sys.argv[2:]]
        cli.main()
        return
    if sys.argv[1:2] == ["profile"]:
        from mpo_exporter.cli import profile as profile_cli

        sys.argv = [sys.argv[0], *sys.argv[2:]]
        profile_cli.main()
        return
    if sys.argv[1:2] == ["report"]:
        from mpo_exporter.cli import report as report_cli

        sys.argv = [sys.argv[0], *sys.argv[2:]]
        report_cli.main()
        return
    console.run(app, "mpo-export")
