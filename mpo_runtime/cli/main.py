"""mpo-run: generate, chat, inspect, measure. Commands import what they need when they run, so that --help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpo_runtime.cli import console
from mpo_runtime.cli.options import (
    Context,
    Device,
    File,
    Json,
    Loading,
    MaxTokens,
    Running,
    Sampling,
    Templating,
    Threads,
    Timing,
    Verbose,
    Window,
    grouped,
)

app = typer.Typer(
    help="Runs .mpo models: generate text, chat, inspect and measure.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Add --debug to any command for a traceback. Exit codes: 0 done, 1 failed, 2 wrong usage.",
)


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
@grouped
def generate(
    file: File,
    *,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The text to continue; standard input if left out.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A file of prompts: one a line, or .jsonl rows with a key `prompt`.", show_default=False),
    ] = None,
    parse_special: Annotated[
        bool,
        typer.Option(
            "--parse-special", help="Read special tokens that the prompt spells as tokens, not as plain text."
        ),
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Answer each prompt as a message, through the chat template.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(envvar="MPO_SYSTEM", help="With --chat, the system message.", show_default=False)
    ] = None,
    max_tokens: MaxTokens = 256,
    sampling: Sampling,
    templating: Templating,
    loading: Loading,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a prompt: text, tokens, logprobs, finish, timings.")
    ] = False,
    logprobs: Annotated[int, typer.Option(help="With --json, also the N most likely tokens at each step.")] = 0,
    verbose: Verbose = False,
) -> None:
    """Continue a text.

    Prompt and continuation go to standard output as they come; with --json one object a prompt when it is complete. With
    --chat, or any option of the chat template, only the answer is printed.
    """
    from mpo_runtime.cli.generate import Request, run_generate

    request = Request(
        sampling=sampling.options(),
        max_tokens=max_tokens,
        stop=tuple(sampling.stop or ()),
        logprobs=logprobs,
        as_json=as_json,
        verbose=verbose,
        parse_special=parse_special,
        template=templating.options() if chat or templating.given() else None,
        system=system,
    )
    run_generate(file, loading.arguments(), prompt, prompts, request, loading.prompt_cache)


@app.command()
@grouped
def chat(
    file: File,
    *,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this one message and exit.")] = None,
    system: Annotated[str | None, typer.Option(envvar="MPO_SYSTEM", help="The system message.")] = None,
    max_tokens: MaxTokens = None,
    sampling: Sampling,
    templating: Templating,
    loading: Loading,
    verbose: Verbose = False,
) -> None:
    """Talk to a model.

    In a terminal a conversation with history and commands (/help); with --prompt or piped input one answer.
    """
    from mpo_runtime.cli.chat import run_chat
    from mpo_runtime.cli.conversation import Settings

    settings = Settings(sampling.options(), max_tokens, tuple(sampling.stop or ()), verbose, templating.options())
    run_chat(file, loading.arguments(), prompt, system, settings, loading.prompt_cache)


@app.command()
def info(
    file: Annotated[
        Path | None,
        typer.Argument(help="A .mpo file, a Hugging Face folder, or a name in the store.", show_default="the machine"),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer with its terms.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a file holds, or without one the machine.

    Architecture, sizes, layers, prefixes, provenance, measured quality, active kernels; without a file the CPU, its
    instruction set, threads, memory and kernels.
    """
    from mpo_runtime.cli.inspect import show_info, show_machine

    if file is None:
        show_machine(as_json)
    else:
        show_info(file, layers, as_json)


@app.command()
def verify(
    file: File,
    quality: Annotated[bool, typer.Option("--quality", help="Measure again what the certificate says.")] = False,
    to: Annotated[
        Path | None,
        typer.Option("--to", help="The dense model, to check the KL divergence as well.", show_default=False),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="The certificate's text.", show_default="the built-in one")
    ] = None,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Check whether a .mpo file is whole.

    Structure, checksums and values; with --quality also its certificate.
    """
    from mpo_runtime.cli.inspect import verify_file
    from mpo_runtime.weights.store import resolve

    place = resolve(file)
    verify_file(place)
    if quality:
        from mpo_runtime.cli.certify import verify_quality

        verify_quality(place, to, text, {"threads": threads, "device": device})


@app.command()
@grouped
def ppl(
    file: File,
    text: Annotated[Path, typer.Argument(help="A .txt, .jsonl, .u16 or .npy file.", show_default=False)],
    *,
    window: Window = None,
    running: Running,
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text.

    With its standard error and bits per byte.
    """
    from mpo_runtime.cli.commands import measure_perplexity

    measure_perplexity(file, text, window, running.arguments(), as_json)


@app.command()
@grouped
def compare(
    file: File,
    *,
    to: Annotated[
        Path,
        typer.Option("--to", help="The reference: a .mpo or GGUF file or a Hugging Face folder.", show_default=False),
    ],
    text: Annotated[Path | None, typer.Option("--text", help="A text; a small built-in one if left out.")] = None,
    window: Window = None,
    running: Running,
    as_json: Json = False,
) -> None:
    """Compare a model with a reference.

    Perplexity, KL divergence, agreement of the most likely token.
    """
    from mpo_runtime.cli.commands import compare_models

    compare_models(file, to, text, window, running.arguments(), as_json)


@app.command()
@grouped
def bench(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help=".mpo or GGUF files, Hugging Face folders, names in the store.", show_default=False
        ),
    ],
    *,
    baseline: Annotated[
        bool,
        typer.Option("--baseline", help="Time the dense model beside them: the first file's terms as bf16 matrices."),
    ] = False,
    dense: Annotated[
        Path | None, typer.Option(help="The dense model to use as the baseline.", show_default=False)
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Tokens of the timed prompts; 0 for none.")] = "512",
    tokens: Annotated[str, typer.Option("--tokens", "-n", help="Tokens that are decoded; 0 for none.")] = "128",
    depth: Annotated[str, typer.Option("--depth", "-d", help="Tokens of context before each test.")] = "0",
    batch: Annotated[str, typer.Option("--batch", "-b", help="Sequences that are run at once.")] = "1",
    threads: Annotated[
        str | None, typer.Option("--threads", "-t", envvar="MPO_THREADS", help="CPU threads.", show_default="all")
    ] = None,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", help="Timed rounds, after one that warms up.")] = 5,
    timing: Timing,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_markdown: Annotated[bool, typer.Option("--md", help="Print Markdown.")] = False,
) -> None:
    """Time models side by side.

    Prompts and decoding at every combination of the values given, which may be lists such as -d 0,4096. Each model runs in a
    process of its own, in turns with the others, beside the read bandwidth of this machine. With a baseline it ends with the
    ratios of parameters, bytes, memory and speed. Ctrl-C prints what there is.
    """
    from mpo_runtime.bench.settings import BenchSettings, parse_counts
    from mpo_runtime.cli.bench import one_form, run_bench

    form = one_form(as_json, as_csv, as_markdown)
    settings = BenchSettings(
        prompt=parse_counts(prompt, "-p"),
        tokens=parse_counts(tokens, "-n"),
        depth=parse_counts(depth, "-d"),
        batch=parse_counts(batch, "-b"),
        threads=() if threads is None else parse_counts(threads, "-t"),
        repetitions=repetitions,
    )
    run_bench(files, dense, baseline, settings, timing.arguments(), form)


@app.command("eval")
@grouped
def eval_command(
    file: File,
    *,
    tasks: Annotated[
        str,
        typer.Option(
            help="Names that lm-eval knows, .yaml files of its form, or .jsonl files, separated by commas.",
            show_default=False,
        ),
    ],
    limit: Annotated[
        float | None, typer.Option(help="Questions of each task; below 1 a share of them.", show_default="all")
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", help="Examples before each question.", show_default="the task's")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat, the system message.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results as lm-eval's JSON.", show_default=False)] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Keep answers in this file; a run that was stopped goes on.", show_default=False),
    ] = None,
    samples: Annotated[
        bool, typer.Option("--log-samples", help="Put every question and answer into the results.")
    ] = False,
    context: Context = None,
    running: Running,
    as_json: Json = False,
) -> None:
    """Measure accuracy on tasks.

    Through lm-eval (pip install 'mpo-runtime[eval]'). Tasks by name are downloaded; JSONL files are asked offline: rows of
    query, choices, gold, or context, continuation, or question, answer.
    """
    from mpo_runtime.cli.evaluate import EvalRequest, run_eval

    request = EvalRequest(tasks, limit, fewshot, chat, system, out, resume, samples)
    run_eval(file, request, {**running.arguments(), "context": context}, as_json)


@app.command()
def pull(
    source: Annotated[
        str,
        typer.Argument(
            help="smollm2, granite, a hub id owner/name[@revision], a .mpo or GGUF file, or a Hugging Face folder.",
            metavar="ID",
        ),
    ],
    name: Annotated[str | None, typer.Option(help="What to call it.", show_default="its own name")] = None,
    file: Annotated[
        str | None, typer.Option("--file", help="Which .mpo file, where the hub has several.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace a model of that name.")] = False,
) -> None:
    """Take a model into the local store.

    From the hub, or from this machine by hard links where possible. Its name then serves as FILE in every command.
    """
    from mpo_runtime.cli.store import pull_model

    pull_model(source, name, file, force)


@app.command("list")
def list_command(as_json: Json = False) -> None:
    """List the models in the local store.

    The store is the folder MPO_HOME, by default mpo-runtime in the user's data folder.
    """
    from mpo_runtime.cli.store import list_models

    list_models(as_json)


@app.command()
def rm(names: Annotated[list[str], typer.Argument(help="Names in the store.", show_default=False)]) -> None:
    """Delete models from the local store."""
    from mpo_runtime.cli.store import remove_models

    remove_models(names)


def add_commands() -> None:
    """Adds the commands that other packages register in the entry-point group `mpo_run.commands`.

    One whose libraries are not installed is left out.
    """
    from importlib.metadata import entry_points

    known = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    for entry in entry_points(group="mpo_run.commands"):
        if entry.name not in known:
            try:
                app.command(entry.name)(entry.load())
            except ImportError:
                continue


def main() -> None:
    """The entry point of mpo-run."""
    add_commands()
    console.run(app, "mpo-run")
