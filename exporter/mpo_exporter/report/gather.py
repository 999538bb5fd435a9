"""Measures everything that a report says about a file and its dense model, within a bounded time."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from mpo_exporter.calibrate.windows import WINDOW
from mpo_exporter.certify import Certifier
from mpo_exporter.export import ExportTask, Listener, without_cores
from mpo_exporter.progress import Progress, silent
from mpo_exporter.report.accuracy import measured_accuracy
from mpo_exporter.report.facts import (
    FORMAT,
    VERSION,
    Accuracy,
    Calibrated,
    Cost,
    Layer,
    Machine,
    Measured,
    Memory,
    Point,
    Report,
    Speed,
    Subject,
    Texts,
    WithoutCores,
)
from mpo_exporter.report.job import Job
from mpo_exporter.report.layers import measured_layers
from mpo_exporter.report.runs import decode_speed, memory_use, write_texts
from mpo_exporter.report.sizes import (
    dense_bytes,
    earlier_points,
    points_of,
    predicted_curve,
    ratios_of,
    sizes_of,
)
from mpo_exporter.source import Source
from mpo_formats import ConfigError, ModelSpec, MpoFile
from mpo_runtime import native
from mpo_runtime.loading import choose_backend, load
from mpo_runtime.measure import Comparison
from mpo_runtime.memory import available_memory
from mpo_runtime.model import Model
from mpo_runtime.text.token_text import TokenText

# The context that both models run with, in tokens.
CONTEXT = 512
# A dense model larger than this share of the free memory is not run: it would be read from disk again for every token.
MEMORY_SHARE = 0.8
# A file without cores is fitted by default if the weights times the calibration tokens are at most this many.
FIT_BUDGET = 5e11
PROCESSORS = Path("/proc/cpuinfo")


def gather(source: Source, job: Job, progress: Progress = silent) -> Report:
    """Measures a file and its dense model.

    Args:
        source: the dense model.

    Raises:
        ConfigError: when the file was made from another model.
        MpoError: for a damaged file or model.
    """
    with MpoFile(job.file) as file:
        return Gatherer(source, job, file, progress).report()


def require_same_model(file: MpoFile, source: Source) -> None:
    """Raises ConfigError unless the file was made from this dense model."""
    if file.spec.architecture != source.architecture:
        raise ConfigError(
            f"{file.name}: its architecture is not that of {source.folder.name}; "
            "give the model that it was made from with --teacher"
        )
    known = file.spec.provenance.source_sha256
    if known and known != source.weights.sha256():
        raise ConfigError(
            f"{file.name}: was made from {file.spec.provenance.source} with SHA-256 {known[:12]}…, "
            f"{source.folder.name} is another; give that one with --teacher"
        )


@dataclass(slots=True)
class Gatherer:
    """A report in the making, with the time that its parts took and the reasons why parts are missing."""

    source: Source
    job: Job
    file: MpoFile
    progress: Progress
    costs: list[Cost] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Records how long a part takes."""
        start = time.perf_counter()
        yield
        self.costs.append(Cost(part, time.perf_counter() - start))

    def report(self) -> Report:
        """Measures everything."""
        job, spec = self.job, self.file.spec
        require_same_model(self.file, self.source)
        sizes = sizes_of(spec, self.source.spec, self.file.size)
        found = self.quality()
        quality = Measured.of(found, job.text) if found and job.text else None
        accuracy = self.accuracy()
        speed, memory, texts = self.runs()
        layers, calibrated = self.layers()
        cored = sum(any(term.chi for term in layer.terms) for layer in layers)
        plain = self.without_cores(cored)
        points: tuple[Point, ...] = ()
        if quality:
            earlier = earlier_points(job.earlier, quality, spec.provenance.source_sha256)
            points = points_of(spec, sizes, quality, self.file.certificates(), plain, earlier)
        if job.compression is None:
            self.missing["compression"] = "the file was exported before; to record how, give --report to the export"
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
            accuracy=accuracy,
        )

    def quality(self) -> Comparison | None:
        """The comparison that the export made, or a new one; None where there is no text to measure on."""
        if self.job.comparison is not None:
            return self.job.comparison
        if self.job.text is None:
            self.missing["quality"] = self.job.why_no_text
            return None
        with self.timed("quality"):
            return self.compared(self.job.file, self.job.text)

    def accuracy(self) -> tuple[Accuracy, ...]:
        """The accuracy of both models on the job's tasks."""
        if not self.job.tasks:
            return ()
        with self.timed("accuracy"):
            return measured_accuracy(self.source, self.job.file, self.job.tasks, self.job.device, self.progress)

    def compared(self, path: Path, text: TokenText) -> Comparison:
        """A file against the dense model on a text."""
        certifier = Certifier(self.source.weights, text, device=self.job.device, progress=self.progress)
        return certifier.compare(path)

    def runs(self) -> tuple[Speed | None, Memory | None, Texts | None]:
        """Decoding speed, memory and generated texts of both models."""
        job = self.job
        context = min(CONTEXT, self.source.architecture.max_position_embeddings)
        fits = dense_bytes(self.source.spec, 4) <= MEMORY_SHARE * available_memory()
        why = "the dense model does not fit into the memory that is free"
        speed: Speed | str = why
        memory: Memory | str = why
        with ExitStack() as stack:
            compressed = stack.enter_context(self.load(job.file, context))
            dense = stack.enter_context(self.load(self.source.folder, context)) if fits else None
            if dense:
                with self.timed("speed"):
                    speed = decode_speed(dense, compressed, self.progress)
            slowest = None if isinstance(speed, str) else min(speed.dense_median, speed.median)
            with self.timed("texts"):
                texts = write_texts(dense, compressed, slowest, self.progress)
        if fits:
            with self.timed("memory"):
                memory = memory_use(self.source.folder, job.file, context, job.threads)
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
        """Every layer with its error and spectrum, and the text on which these were measured."""
        with self.timed("layers"):
            layers, calibrated, reason = measured_layers(self.job, self.file, self.source.weights, self.progress)
        if reason:
            self.missing["calibrated"] = reason
        return layers, calibrated

    def without_cores(self, cored: int) -> WithoutCores | None:
        """A file of the same size without cores, or None; `cored` is the number of layers with cores."""
        job, spec = self.job, self.file.spec
        work = spec.architecture.parameters() * job.fit_windows * WINDOW
        reason = ""
        if not cored:
            reason = "no layer has cores"
        elif job.text is None:
            reason = f"quality was not measured: {job.why_no_text}"
        elif job.calibration is None:
            reason = "there is no calibration text to fit to"
        elif job.without_cores is False or (job.without_cores is None and work > FIT_BUDGET):
            reason = "it takes another export; mpo-export report --without-cores measures it"
        if reason or job.text is None or job.calibration is None:
            self.missing["without_cores"] = reason
            return None
        with self.timed("without cores"):
            return self.fitted_without_cores(job.text, job.calibration)

    def fitted_without_cores(self, text: TokenText, calibration: TokenText) -> WithoutCores | None:
        """Fits integers alone in at most as many bytes as the file has, and measures the result."""
        job, start = self.job, time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="without-cores-", dir=job.folder) as work:
            task = ExportTask(
                target=Path(work) / "without-cores.mpo",
                calibration=calibration,
                windows=job.fit_windows,
                text=text,
                surveyed=job.surveyed,
                device=job.device,
            )
            result = without_cores(self.source, self.file.spec, self.file.size, task, Listener(self.progress))
        if result.comparison is None:
            return None
        return WithoutCores.of(result.file_bytes, result.comparison, time.perf_counter() - start)


def subject_of(spec: ModelSpec, file: Path, name: str) -> Subject:
    """A file's names, origin and architecture."""
    model, origin = spec.architecture, spec.provenance
    return Subject(
        name=name,
        file=file.name,
        source=origin.source,
        source_sha256=origin.source_sha256,
        revision=origin.revision,
        exporter=origin.exporter,
        options=dict(origin.options),
        model_type=model.model_type,
        blocks=model.num_hidden_layers,
        hidden=model.hidden_size,
        inner=model.intermediate_size,
        heads=model.num_attention_heads,
        key_value_heads=model.num_key_value_heads,
        vocabulary=model.vocab_size,
        tied=model.tie_word_embeddings,
    )


def machine_of(device: str) -> Machine:
    """This machine and the kernels in use."""
    active = native.active()
    threads = active.get("threads", "")
    return Machine(
        processor=processor_name(),
        cores=os.cpu_count() or 1,
        backend=choose_backend("auto", device),
        kernels=active["native"],
        threads=int(threads) if threads.isdigit() else 0,
    )


def processor_name() -> str:
    """The processor's name, as the operating system reports it."""
    if PROCESSORS.exists():
        for line in PROCESSORS.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
