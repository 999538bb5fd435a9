"""Measures everything that a report says of one file beside its dense model, within bounds of time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from mpo_exporter.calibrate.windows import COUNT
from mpo_exporter.export import measure_file
from mpo_exporter.measure.survey import Survey
from mpo_exporter.progress import Progress, silent
from mpo_exporter.report.alternative import affordable, predicted_curve, without_cores
from mpo_exporter.report.facts import (
    FORMAT,
    VERSION,
    Calibrated,
    Compression,
    Cost,
    Layer,
    Measured,
    Memory,
    Point,
    Report,
    Speed,
    Texts,
    WithoutCores,
)
from mpo_exporter.report.layers import measured_layers
from mpo_exporter.report.samples import write_texts
from mpo_exporter.report.speed import decode_speed, memory_use
from mpo_exporter.report.subject import (
    dense_bytes,
    machine_of,
    measured,
    points_of,
    ratios_of,
    sizes_of,
    subject_of,
)
from mpo_formats import ConfigError, MpoFile
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.loading import load
from mpo_runtime.measure import Comparison
from mpo_runtime.memory import available_memory
from mpo_runtime.model import Model
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint

CONTEXT = 512
# A dense model above this share of the free memory would be read from disk again for every token.
MEMORY_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Job:
    """What to report on, and what is known already.

    `folder` holds the report, and what is spilled while it is made. `text` is what quality is measured on, None for the
    reason `why_no_text`. `calib_windows` of the calibration text measure the layers, as many as the budget allows where
    None; `fit_windows` fit the same bytes without cores. `without_cores` says whether the same
    bytes without cores are fitted, None for where it is affordable. What an export knows spares measuring it again:
    `comparison`, `surveyed`, `compression`. `earlier` is the report that lay in the folder before.
    """

    file: Path
    teacher: Path
    name: str
    folder: Path
    text: TokenText | None
    why_no_text: str = ""
    calibration: TokenText | None = None
    calib_windows: int | None = None
    fit_windows: int = COUNT
    device: str = "cpu"
    threads: int | None = None
    without_cores: bool | None = None
    comparison: Comparison | None = None
    surveyed: Survey | None = None
    compression: Compression | None = None
    earlier: Report | None = None


def gather(job: Job, progress: Progress = silent) -> Report:
    """Measures a file beside its dense model.

    Raises:
        ConfigError: when the file was made from another model than the teacher.
        MpoError: for a damaged file or teacher.
    """
    source = Checkpoint(job.teacher)
    try:
        with MpoFile(job.file) as file:
            return Work(job, file, source, progress).report()
    finally:
        source.close()


def require_same_model(file: MpoFile, source: Checkpoint) -> None:
    """Raises ConfigError unless the file was made from this dense model."""
    if file.spec.architecture != source.architecture:
        raise ConfigError(
            f"{file.name}: its architecture is not that of {source.folder.name}; "
            "give the model that it was made from with --teacher"
        )
    known = file.spec.provenance.source_sha256
    if known and known != source.sha256():
        raise ConfigError(
            f"{file.name}: was made from {file.spec.provenance.source} with SHA-256 {known[:12]}…, "
            f"{source.folder.name} is another; give that one with --teacher"
        )


@dataclass(slots=True)
class Work:
    """A report in the making: what parts took, and why parts are missing."""

    job: Job
    file: MpoFile
    source: Checkpoint
    progress: Progress
    costs: list[Cost] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Notes what a part took."""
        start = time.perf_counter()
        yield
        self.costs.append(Cost(part, time.perf_counter() - start))

    def report(self) -> Report:
        """Measures everything."""
        job, spec = self.job, self.file.spec
        require_same_model(self.file, self.source)
        sizes = sizes_of(spec, self.source.spec, self.file.size)
        found = self.quality()
        quality = measured(found, job.text) if found and job.text else None
        speed, memory, texts = self.runs()
        layers, calibrated = self.layers()
        cored = sum(any(term.chi for term in layer.terms) for layer in layers)
        plain = self.without_cores(cored)
        points: tuple[Point, ...] = ()
        if quality:
            earlier = earlier_points(job.earlier, quality, spec.provenance.source_sha256)
            points = points_of(spec, sizes, quality, self.file.certificates(), plain, earlier)
        if job.compression is None:
            self.missing["compression"] = "this report was made for a file that existed; give --report to the export"
        return Report(
            format=FORMAT,
            version=VERSION,
            made=datetime.now(UTC).isoformat(timespec="seconds"),
            subject=subject_of(spec, job.file, job.name),
            sizes=sizes,
            ratios=ratios_of(sizes, speed, memory),
            quality=quality,
            speed=speed,
            memory=memory,
            core_layers=cored,
            layers=layers,
            calibrated=calibrated,
            without_cores=plain,
            points=points,
            predicted=predicted_curve(job.surveyed, spec, self.file.size) if job.surveyed else (),
            texts=texts,
            compression=job.compression,
            machine=machine_of(job.device),
            costs=tuple(self.costs),
            missing=self.missing,
        )

    def quality(self) -> Comparison | None:
        """The export's comparison, or a new one."""
        if self.job.comparison is not None:
            return self.job.comparison
        if self.job.text is None:
            self.missing["quality"] = self.job.why_no_text
            return None
        with self.timed("quality"):
            dense = decoder_for(self.source.architecture, ReferenceOps(self.source, device=self.job.device))
            return measure_file(self.job.file, None, dense, self.job.text, self.job.device, self.progress)

    def runs(self) -> tuple[Speed | None, Memory | None, Texts | None]:
        """Speed, memory and texts: what the two models do when they run."""
        job = self.job
        context = min(CONTEXT, self.source.architecture.max_position_embeddings)
        fits = dense_bytes(self.source.spec, 4) <= MEMORY_SHARE * available_memory()
        why = "the dense model does not fit into the memory that is free"
        speed: Speed | str = why
        memory: Memory | str = why
        with ExitStack() as stack:
            compressed = stack.enter_context(self.load(job.file, context))
            dense = stack.enter_context(self.load(job.teacher, context)) if fits else None
            if dense:
                with self.timed("speed"):
                    speed = decode_speed(dense, compressed, self.progress)
            slowest = None if isinstance(speed, str) else min(speed.dense_median, speed.median)
            with self.timed("texts"):
                texts = write_texts(dense, compressed, slowest, self.progress)
        if fits:
            with self.timed("memory"):
                memory = memory_use(job.teacher, job.file, context, job.threads)
        found = {"speed": speed, "memory": memory, "texts": texts}
        self.missing |= {part: reason for part, reason in found.items() if isinstance(reason, str)}
        return (
            None if isinstance(speed, str) else speed,
            None if isinstance(memory, str) else memory,
            None if isinstance(texts, str) else texts,
        )

    def load(self, path: Path, context: int) -> Model:
        """A model on the job's device."""
        return load(path, device=self.job.device, threads=self.job.threads, context=context)

    def layers(self) -> tuple[tuple[Layer, ...], Calibrated | None]:
        """Decisions, errors and spectra."""
        job = self.job
        steps = job.compression.steps if job.compression else ()
        with self.timed("layers"):
            layers, calibrated, reason = measured_layers(
                self.file, self.source, job.calibration, job.calib_windows, steps, job.folder, self.progress
            )
        if reason:
            self.missing["calibrated"] = reason
        return layers, calibrated

    def without_cores(self, cored: int) -> WithoutCores | None:
        """The same bytes without cores, or None with a reason."""
        job = self.job
        windows = job.fit_windows
        reason = ""
        if not cored:
            reason = "no layer has cores"
        elif job.text is None:
            reason = f"quality was not measured: {job.why_no_text}"
        elif job.calibration is None:
            reason = "there is no calibration text to fit to"
        elif job.without_cores is False or (job.without_cores is None and not affordable(self.file.spec, windows)):
            reason = "it takes another export; mpo-export report --without-cores measures it"
        if reason or job.text is None or job.calibration is None:
            self.missing["without_cores"] = reason
            return None
        with self.timed("without cores"):
            return without_cores(
                self.source,
                self.file.spec,
                self.file.size,
                job.text,
                job.calibration,
                windows,
                job.surveyed,
                job.folder,
                job.device,
                self.progress,
            )


def earlier_points(earlier: Report | None, quality: Measured, source_sha256: str) -> list[Point]:
    """The points of an earlier report that were measured on the same model and the same tokens."""
    if earlier is None or earlier.quality is None or earlier.subject.source_sha256 != source_sha256:
        return []
    before = earlier.quality
    if (before.text_sha256, before.tokens) != (quality.text_sha256, quality.tokens):
        return []
    kept = []
    for point in earlier.points:
        if point.kind == "this file":
            bits = earlier.sizes.bits_per_weight
            kept.append(Point("earlier", f"earlier, {bits:.2f} bits", point.bytes, point.kl_mean, point.perplexity))
        elif point.kind in ("earlier", "without cores"):
            kept.append(point)
    return kept
