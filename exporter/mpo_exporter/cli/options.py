"""The options of mpo-export, each declared once; nothing here loads torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PLAN_NAMES = ("auto", "paper", "k-proj", "corrected", "int4", "dense")


def plan_name(text: str) -> str:
    """A named plan, or file:PLAN.json; anything else is wrong usage."""
    if text not in PLAN_NAMES and not (text.startswith("file:") and len(text) > len("file:")):
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(PLAN_NAMES)}, file:PLAN.json")
    return text


Model = Annotated[
    str,
    typer.Argument(
        help="demo (embedded), granite, granite-2b, a Hugging Face folder, or a hub id owner/name.", show_default=False
    ),
]
Chi = Annotated[int, typer.Option(help="The largest bond dimension of the cores.")]
CoreCount = Annotated[int, typer.Option("--cores", help="Cores of each operator.")]
PlanName = Annotated[
    str,
    typer.Option(
        callback=plan_name,
        metavar=f"[{'|'.join(PLAN_NAMES)}|file:PLAN.json]",
        help="auto: bits and cores where they matter, for a size or a KL; paper: fp16 cores replace most matrices, int4 the "
        "rest; k-proj: key projections alone; corrected: int4 and int8 cores that correct it; int4: no cores; "
        "dense: as it is; file: your own. All but auto and corrected use calibration text only with --calib.",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="The file to write.", show_default="MODEL.mpo")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite an existing file.")]
TargetSize = Annotated[
    str | None,
    typer.Option(help="The most bytes of the whole file, such as 2.1GB.", show_default="4.25 bits per weight for auto"),
]
TargetBits = Annotated[
    float | None, typer.Option(help="The same in bits of the whole file per weight of the dense model.")
]
TargetRatio = Annotated[float | None, typer.Option(help="The same as a share of the dense model's bytes.")]
MostKl = Annotated[
    float | None, typer.Option("--max-kl", help="As few bytes as this KL to the dense model allows, in nats a token.")
]
ForSpeed = Annotated[bool, typer.Option("--for-speed", help="auto: nothing that is slower than int4 on this machine.")]
Layers = Annotated[
    str | None, typer.Option(help="Regular expression: the plan acts on layers of such names.", show_default=False)
]
TopK = Annotated[int | None, typer.Option(help="The plan acts on the N least sensitive layers.", show_default=False)]
Ratio = Annotated[
    float | None, typer.Option("--compression-ratio", help="The same as a share of the layers.", show_default=False)
]
Sensitivity = Annotated[
    str, typer.Option(help="How layers are judged: fast (expected from gradients) or full (each measured alone).")
]
Rank = Annotated[int, typer.Option(help="k-proj: rank of the factors; half as much again in boundary blocks.")]
QuantBits = Annotated[int, typer.Option(help="k-proj: bits of the factors, 4, 8 or 16.")]
Norm = Annotated[bool, typer.Option(help="k-proj: scale the factors to the matrix's Frobenius norm.")]
LeastSide = Annotated[int, typer.Option("--min-dim", help="k-proj: leave matrices with a smaller side alone.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and what to expect of it; write no file.")]
SavePlan = Annotated[Path | None, typer.Option(help="Write the plan as a file for --plan file:…", show_default=False)]
Calib = Annotated[
    Path | None,
    typer.Option("--calib", help="Calibration text, .jsonl or .txt.", show_default="a built-in one for auto"),
]
Windows = Annotated[
    int, typer.Option(help="Windows of 256 tokens to calibrate on, the more the better; 0 uses no text.")
]
EvalText = Annotated[
    Path | None, typer.Option("--eval-text", help="Held-out text to measure on.", show_default="a small built-in one")
]
MeasureTokens = Annotated[
    int | None,
    typer.Option(help="Tokens to measure on; 0 measures nothing.", show_default="as many as take about a minute"),
]
Certify = Annotated[
    list[int] | None,
    typer.Option("--certify-chi", help="Measure the file's prefix at this χ too; may be repeated.", show_default=False),
]
Device = Annotated[str, typer.Option(envvar="MPO_DEVICE", help="cpu, or a torch device such as cuda.")]
Threads = Annotated[int | None, typer.Option("--threads", "-t", envvar="MPO_THREADS", help="CPU threads.")]
Heal = Annotated[bool, typer.Option("--heal", help="Retrain the file briefly afterwards; the bounds below imply it.")]
HealText = Annotated[
    Path | None,
    typer.Option(help="Text to heal on: .jsonl (chat rows or text), .txt, .u16, .npy.", show_default="embedded"),
]
ReportFolder = Annotated[
    Path | None,
    typer.Option(
        "--report",
        help="Folder for report.html and report.json, which show and explain every decision.",
        show_default=False,
    ),
]
