"""The facts of a report: frozen dataclasses that are written as JSON and read back strictly (docs/report.md).

Sizes are in bytes, times in seconds, losses and KL divergences in nats per token, shares between 0 and 1. A part that was not
measured is None or empty, and `missing` gives the reason under the part's name.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from mpo_formats.codec import from_json
from mpo_formats.errors import FormatError

if TYPE_CHECKING:
    from mpo_runtime.measure import Comparison
    from mpo_runtime.text.token_text import TokenText

FORMAT: Literal["mpo-report"] = "mpo-report"
VERSION = 1
Norm = Literal["activations", "fit", "weights"]
PointKind = Literal["dense", "this file", "prefix", "without cores", "earlier"]


@dataclass(frozen=True, slots=True)
class Subject:
    """The file that the report is about, its origin, and the sizes of its architecture."""

    name: str
    file: str
    source: str
    source_sha256: str
    revision: str | None
    exporter: str
    options: dict[str, str]
    model_type: str
    blocks: int
    hidden: int
    inner: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool


@dataclass(frozen=True, slots=True)
class Sizes:
    """Parameters and bytes before and after; `dense_bytes` count two bytes a weight, even if the source stores four."""

    dense_parameters: int
    parameters: int
    dense_bytes: int
    source_bytes: int
    file_bytes: int
    dense_bits_per_weight: float
    bits_per_weight: float


@dataclass(frozen=True, slots=True)
class Ratios:
    """Ratios of compressed to dense: below 1 is smaller; for speed, above 1 is faster."""

    parameters: float
    bytes: float
    memory: float | None
    speed: float | None


@dataclass(frozen=True, slots=True)
class Measured:
    """Both models on one held-out text, as mpo_runtime.measure.compare gives it; KL is KL(dense ‖ compressed)."""

    text: str
    text_sha256: str
    tokens: int
    window: int
    dense_perplexity: float
    dense_error: float
    perplexity: float
    error: float
    kl_mean: float
    kl_999: float
    same_top1: float
    cosine: float
    mse: float

    @classmethod
    def of(cls, found: Comparison, text: TokenText) -> Measured:
        """A comparison on `text`, as a report gives it."""
        return cls(
            text=text.name,
            text_sha256=text.sha256,
            tokens=int(text.ids.size),
            window=found.model.window,
            dense_perplexity=found.reference.perplexity,
            dense_error=found.reference.error,
            perplexity=found.model.perplexity,
            error=found.model.error,
            kl_mean=found.kl_mean,
            kl_999=found.kl_999,
            same_top1=found.same_top1,
            cosine=found.cosine,
            mse=found.mse,
        )


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The share of a task's questions that both models answer rightly, and the standard error of the compressed one's."""

    task: str
    questions: int
    dense: float
    compressed: float
    error: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Decoding speed in tokens per second at batch 1, for each round, in which the models take turns; and the medians."""

    dense: tuple[float, ...]
    compressed: tuple[float, ...]
    dense_median: float
    median: float
    tokens: int
    prompt_tokens: int
    slower: bool


@dataclass(frozen=True, slots=True)
class Memory:
    """The largest resident memory of a process that loads a model and decodes `tokens` tokens; `base`: before loading."""

    dense_peak: int
    peak: int
    dense_base: int
    base: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Term:
    """One term of a layer: bits of a stored number, numbers that share a scale (0: none); for cores χ and their shape."""

    kind: str
    text: str
    bits: int
    group: int
    chi: int
    out_dims: tuple[int, ...]
    in_dims: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values of the dense matrix W, or of W L with C = L Lᵀ if `whitened`, relative to the largest.

    Args:
        ranks, values: some of the ranks, counted from 1, and the singular values there.
        rank: the number of singular values.
        rank_90: how many of the largest hold 90 % of the sum of squares.
    """

    whitened: bool
    ranks: tuple[int, ...]
    values: tuple[float, ...]
    rank: int
    rank_90: int


@dataclass(frozen=True, slots=True)
class Layer:
    """What a matrix is stored as, its size, and its relative error ‖W − Ŵ‖ / ‖W‖ in the norm `norm`.

    The norm `activations` is √tr(R C Rᵀ) with the second moment C that the report measured; `fit` is the same with the
    moment that the export fitted the layer to; `weights` is the Frobenius norm. `hadamard` inputs are transformed
    together, or `transform` inputs by a stored transform.
    """

    name: str
    block: int | None
    matrix: str
    rows: int
    columns: int
    terms: tuple[Term, ...]
    bytes: int
    bits_per_weight: float
    error: float | None
    norm: Norm | None
    spectrum: Spectrum | None
    hadamard: int = 0
    transform: int = 0


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The text on which errors and spectra of the layers were measured, with the inputs that the dense model gives."""

    text: str
    text_sha256: str
    windows: int
    tokens: int


@dataclass(frozen=True, slots=True)
class WithoutCores:
    """The same model in a file of the same size without cores, fitted and measured in the same way."""

    file_bytes: int
    perplexity: float
    error: float
    kl_mean: float
    kl_999: float
    same_top1: float
    seconds: float

    @classmethod
    def of(cls, file_bytes: int, found: Comparison, seconds: float) -> WithoutCores:
        """The comparison of a file without cores with the dense model."""
        return cls(
            file_bytes=file_bytes,
            perplexity=found.model.perplexity,
            error=found.model.error,
            kl_mean=found.kl_mean,
            kl_999=found.kl_999,
            same_top1=found.same_top1,
            seconds=seconds,
        )


@dataclass(frozen=True, slots=True)
class Point:
    """A point of the plot of quality against bytes: of a file, or the bytes that are read of a file's prefix."""

    kind: PointKind
    label: str
    bytes: int
    kl_mean: float
    perplexity: float


@dataclass(frozen=True, slots=True)
class Predicted:
    """The loss above the dense model's that the survey expects of the best allocation of integers in `bytes` bytes."""

    bytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class Sample:
    """An unedited continuation; `repeated` is the share of its 4-grams of tokens that occurred in it before."""

    text: str
    tokens: int
    finish: str
    repeated: float
    early: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    """A fixed prompt, as a chat turn or as plain text, and both models' continuations."""

    prompt: str
    chat: bool
    dense: Sample | None
    compressed: Sample


@dataclass(frozen=True, slots=True)
class Texts:
    """Generated text; means and counts are over all prompts. An end before `early_tokens` tokens counts as early."""

    temperature: float
    seed: int
    limit: int
    early_tokens: int
    dense_repeated: float | None
    repeated: float
    dense_early: int | None
    early: int
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the export: when it started and ended, and the number of its steps."""

    name: str
    start: float
    end: float
    steps: int


@dataclass(frozen=True, slots=True)
class Step:
    """One layer's fit: when it ended, how long it took, and its relative error in the norm it was fitted in."""

    layer: str
    end: float
    seconds: float
    error: float


@dataclass(frozen=True, slots=True)
class Compression:
    """The stages of the export and the fits of its layers, in their order; times count from the start."""

    seconds: float
    stages: tuple[Stage, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine on which speed and memory were measured."""

    processor: str
    cores: int
    backend: str
    kernels: str
    threads: int


@dataclass(frozen=True, slots=True)
class Cost:
    """How long a part of the report took."""

    part: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was measured of one file; `core_layers` is the number of layers with cores."""

    format: Literal["mpo-report"]
    version: int
    made: str
    subject: Subject
    sizes: Sizes
    ratios: Ratios
    quality: Measured | None
    speed: Speed | None
    memory: Memory | None
    core_layers: int
    layers: tuple[Layer, ...]
    calibrated: Calibrated | None
    without_cores: WithoutCores | None
    points: tuple[Point, ...]
    predicted: tuple[Predicted, ...]
    texts: Texts | None
    compression: Compression | None
    machine: Machine
    costs: tuple[Cost, ...]
    missing: dict[str, str]
    accuracy: tuple[Accuracy, ...] = ()

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise FormatError(
                f"version: expected {VERSION}, found {self.version}; read it with the release that wrote it"
            )


def to_text(report: Report) -> str:
    """A report as JSON: ASCII, indented, keys in the order of the dataclasses."""
    return json.dumps(asdict(report), indent=1, allow_nan=False) + "\n"


def from_text(text: str | bytes, where: str = "report.json") -> Report:
    """Reads a report from JSON; raises FormatError naming the key that is wrong."""
    return from_json(Report, text, where)
