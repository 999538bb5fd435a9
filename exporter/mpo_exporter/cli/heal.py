"""mpo-export heal: the options of healing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpo_runtime.cli import console

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)

# What bounds a healing; mpo-export takes the same options.
HealTokens = Annotated[
    str | None, typer.Option("--heal-tokens", help="Tokens to train on, such as 500k or 2M.", show_default="1M")
]
HealEpochs = Annotated[
    float | None, typer.Option("--heal-epochs", help="Times to see the healing text.", show_default=False)
]
HealMinutes = Annotated[float | None, typer.Option("--heal-minutes", help="Minutes to train.", show_default=False)]
EvalText = Annotated[
    Path | None, typer.Option(help="Held-out text to measure on.", show_default="a small built-in one")
]
MeasureTokens = Annotated[
    int | None,
    typer.Option(help="Tokens to measure on; 0 measures nothing.", show_default="as many as take about a minute"),
]
TrainingText = Annotated[
    Path | None,
    typer.Option(help="Text to train on: .jsonl (chat rows or text), .txt, .u16, .npy.", show_default="embedded"),
]
MatchBlocks = Annotated[
    int, typer.Option(help="Blocks whose outputs are matched to the teacher's beside its logits; 0: none.")
]
MatchWeight = Annotated[
    float | None,
    typer.Option(
        help="Weight of their errors beside the KL.", show_default="weights of the model a token of text, at most 20"
    ),
]
TrainCodes = Annotated[
    bool | None,
    typer.Option(
        "--train-codes/--freeze-codes",
        help="Train the integers too, or only scales, cores and norms.",
        show_default="train in models of at most 500 M weights",
    ),
]
Device = Annotated[str, typer.Option(envvar="MPO_DEVICE", help="cpu, or a torch device such as cuda.")]
Threads = Annotated[int | None, typer.Option("--threads", "-t", envvar="MPO_THREADS", help="CPU threads.")]


@app.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Several devices: torchrun --nproc-per-node N -m mpo_exporter.heal FILE … with the same options. "
    "What was interrupted goes on where it stopped when the command is given again.",
)
def heal(
    file: Annotated[Path, typer.Argument(help="The .mpo file to heal.", show_default=False)],
    teacher: Annotated[
        str,
        typer.Option(
            help="The dense model that the file was made from: demo, granite, a Hugging Face folder or a hub id.",
            show_default=False,
        ),
    ],
    tokens: HealTokens = None,
    epochs: HealEpochs = None,
    minutes: HealMinutes = None,
    text: TrainingText = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file to write.", show_default="FILE-healed.mpo")
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite an existing file.")] = False,
    rate: Annotated[float, typer.Option(help="Factor of all learning rates.")] = 1.0,
    batch: Annotated[int, typer.Option(help="Windows of an optimizer step, over all devices.")] = 4,
    micro_batch: Annotated[int, typer.Option(help="Windows that a device runs at a time.")] = 4,
    window: Annotated[int | None, typer.Option(help="Tokens of a window.", show_default="256")] = None,
    block_share: Annotated[float, typer.Option(help="Share of the tokens that single blocks are trained on.")] = 0.05,
    cross_entropy: Annotated[float, typer.Option(help="Weight of the text's cross entropy beside the KL.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Logits of the teacher to keep a token.")] = 256,
    match_blocks: MatchBlocks = 4,
    match_weight: MatchWeight = None,
    train_codes: TrainCodes = None,
    assistant_only: Annotated[
        bool, typer.Option("--assistant-only", help="Only what the assistant says counts in the loss.")
    ] = False,
    chi_dropout: Annotated[float, typer.Option(help="Chance of a step on a random prefix of the bonds.")] = 0.0,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder for checkpoints and the teacher's logits and states; is kept.",
            show_default="beside the output",
        ),
    ] = None,
    eval_text: EvalText = None,
    measure_tokens: MeasureTokens = None,
    seed: Annotated[int, typer.Option(help="Of the order of the text.")] = 0,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Retrain a compressed model briefly, so that it gives again what the dense model gives."""
    from mpo_exporter.heal.command import HealCommand, run_heal
    from mpo_exporter.heal.settings import Settings, parse_tokens

    settings = Settings(
        tokens=None if tokens is None else parse_tokens(tokens),
        epochs=epochs,
        minutes=minutes,
        window=window,
        batch=batch,
        micro_batch=micro_batch,
        block_share=block_share,
        train_codes=train_codes,
        top_k=top_k,
        match_blocks=match_blocks,
        match_weight=match_weight,
        cross_entropy=cross_entropy,
        assistant_only=assistant_only,
        chi_dropout=chi_dropout,
        seed=seed,
    ).faster(rate)
    run_heal(
        HealCommand(
            file=file,
            teacher=teacher,
            settings=settings,
            out=out,
            force=force,
            text=text,
            work=work,
            eval_text=eval_text,
            measure_tokens=measure_tokens,
            device=device,
            threads=threads,
        )
    )


def main() -> None:
    """The entry point of mpo-export heal."""
    console.run(app, "mpo-export heal")
