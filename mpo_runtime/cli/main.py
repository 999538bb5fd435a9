"""mpo-run: generate, chat, inspect, measure. Commands import what they need when they run, so that --help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpo_runtime.cli import console
from mpo_runtime.cli.options import (
    Chi,
    Context,
    Device,
    FrequencyPenalty,
    LogitBias,
    MaxTokens,
    MinP,
    PresencePenalty,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
    Window,
)

app = typer.Typer(
    help="Runs .mpo models: generate text, chat, inspect and measure.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Add --debug to any command for a traceback. Exit codes: 0 done, 1 failed, 2 wrong usage.",
)
File = Annotated[Path, typer.Argument(help="A .mpo file, or a Hugging Face folder.", show_default=False)]


def show_version(wanted: bool) -> None:
    """Prints the version and ends the program."""
    if wanted:
        from mpo_runtime import __version__

        typer.echo(f"mpo-runtime {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Runs .mpo models: generate text, chat, inspect and measure."""


@app.command()
def generate(
    file: File,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The text to continue; standard input if left out.")
    ] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    presence_penalty: PresencePenalty = 0.0,
    logit_bias: LogitBias = None,
    seed: Seed = None,
    stop: Stop = None,
    chi: Chi = None,
    context: Context = None,
    threads: Threads = None,
    device: Device = "cpu",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print tokens/s to standard error.")] = False,
) -> None:
    """Continue a text, streaming it to standard output."""
    from mpo_runtime.cli.commands import generate_text, sampling

    options = sampling(temperature, top_k, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty,
                       logit_bias, seed)  # fmt: skip
    load = {"chi": chi, "context": context, "threads": threads, "device": device}
    generate_text(file, prompt, load, options, max_tokens, stop or [], verbose)


@app.command()
def chat(
    file: File,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this one message and exit.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    presence_penalty: PresencePenalty = 0.0,
    logit_bias: LogitBias = None,
    seed: Seed = None,
    stop: Stop = None,
    chi: Chi = None,
    context: Context = None,
    threads: Threads = None,
    device: Device = "cpu",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print tokens/s after each answer.")] = False,
) -> None:
    """Talk to a model: interactive, or one answer with --prompt or piped input."""
    from mpo_runtime.cli.chat import run_chat
    from mpo_runtime.cli.commands import sampling

    options = sampling(temperature, top_k, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty,
                       logit_bias, seed)  # fmt: skip
    load = {"chi": chi, "context": context, "threads": threads, "device": device}
    run_chat(file, prompt, system, load, options, max_tokens, stop or [], verbose)


@app.command()
def info(
    file: File,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer with its terms.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a file holds: architecture, sizes, layers, prefixes, provenance, measured quality, active kernels."""
    from mpo_runtime.cli.inspect import show_info

    show_info(file, layers, as_json)


@app.command()
def verify(file: File) -> None:
    """Check a .mpo file's structure, checksums and values."""
    from mpo_runtime.cli.inspect import verify_file

    verify_file(file)


@app.command()
def ppl(
    file: File,
    text: Annotated[Path, typer.Argument(help="A .txt, .jsonl, .u16 or .npy file.", show_default=False)],
    window: Window = None,
    chi: Chi = None,
    threads: Threads = None,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure perplexity on a text, with its standard error and bits per byte."""
    from mpo_runtime.cli.commands import measure_perplexity

    measure_perplexity(file, text, window, {"chi": chi, "threads": threads, "device": device}, as_json)


@app.command()
def compare(
    file: File,
    to: Annotated[
        Path, typer.Option("--to", help="The reference: a .mpo file or a Hugging Face folder.", show_default=False)
    ],
    text: Annotated[Path | None, typer.Option("--text", help="A text; a small built-in one if left out.")] = None,
    window: Window = None,
    chi: Chi = None,
    threads: Threads = None,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare a model with a reference: perplexity, KL divergence, agreement of the most likely token."""
    from mpo_runtime.cli.commands import compare_models

    compare_models(file, to, text, window, {"chi": chi, "threads": threads, "device": device}, as_json)


def main() -> None:
    """The entry point of mpo-run."""
    console.run(app, "mpo-run")
