"""The options that several commands share, each declared once; environment variables for the common ones."""

from __future__ import annotations

from typing import Annotated

import typer

Chi = Annotated[int | None, typer.Option(help="Use only the first CHI values of every bond.", show_default="all")]
Context = Annotated[
    int | None,
    typer.Option(
        "--ctx-size", "-c", envvar="MPO_CTX_SIZE", help="Tokens of context.", show_default="the model's, at most 4096"
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", envvar="MPO_THREADS", help="CPU threads.", show_default="all")
]
Device = Annotated[str, typer.Option(envvar="MPO_DEVICE", help="cpu, or a torch device such as cuda.")]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", "-n", help="At most so many new tokens.", show_default="what the context holds"),
]
Temperature = Annotated[float, typer.Option(help="0 always takes the most likely token.")]
TopK = Annotated[int, typer.Option(help="Draw from the K most likely tokens; 0 is off.")]
TopP = Annotated[float, typer.Option(help="Draw from the most likely tokens that make up this probability; 1 is off.")]
MinP = Annotated[float, typer.Option(help="Drop tokens below this share of the most likely one; 0 is off.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 discourages tokens already in the text; 1 is off.")]
FrequencyPenalty = Annotated[
    float, typer.Option(help="Lowers a token's logit for each time it was generated; 0 is off.")
]
PresencePenalty = Annotated[float, typer.Option(help="Lowers a token's logit once it was generated; 0 is off.")]
LogitBias = Annotated[
    list[str] | None, typer.Option(help="ID=BIAS added to a token's logit; may be repeated.", show_default=False)
]
Seed = Annotated[
    int | None, typer.Option(envvar="MPO_SEED", help="Makes sampling reproducible.", show_default="random")
]
Stop = Annotated[list[str] | None, typer.Option(help="Text at which to stop; may be repeated.", show_default=False)]
Window = Annotated[
    int | None,
    typer.Option(help="Tokens of a window; each is run on its own.", show_default="512, or the model's context"),
]
