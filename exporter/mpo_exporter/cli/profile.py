"""mpo-export profile: the options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpo_exporter.cli.options import Calib, Chi, Device, Model, Threads, Windows
from mpo_runtime.cli import console

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)

Level = Annotated[
    str,
    typer.Option(help="fast: expected from gradients, minutes at 8B; full: each layer compressed alone and measured."),
]
Bits = Annotated[int, typer.Option(help="Bits of the integers that layers are judged with, 2, 3, 4, 5, 6 or 8.")]
OutFolder = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder for profile.json and plots (PNG).", show_default=False)
]
NoPlots = Annotated[bool, typer.Option("--no-plots", help="Write no plots; these need matplotlib.")]


@app.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Measurements are kept and reused by plans; MPO_CACHE names their folder.",
)
def profile(
    model: Model,
    level: Level = "fast",
    bits: Bits = 2,
    chi: Chi = 32,
    out: OutFolder = None,
    no_plots: NoPlots = False,
    calib: Calib = None,
    calib_windows: Windows = 96,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Tell how much each layer matters: by block, and by type of matrix."""
    from mpo_exporter.cli.profile_command import run_profile

    run_profile(model, level, bits, chi, out, not no_plots, calib, calib_windows, device, threads)


def main() -> None:
    """The entry point of mpo-export profile."""
    console.run(app, "mpo-export profile")
