"""CompactifAI's method (arXiv 2401.14109) under its own names: profile the layers, choose some, tensorize them, heal.

    from mpo_exporter.compactifai import CompactifAICompressor, heal_model, load_granite_model, prepare_validation_data

    model = load_granite_model("demo")
    validation = prepare_validation_data(model)
    compressor = CompactifAICompressor(bond_dimension=32, compression_ratio=0.3)
    compressor.profile_layer_sensitivity(model, validation)
    result = compressor.compress_model(model, "demo-compactifai.mpo", validation)
    print(result.to_json())
    heal_model(result.path, model, validation=validation)

Everything is done by the exporter: the file is the one that `mpo-export --plan paper` writes for the chosen layers.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpo_exporter.export import ExportTask, Result, export
from mpo_exporter.heal.run import Healed, heal
from mpo_exporter.heal.settings import HealJob, Settings
from mpo_exporter.measure.sensitivity import LayerSensitivity, compressed_alone, even_windows
from mpo_exporter.plan.named import PAPER, plan_layers
from mpo_exporter.plan.options import Choice, Options
from mpo_exporter.source import ModelFolder, Source, data_folder, open_source, require_finite_weights
from mpo_formats import Architecture, ConfigError
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_runtime.engine import Scheduler
from mpo_runtime.loading import load_network, open_weights
from mpo_runtime.sampler import SamplingOptions
from mpo_runtime.text.token_text import BUILT_IN_TEXT, TokenText, read_tokens

# When the speeds of two models are compared: tokens that are generated in each round, and the number of rounds.
SPEED_TOKENS = 16
SPEED_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class GraniteSource:
    """A dense model to compress: its Hugging Face folder, a short name, the hub revision and the architecture."""

    folder: Path
    name: str
    revision: str | None
    architecture: Architecture

    def open(self) -> Source:
        """Opens the model: its weights, tokenizer and chat template. The caller closes it."""
        return Source(ModelFolder(self.folder, self.name, self.revision))


def load_granite_model(model: str | Path = "granite") -> GraniteSource:
    """Finds a model: `demo`, `granite`, `granite-2b`, a Hugging Face folder or a hub id.

    Its weights are not read until they are needed.

    Raises:
        CheckpointError: when there is no such model, or it is not a Granite or Llama.
    """
    with open_source(model) as source:
        return GraniteSource(source.folder, source.name, source.revision, source.architecture)


def prepare_validation_data(model: GraniteSource, text: str | Path | None = None, max_tokens: int = 4096) -> TokenText:
    """Tokenises held-out text, the built-in one where `text` is None, and keeps its first `max_tokens` tokens.

    Raises:
        ConfigError: for a text that cannot be read, or `max_tokens` below 2.
    """
    return first_tokens(model, BUILT_IN_TEXT if text is None else Path(text), max_tokens)


def prepare_healing_data(model: GraniteSource, text: str | Path | None = None, max_tokens: int = 100_000) -> TokenText:
    """Tokenises training text for healing, the built-in one where `text` is None.

    Raises:
        ConfigError: for a text that cannot be read, or `max_tokens` below 2.
    """
    return first_tokens(model, data_folder() / "healing.jsonl" if text is None else Path(text), max_tokens)


def paper_options(chi: int, layers: tuple[str, ...]) -> Options:
    """The published method: fp16 cores of bond dimension χ for these layers, int4 for the rest."""
    return Options(PAPER.name, chi, choice=Choice(names=layers))


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises ConfigError for a value that is not a whole number of at least `least`."""
    if not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: expected a whole number of at least {least}, found {value!r}")


def first_tokens(model: GraniteSource, path: Path, count: int) -> TokenText:
    """The first `count` tokens of a text in the model's vocabulary."""
    check_count("max_tokens", count, least=2)
    with model.open() as source:
        return read_tokens(path, *source.text_files).first(count)


class LayerSensitivityProfiler:
    """Measures how much quality is lost when one attention or MLP matrix alone is replaced by cores.

    Args:
        model: the dense model.
        validation: held-out text.
        bond_dimension: χ of the cores.
    """

    def __init__(self, model: GraniteSource, validation: TokenText, bond_dimension: int = 32) -> None:
        check_count("bond_dimension", bond_dimension)
        self.model, self.validation, self.bond_dimension = model, validation, bond_dimension
        self._profile: list[LayerSensitivity] | None = None

    def profile(self) -> list[LayerSensitivity]:
        """All layers, the least sensitive first. They are measured at the first call.

        Raises:
            CheckpointError: for a model with weights that are not finite.
        """
        if self._profile is None:
            with self.model.open() as source:
                self._profile = self._measured(source)
        return list(self._profile)

    def _measured(self, source: Source) -> list[LayerSensitivity]:
        require_finite_weights(source.weights, source.name)
        windows = even_windows(self.validation, source.architecture)
        names = [linear.name for linear in source.spec.linears if linear.name not in (EMBEDDING, HEAD)]
        planned = plan_layers(source.spec, paper_options(self.bond_dimension, tuple(names)))
        layers = [linear for linear in planned if linear.name in names]
        found = (one for _, one in compressed_alone(source.weights, windows, layers))
        return sorted(found, key=lambda one: (one.kl_mean, one.layer))

    def get_compression_candidates(self, top_k: int = 10) -> list[LayerSensitivity]:
        """The `top_k` least sensitive layers.

        Raises:
            ConfigError: for a `top_k` below one.
        """
        check_count("top_k", top_k)
        return self.profile()[:top_k]


@dataclass(frozen=True, slots=True)
class CompressionResult:
    """The outcome of a compression: the file, the layers that were replaced by cores, sizes and quality."""

    path: Path
    layers: tuple[str, ...]
    compression_stats: dict[str, float]
    evaluation_results: dict[str, float]

    def to_json(self) -> str:
        """The result as JSON text."""
        return json.dumps({**asdict(self), "path": str(self.path)}, indent=1)


class CompactifAICompressor:
    """Replaces the least sensitive matrices by fp16 cores of one bond dimension, and stores the other layers as int4.

    Args:
        bond_dimension: χ of the cores.
        compression_ratio: the share of attention and MLP matrices that are replaced, the least sensitive ones.

    Raises:
        ConfigError: for a bond dimension below one, or a ratio outside 0 to 1.
    """

    def __init__(self, bond_dimension: int = 32, compression_ratio: float = 0.3) -> None:
        check_count("bond_dimension", bond_dimension)
        if not isinstance(compression_ratio, int | float) or not 0 < compression_ratio <= 1:
            raise ConfigError(f"compression_ratio: expected more than 0 and at most 1, found {compression_ratio!r}")
        self.bond_dimension, self.compression_ratio = bond_dimension, compression_ratio
        self._profiler: LayerSensitivityProfiler | None = None

    def profile_layer_sensitivity(self, model: GraniteSource, validation: TokenText) -> list[LayerSensitivity]:
        """Measures every attention and MLP matrix alone; returns the least sensitive first."""
        self._profiler = LayerSensitivityProfiler(model, validation, self.bond_dimension)
        return self._profiler.profile()

    def compress_model(
        self, model: GraniteSource, path: str | Path, validation: TokenText, *, force: bool = False
    ) -> CompressionResult:
        """Writes the compressed model to `path` and measures it. Layers are profiled first if they were not yet.

        Raises:
            OutputError: when `path` exists and `force` is not given.
        """
        if self._profiler is None or self._profiler.model != model:
            self.profile_layer_sensitivity(model, validation)
        profile = self._profiler.profile() if self._profiler else []
        count = max(1, round(self.compression_ratio * len(profile)))
        layers = tuple(item.layer for item in profile[:count])
        task = ExportTask(Path(path), paper_options(self.bond_dimension, layers), force=force, text=validation)
        with model.open() as source:
            result = export(source, task)
        return CompressionResult(result.path, layers, compression_stats(result), evaluation_results(result, model))

    def heal_model(self, compressed: str | Path, model: GraniteSource, **given: Any) -> Healed:
        """Calls the function `heal_model`; `given` are its other arguments."""
        return heal_model(compressed, model, **given)


def heal_model(
    compressed: str | Path,
    model: GraniteSource,
    healing: TokenText | str | Path | None = None,
    path: str | Path | None = None,
    *,
    tokens: int | None = None,
    epochs: float | None = None,
    minutes: float | None = None,
    validation: TokenText | None = None,
    force: bool = False,
    **settings: Any,
) -> Healed:
    """Retrains a compressed file briefly against the model that it was made from, and writes the healed file.

    Args:
        compressed: what `compress_model` wrote.
        healing: training text, as `prepare_healing_data` gives it or by its path; the built-in one where None.
        path: the file to write; `…-healed.mpo` beside the compressed one where None.
        tokens, epochs, minutes: the length of the training; at most one of them is given.
        settings: other fields of mpo_exporter.heal.settings.Settings, such as `chi_dropout`.

    Raises:
        MpoError: as mpo_exporter.heal.run.heal.
    """
    file = Path(compressed)
    job = HealJob(
        file=file,
        target=file.with_name(f"{file.stem}-healed.mpo") if path is None else Path(path),
        settings=Settings(tokens=tokens, epochs=epochs, minutes=minutes, **settings),
        text=Path(healing) if isinstance(healing, str) else healing,
        held_out=validation,
        force=force,
    )
    with model.open() as source:
        return heal(source, job)


def compression_stats(result: Result) -> dict[str, float]:
    """Parameters and sizes before and after, and by which share of the original they are reduced."""
    original, stored = result.source.architecture.parameters(), result.spec.stored_parameters()
    return {
        "original_parameters": original,
        "compressed_parameters": stored,
        "parameter_reduction": 1 - stored / original,
        "original_bytes": result.source_bytes,
        "compressed_bytes": result.file_bytes,
        "size_reduction": 1 - result.file_bytes / result.source_bytes,
    }


def evaluation_results(result: Result, model: GraniteSource) -> dict[str, float]:
    """Quality on the validation text, and the speed of generation relative to the dense model."""
    if result.comparison is None:
        raise ConfigError("validation: nothing was measured")
    ours, dense = result.comparison.model, result.comparison.reference
    return {
        "perplexity": ours.perplexity,
        "original_perplexity": dense.perplexity,
        "perplexity_increase": ours.perplexity / dense.perplexity - 1,
        "kl_divergence": result.comparison.kl_mean,
        "same_top_token": result.comparison.same_top1,
        "speedup": measured_speedup(result.path, model.folder),
    }


def measured_speedup(path: Path, folder: Path) -> float:
    """Tokens per second of a file divided by those of the dense model, in this runtime: the median over rounds."""
    opened = [open_weights(place) for place in (path, folder)]
    try:
        engines = [Scheduler(load_network(weights), context=SPEED_TOKENS + 8) for weights in opened]
        ratios = []
        for _ in range(SPEED_ROUNDS + 1):
            ours, dense = (generation_seconds(engine) for engine in engines)
            ratios.append(dense / ours)
        return statistics.median(ratios[1:])  # the first round warms up
    finally:
        for weights in opened:
            weights.close()


def generation_seconds(engine: Scheduler) -> float:
    """Seconds that an engine takes to generate SPEED_TOKENS tokens after a short prompt."""
    start = time.perf_counter()
    list(engine.generate([1, 2, 3, 4], SamplingOptions(temperature=0), max_tokens=SPEED_TOKENS, stop_ids=()))
    return time.perf_counter() - start
