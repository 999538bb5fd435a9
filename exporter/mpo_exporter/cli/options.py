"""The options of mpo-export, each declared once; importing this module does not load torch or numpy.

Options of one subject form a group: a command takes the group as one parameter (see mpo_runtime.cli.options.grouped), and
the group makes the record that the command passes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mpo_exporter.heal.settings import Settings
    from mpo_exporter.plan.options import Choice, KeyOptions, Target
    from mpo_exporter.request import CalibrationRequest, HealingRequest, Machine, MeasureRequest

# A test compares these with the registry of plans, which is slow to import.
PLAN_NAMES = ("auto", "paper", "k-proj", "corrected", "int4", "dense")


def plan_name(text: str) -> str:
    """A named plan, or file:PLAN.json; anything else is wrong usage."""
    if text not in PLAN_NAMES and not (text.startswith("file:") and len(text) > len("file:")):
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(PLAN_NAMES)}, file:PLAN.json")
    return text


Model = Annotated[
    str,
    typer.Argument(
        help="demo (embedded), smollm2, granite, granite-2b, granite-4-micro, a Hugging Face folder, a GGUF file, "
        "or a hub id owner/name[@revision].",
        show_default=False,
    ),
]
File = Annotated[Path, typer.Argument(help="A .mpo file that mpo-export wrote.", show_default=False)]
Teacher = Annotated[
    str,
    typer.Option(
        help="The dense model that the file was made from: demo, granite, a Hugging Face folder, a GGUF file or a hub id.",
        show_default=False,
    ),
]
Chi = Annotated[
    int | None,
    typer.Option(
        help="The largest bond dimension of the cores. auto: gives every attention and MLP matrix cores of this bond "
        "dimension beside its integers, within the same size; without it cores of at most 32, where they pay.",
        show_default="32",
    ),
]
ProfileChi = Annotated[int, typer.Option("--chi", help="The largest bond dimension of the cores.")]
CompareCores = Annotated[
    bool,
    typer.Option(
        "--compare-cores/--no-compare-cores",
        help="auto with --chi: also fit and measure the same bytes without cores, which takes a second export.",
    ),
]
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
Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite existing files.")]
Folder = Annotated[Path, typer.Option("--out", "-o", help="The folder to write.", show_default=False)]
HfForm = Annotated[
    str,
    typer.Option(
        "--as",
        help="compressed-tensors: the integers exactly, for files without cores; dense: matrices, for any file.",
    ),
]
FloatType = Annotated[
    str, typer.Option("--dtype", help="The type of what is not stored as integers: bf16, f16 or f32.")
]
LeastBits = Annotated[
    int,
    typer.Option("--least-bits", help="Store narrower integers in so many bits, exactly; vLLM on a CPU takes 4 only."),
]
Tasks = Annotated[
    list[Path] | None,
    typer.Option(
        "--task",
        help="A JSONL file of questions, on which accuracy is measured before and after; may be repeated.",
        show_default=False,
    ),
]
Prefixes = Annotated[
    list[int] | None,
    typer.Option("--certify-chi", help="Measure the file's prefix at this χ too; may be repeated.", show_default=False),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and what to expect of it; write no file.")]
EffortName = Annotated[
    str,
    typer.Option(
        "--effort",
        metavar="[quick|normal|best]",
        help="quick: no calibration text, layers are judged and rounded by their weights alone; normal: calibrated, with "
        "estimates on samples; best: estimates on whole matrices and all windows, and a rounding that minds which errors of "
        "outputs go together. --dry-run tells what each takes.",
    ),
]
KeepWork = Annotated[
    bool,
    typer.Option(
        "--keep-work",
        help="Keep the work folder (.NAME.export beside the output), from which a stopped export goes on, after the end too.",
    ),
]
SavePlan = Annotated[Path | None, typer.Option(help="Write the plan as a file for --plan file:…", show_default=False)]
ReportFolder = Annotated[
    Path | None,
    typer.Option(
        "--report",
        help="Folder for report.html and report.json, which show and explain every decision.",
        show_default=False,
    ),
]
Heal = Annotated[bool, typer.Option("--heal", help="Retrain the file briefly afterwards; the options below imply it.")]
HealText = Annotated[
    Path | None,
    typer.Option(help="Text to heal on: .jsonl (chat rows or text), .txt, .u16, .npy.", show_default="embedded"),
]
WithoutCores = Annotated[
    bool | None,
    typer.Option(
        "--without-cores/--no-without-cores",
        help="Fit the same bytes without cores too, which takes another export.",
        show_default="where the model is small",
    ),
]


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """How large the file may become, or how far from the dense model."""

    target_size: Annotated[
        str | None,
        typer.Option(
            help="The most bytes of the whole file, such as 2.1GB.",
            show_default="auto: 4.25 bits per weight, or an expected KL of 0.03",
        ),
    ] = None
    target_bpw: Annotated[
        float | None, typer.Option(help="The same in bits of the whole file per weight of the dense model.")
    ] = None
    target_ratio: Annotated[float | None, typer.Option(help="The same as a share of the dense model's bytes.")] = None
    max_kl: Annotated[
        float | None,
        typer.Option(help="As few bytes as this KL to the dense model allows, in nats per token."),
    ] = None

    def record(self) -> Target:
        """The target; raises ConfigError for more than one, or one that is out of range."""
        from mpo_exporter.plan.options import Target
        from mpo_exporter.request import size_bytes

        return Target(
            size=None if self.target_size is None else size_bytes(self.target_size),
            bits_per_weight=self.target_bpw,
            ratio=self.target_ratio,
            max_kl=self.max_kl,
        )


@dataclass(frozen=True, slots=True)
class ChoiceOptions:
    """Which layers the plan acts on."""

    layers: Annotated[
        str | None, typer.Option(help="Regular expression: the plan acts on layers of such names.", show_default=False)
    ] = None
    top_k: Annotated[
        int | None, typer.Option(help="The plan acts on the N least sensitive layers.", show_default=False)
    ] = None
    compression_ratio: Annotated[
        float | None, typer.Option(help="The same as a share of the layers.", show_default=False)
    ] = None
    sensitivity: Annotated[
        str, typer.Option(help="How layers are judged: fast (expected from gradients) or full (each measured alone).")
    ] = "fast"

    def record(self) -> Choice:
        """The choice; raises PlanError for a value out of range."""
        from mpo_exporter.plan.options import Choice

        return Choice(pattern=self.layers, top_k=self.top_k, share=self.compression_ratio, sensitivity=self.sensitivity)


@dataclass(frozen=True, slots=True)
class AllocationOptions:
    """What the plan auto may choose from."""

    for_speed: Annotated[bool, typer.Option(help="auto: nothing that is slower than int4 on this machine.")] = False
    transforms: Annotated[
        str | None,
        typer.Option(
            help="auto: what layers may take in the place of their input where integers then lose less: hadamard (Hadamard "
            "transforms), fitted (also rotations that are fitted to the layers and stored) or none. A file without any opens "
            "in older programs, and to-hf can keep its integers.",
            show_default="hadamard",
        ),
    ] = None

    def record(self) -> dict[str, Any]:
        """The fields of the plan's options by name."""
        return {"for_speed": self.for_speed, "transforms": self.transforms}


@dataclass(frozen=True, slots=True)
class KeyProjections:
    """How the plan k-proj replaces key projections."""

    rank: Annotated[int, typer.Option(help="k-proj: rank of the factors; half as much again in boundary blocks.")] = 128
    quant_bits: Annotated[int, typer.Option(help="k-proj: bits of the factors, 4, 8 or 16.")] = 8
    norm_correction: Annotated[bool, typer.Option(help="k-proj: scale the factors to the matrix's Frobenius norm.")] = (
        True
    )
    min_dim: Annotated[int, typer.Option(help="k-proj: leave matrices with a smaller side alone.")] = 64

    def record(self) -> KeyOptions:
        """The options of the plan; raises PlanError for a value out of range."""
        from mpo_exporter.plan.options import KeyOptions

        return KeyOptions(rank=self.rank, bits=self.quant_bits, norm=self.norm_correction, min_dim=self.min_dim)


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """What layers are fitted to."""

    calib: Annotated[
        Path | None, typer.Option(help="Calibration text, .jsonl or .txt.", show_default="a built-in one for auto")
    ] = None
    calib_windows: Annotated[
        int | None,
        typer.Option(
            help="Windows of 256 tokens to calibrate on, the more the better; 0 uses no text.",
            show_default="80, in models above 400 million weights fewer, down to 32; 96 with --effort best",
        ),
    ] = None

    def record(self) -> CalibrationRequest:
        """The request; raises ConfigError for less than 0 windows."""
        from mpo_exporter.request import CalibrationRequest

        return CalibrationRequest(self.calib, self.calib_windows)


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """What quality is measured on."""

    eval_text: Annotated[
        Path | None, typer.Option(help="Held-out text to measure on.", show_default="a small built-in one")
    ] = None
    measure_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens to measure on; 0 measures nothing.", show_default="as many as take about a minute"),
    ] = None

    def record(self) -> MeasureRequest:
        """The request; raises ConfigError for less than 0 tokens."""
        from mpo_exporter.request import MeasureRequest

        return MeasureRequest(self.eval_text, self.measure_tokens)


@dataclass(frozen=True, slots=True)
class MachineOptions:
    """What to compute on."""

    device: Annotated[
        str,
        typer.Option(
            envvar="MPO_DEVICE", help="cpu, a torch device such as cuda, or auto: the GPU where torch sees one."
        ),
    ] = "cpu"
    threads: Annotated[int | None, typer.Option("--threads", "-t", envvar="MPO_THREADS", help="CPU threads.")] = None

    def record(self) -> Machine:
        """The machine."""
        from mpo_exporter.request import Machine
        from mpo_runtime.loading import find_device

        return Machine(find_device(self.device), self.threads)


@dataclass(frozen=True, slots=True)
class HealBounds:
    """How long healing trains; at most one of the three."""

    heal_tokens: Annotated[
        str | None, typer.Option(help="Tokens to train on, such as 500k or 2M.", show_default="1M")
    ] = None
    heal_epochs: Annotated[float | None, typer.Option(help="Times to see the healing text.", show_default=False)] = None
    heal_minutes: Annotated[float | None, typer.Option(help="Minutes to train.", show_default=False)] = None

    def request(self, wanted: bool, text: Path | None) -> HealingRequest | None:
        """Healing after an export, which a bound or a healing text implies; None if nothing asks for it."""
        from mpo_exporter.request import HealingRequest

        given = (self.heal_tokens, self.heal_epochs, self.heal_minutes, text)
        return HealingRequest(*given) if wanted or any(value is not None for value in given) else None


@dataclass(frozen=True, slots=True)
class HealSettings:
    """How healing trains."""

    rate: Annotated[float, typer.Option(help="Multiplies all learning rates.")] = 1.0
    batch: Annotated[int, typer.Option(help="Windows in an optimizer step, over all devices together.")] = 4
    micro_batch: Annotated[int, typer.Option(help="Windows that a device runs at once.")] = 4
    window: Annotated[int | None, typer.Option(help="Tokens in a window.", show_default="256")] = None
    block_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the tokens spent on training single blocks first.",
            show_default="0.05; 0 in trainings of less than 100 steps",
        ),
    ] = None
    cross_entropy: Annotated[float, typer.Option(help="Weight of the text's cross entropy relative to the KL.")] = 0.0
    top_k: Annotated[int, typer.Option(help="Number of teacher logits to keep for each token.")] = 256
    match_blocks: Annotated[
        int, typer.Option(help="Number of blocks whose outputs are matched to the teacher's; 0: none.")
    ] = 4
    match_weight: Annotated[
        float | None,
        typer.Option(
            help="Weight of the block-matching loss relative to the KL.",
            show_default="the model's weights divided by the text's tokens, at most 20, where a trial shows that it helps; 0 in "
            "trainings of less than 100 steps",
        ),
    ] = None
    train_codes: Annotated[
        bool | None,
        typer.Option(
            "--train-codes/--freeze-codes",
            help="Train the integers too, or only scales, cores and norms.",
            show_default="train in models of at most 500 M weights",
        ),
    ] = None
    assistant_only: Annotated[
        bool, typer.Option("--assistant-only", help="Only the assistant's messages count in the loss.")
    ] = False
    chi_dropout: Annotated[float, typer.Option(help="Probability that a step uses a random prefix of the bonds.")] = 0.0
    cores_first: Annotated[
        float, typer.Option(help="Share of the training in which integers and scales stay as they are.")
    ] = 0.0
    seed: Annotated[int, typer.Option(help="Seed of the order of the text and of χ-dropout.")] = 0

    def record(self, bounds: HealBounds) -> Settings:
        """The settings; raises ConfigError for a value out of range."""
        from mpo_exporter.heal.settings import Settings, parse_tokens

        return Settings(
            tokens=None if bounds.heal_tokens is None else parse_tokens(bounds.heal_tokens),
            epochs=bounds.heal_epochs,
            minutes=bounds.heal_minutes,
            window=self.window,
            batch=self.batch,
            micro_batch=self.micro_batch,
            block_share=self.block_share,
            train_codes=self.train_codes,
            top_k=self.top_k,
            match_blocks=self.match_blocks,
            match_weight=self.match_weight,
            cross_entropy=self.cross_entropy,
            assistant_only=self.assistant_only,
            chi_dropout=self.chi_dropout,
            cores_first=self.cores_first,
            seed=self.seed,
        ).faster(self.rate)
