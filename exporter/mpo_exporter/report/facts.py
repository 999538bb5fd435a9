"""What a report knows: a tree of frozen dataclasses that is written as JSON and read back strictly (docs/report.md).

Sizes are in bytes, times in seconds, losses and divergences in nats a token, shares between 0 and 1. A part that was not
measured is None or empty, and `missing` says why, under the part's name.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from mpo_formats.codec import from_json
from mpo_formats.errors import FormatError

FORMAT: Literal["mpo-report"] = "mpo-report"
VERSION = 1
Norm = Literal["activations", "fit", "weights"]
PointKind = Literal["dense", "this file", "prefix", "without cores", "earlier"]


@dataclass(frozen=True, slots=True)
class Subject:
    """The file that is reported on, where it came from, and the sizes of its architecture."""

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
    """Numbers and bytes before and after; dense bytes count two a weight, also where the source stores four."""

    dense_parameters: int
    parameters: int
    dense_bytes: int
    source_bytes: int
    file_bytes: int
    dense_bits_per_weight: float
    bits_per_weight: float


@dataclass(frozen=True, slots=True)
class Ratios:
    """Compressed over dense: below 1 is smaller; of speed, above 1 is faster."""

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


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second of decoding at batch 1, round by round, the two models in turns; medians over rounds."""

    dense: tuple[float, ...]
    compressed: tuple[float, ...]
    dense_median: float
    median: float
    tokens: int
    prompt_tokens: int
    slower: bool


@dataclass(frozen=True, slots=True)
class Memory:
    """The largest resident size of a process that loads a model and decodes some tokens; `base` is before loading."""

    dense_peak: int
    peak: int
    dense_base: int
    base: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Term:
    """One term of a layer: bits of a stored number, the group that shares a scale (0: none), and of cores χ and shape."""

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
    """Singular values of the dense matrix at some ranks (from 1), over the largest; whitened: of W L with C = L Lᵀ."""

    whitened: bool
    ranks: tuple[int, ...]
    values: tuple[float, ...]
    rank: int
    rank_90: int


@dataclass(frozen=True, slots=True)
class Layer:
    """One decision: what a matrix is stored as, what it takes, and its relative error ‖W − Ŵ‖ / ‖W‖ in `norm`.

    `activations`: √tr(R C Rᵀ) with C of the report's own calibration; `fit`: with the moment that the export fitted it to;
    `weights`: the Frobenius norm.
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


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The text on which errors and spectra of the layers were measured, on the dense upstream."""

    text: str
    text_sha256: str
    windows: int
    tokens: int


@dataclass(frozen=True, slots=True)
class WithoutCores:
    """The same model in as many bytes without any core, fitted and measured in the same way."""

    file_bytes: int
    perplexity: float
    error: float
    kl_mean: float
    kl_999: float
    same_top1: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Point:
    """A measured size: bytes of the file, or those that are read of a prefix, and quality on the same text."""

    kind: PointKind
    label: str
    bytes: int
    kl_mean: float
    perplexity: float


@dataclass(frozen=True, slots=True)
class Predicted:
    """What the survey expects of an allocation of integers in so many bytes: loss above the dense model's."""

    bytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class Sample:
    """An unedited continuation; `repeated` is the share of its 4-grams of tokens that it had already said."""

    text: str
    tokens: int
    finish: str
    repeated: float
    early: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    """A fixed prompt, as a chat turn or as plain text, and how both models go on."""

    prompt: str
    chat: bool
    dense: Sample | None
    compressed: Sample


@dataclass(frozen=True, slots=True)
class Texts:
    """Generated text; means and counts are over all prompts. A stop is early below `early_tokens` tokens."""

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
    """A stage of the export: from when to when, and how many steps."""

    name: str
    start: float
    end: float
    steps: int


@dataclass(frozen=True, slots=True)
class Step:
    """One layer's fit: when it was done, how long it took, and its relative error in the norm it was fitted in."""

    layer: str
    end: float
    seconds: float
    error: float


@dataclass(frozen=True, slots=True)
class Compression:
    """How the export went, in the order of the work; times count from its start."""

    seconds: float
    stages: tuple[Stage, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Machine:
    """What the figures of speed and memory were measured on."""

    processor: str
    cores: int
    backend: str
    kernels: str
    threads: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What a part of the report took."""

    part: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """All that was measured of one file. `core_layers` of `layers` have cores."""

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

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise FormatError(
                f"version: expected {VERSION}, found {self.version}; read it with the release that wrote it"
            )


def to_text(report: Report) -> str:
    """A report as JSON: ASCII, indented, keys in the order of the classes."""
    return json.dumps(asdict(report), indent=1, allow_nan=False) + "\n"


def from_text(text: str | bytes, where: str = "report.json") -> Report:
    """Reads a report back; raises FormatError naming the key that is wrong."""
    return from_json(Report, text, where)
