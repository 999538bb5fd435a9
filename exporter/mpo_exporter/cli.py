"""mpo-export: a dense model in, a compressed `.mpo` file out."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mpo_exporter.heal.cli import HealEpochs, HealMinutes, HealTokens
from mpo_runtime.cli import console

# Kept here so that --help need not import torch; a test compares it with the calibration's own default.
CALIBRATION_WINDOWS = 96

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=True)


class Plan(StrEnum):
    """The named plans."""

    AUTO = "auto"
    PAPER = "paper"
    INT4 = "int4"
    DENSE = "dense"


def show_version(wanted: bool) -> None:
    """Prints the version and ends the program."""
    if wanted:
        from mpo_runtime import __version__

        typer.echo(f"mpo-runtime {__version__}")
        raise typer.Exit


TargetSize = Annotated[
    str | None,
    typer.Option(help="The most bytes of the whole file, such as 2.1GB: every layer gets the bits that it needs."),
]
TargetBits = Annotated[
    float | None, typer.Option(help="The same in bits of the whole file per weight of the dense model.")
]
Calib = Annotated[
    Path | None,
    typer.Option("--calib", help="Calibration text, .jsonl or .txt.", show_default="a built-in one for auto"),
]

HealText = Annotated[
    Path | None,
    typer.Option(help="Text to heal on: .jsonl (chat rows or text), .txt, .u16, .npy.", show_default="embedded"),
]


@app.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="mpo-export heal FILE --teacher MODEL retrains a file briefly. "
    "Add --debug for a traceback. Exit codes: 0 done, 1 failed, 2 wrong usage.",
)
def export(
    model: Annotated[
        str,
        typer.Argument(
            help="demo (embedded), granite, granite-2b, a Hugging Face folder, or a hub id owner/name.",
            show_default=False,
        ),
    ],
    chi: Annotated[int, typer.Option(help="The largest bond dimension of the cores.")] = 32,
    cores: Annotated[int, typer.Option(help="Cores of each operator.")] = 2,
    plan: Annotated[
        Plan,
        typer.Option(
            help="auto: int4 corrected by int8 cores, fitted to calibration text; paper: fp16 cores replace most matrices, "
            "int4 the rest; int4: no cores (these two use calibration text only with --calib); dense: bf16 as it is."
        ),
    ] = Plan.AUTO,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file to write.", show_default="MODEL.mpo")
    ] = None,
    target_size: TargetSize = None,
    target_bpw: TargetBits = None,
    calib: Calib = None,
    calib_windows: Annotated[
        int, typer.Option(help="Windows of 256 tokens to calibrate on, the more the better; 0 uses no text.")
    ] = CALIBRATION_WINDOWS,
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite an existing file.")] = False,
    text: Annotated[
        Path | None,
        typer.Option("--eval-text", help="Held-out text to measure on.", show_default="a small built-in one"),
    ] = None,
    measure_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens to measure on; 0 measures nothing.", show_default="as many as take about a minute"),
    ] = None,
    certify_chi: Annotated[
        list[int] | None,
        typer.Option(help="Measure the file's prefix at this χ too; may be repeated.", show_default=False),
    ] = None,
    heal: Annotated[
        bool, typer.Option("--heal", help="Retrain the file briefly afterwards; the bounds below imply it.")
    ] = False,
    heal_tokens: HealTokens = None,
    heal_epochs: HealEpochs = None,
    heal_minutes: HealMinutes = None,
    heal_text: HealText = None,
    device: Annotated[str, typer.Option(envvar="MPO_DEVICE", help="cpu, or a torch device such as cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option("--threads", "-t", envvar="MPO_THREADS", help="CPU threads.")] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Compress a decoder model into one .mpo file and report what that cost."""
    from mpo_exporter.command import run_export
    from mpo_exporter.heal.exported import heal_settings

    run_export(
        model, plan.value, chi, cores, out, force, text, measure_tokens, tuple(certify_chi or ()), device, threads,
        calib=calib, calib_windows=calib_windows, target_size=target_size, target_bpw=target_bpw,
        heal=heal_settings(heal, heal_tokens, heal_epochs, heal_minutes), heal_text=heal_text,
    )  # fmt: skip


def main() -> None:
    """The entry point of mpo-export; `mpo-export heal …` is a program of its own (a model folder of that name is ./heal)."""
    if sys.argv[1:2] == ["heal"]:
        from mpo_exporter.heal import cli

        sys.argv = [sys.argv[0], *sys.argv[2:]]
        cli.main()
        return
    console.run(app, "mpo-export")
