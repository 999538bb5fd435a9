"""mpo-export report: the options of a report on an existing file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpo_runtime.cli import console

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="docs/report.md explains every figure. mpo-export MODEL --report DIR makes the report with the export, "
    "which also shows how the compression went.",
)
def report(
    file: Annotated[Path, typer.Argument(help="The .mpo file to report on.", show_default=False)],
    teacher: Annotated[
        str,
        typer.Option(
            help="The dense model that the file was made from: demo, granite, a Hugging Face folder or a hub id.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The folder for report.html and report.json.", show_default=False),
    ],
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Write into a folder that holds something else.")
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option("--eval-text", help="Held-out text to measure on.", show_default="a small built-in one"),
    ] = None,
    measure_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens to measure on; 0 measures nothing.", show_default="as many as take about a minute"),
    ] = None,
    calib: Annotated[
        Path | None,
        typer.Option(
            "--calib", help="Text for the errors of the layers, .jsonl or .txt.", show_default="a built-in one"
        ),
    ] = None,
    calib_windows: Annotated[
        int | None,
        typer.Option(
            help="Windows of 256 tokens of it; 0 measures layers by their weights alone.",
            show_default="32, fewer of a large model",
        ),
    ] = None,
    without_cores: Annotated[
        bool | None,
        typer.Option(
            "--without-cores/--no-without-cores",
            help="Fit the same bytes without cores too, which takes another export.",
            show_default="where the model is small",
        ),
    ] = None,
    device: Annotated[str, typer.Option(envvar="MPO_DEVICE", help="cpu, or a torch device such as cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option("--threads", "-t", envvar="MPO_THREADS", help="CPU threads.")] = None,
) -> None:
    """Measure a .mpo file beside its dense model and write the report: a page, JSON, and a table here."""
    from mpo_exporter.report.command import ReportCommand, run_report

    run_report(
        ReportCommand(
            file=file,
            teacher=teacher,
            out=out,
            force=force,
            text=text,
            measure_tokens=measure_tokens,
            calib=calib,
            calib_windows=calib_windows,
            without_cores=without_cores,
            device=device,
            threads=threads,
        )
    )


def main() -> None:
    """The entry point of `mpo-export report`."""
    console.run(app, "mpo-export report")
