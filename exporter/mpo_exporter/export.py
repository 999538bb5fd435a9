"""The export: a dense model in, a `.mpo` file out; planned, fitted, written and certified with one layer in memory at a time."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_exporter.basis import PLAIN, Bases, basis_of
from mpo_exporter.calibrate.moments import UPSTREAMS, Calibration, Moment, Parts, compressed_blocks, dense_matrix
from mpo_exporter.calibrate.outputs import Outputs
from mpo_exporter.calibrate.store import Store
from mpo_exporter.calibrate.upstream import block_linears
from mpo_exporter.certify import Certifier
from mpo_exporter.effort import NORMAL, QUICK, Effort
from mpo_exporter.fit.layer import Built, Method, build_linear, in_integers, rounded_rows
from mpo_exporter.fit.parts import integer_parts
from mpo_exporter.measure.survey import Survey
from mpo_exporter.plan.budget import allocated_layers, default_bytes, file_bytes
from mpo_exporter.plan.options import Options, Target
from mpo_exporter.plan.planner import Planner
from mpo_exporter.plan.predict import record_outcome, within_kl
from mpo_exporter.progress import Log, Progress, no_log, silent
from mpo_exporter.request import check_file
from mpo_exporter.source import Source
from mpo_exporter.terms import without_operators
from mpo_exporter.texts import calibration_walk
from mpo_exporter.work import Work
from mpo_formats import Certificates, CheckpointError, LinearSpec, ModelSpec, MpoWriter, Provenance
from mpo_formats.architecture import EMBEDDING
from mpo_formats.layout import content_tensors, linear_tensors, transform_tensors
from mpo_formats.writer import spec_metadata
from mpo_runtime.measure import Comparison
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.protocol import DenseWeights

Matrix = NDArray[np.float64]
# From a layer's name to the second moment [O, O] of the loss's gradient by its outputs, if there is one.
OutputMoments = Callable[[str], NDArray[np.float32] | None]


@dataclass(frozen=True, slots=True)
class Fitted:
    """The fit of one layer: the dense matrix, the stored one [O, I], the moment that it was fitted to, and the time.

    There is no moment of a layer that was fitted without text or in parts.
    """

    layer: str
    dense: Matrix
    stored: Matrix
    moment: Moment | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Listener:
    """What an export reports to; by default to nothing.

    Args:
        log: is given a sentence for each cached measurement that was found, stale or made.
        fitted: is given the fit of every layer; None spares computing it.
        planned: is given the size of the file in bytes, before anything is fitted.
    """

    progress: Progress = silent
    log: Log = no_log
    fitted: Callable[[Fitted], None] | None = None
    planned: Callable[[int], None] | None = None


@dataclass(frozen=True, slots=True)
class ExportTask:
    """One export of a model that is open, with its texts read.

    Args:
        target: the file to write.
        options: of the plan.
        force: overwrites an existing target.
        calibration: the text that layers are fitted to, in at most `windows` windows; None fits to the weights alone.
        text: held-out text that the file is measured on; None measures nothing.
        prefixes: values of χ at which prefixes of the file are measured too.
        layers: the terms of every layer, in the place of the plan's.
        method: how terms are fitted, in the place of the plan's.
        surveyed: a survey of this model and text, in the place of the cached one or a new one.
        reserved: the longest entries that a later stage will add to the provenance; a target in bytes leaves room for them.
        effort: how much care is taken.
        work: keeps what was measured and fitted, so that a run that was killed goes on where it ended; None keeps nothing.
    """

    target: Path
    options: Options = field(default_factory=Options)
    force: bool = False
    calibration: TokenText | None = None
    windows: int = NORMAL.windows
    text: TokenText | None = None
    prefixes: tuple[int, ...] = ()
    device: str = "cpu"
    layers: tuple[LinearSpec, ...] | None = None
    method: Method | None = None
    surveyed: Survey | None = None
    reserved: Mapping[str, str] = field(default_factory=dict)
    effort: Effort = NORMAL
    work: Work | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """An exported file: its spec and sizes, and its comparison with the dense model if one was measured.

    Args:
        source: the spec of the dense model.
        core_layers: the number of layers with cores.
        surveyed: the survey that the plan was made from, if any.
    """

    path: Path
    spec: ModelSpec
    source: ModelSpec
    file_bytes: int
    source_bytes: int
    core_layers: int
    comparison: Comparison | None
    surveyed: Survey | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits of the whole file per weight of the dense model, embeddings included."""
        return self.file_bytes * 8 / self.source.architecture.parameters()


def export(source: Source, task: ExportTask, listener: Listener | None = None) -> Result:
    """Exports a dense model to a `.mpo` file.

    Raises:
        MpoError: for a damaged source, a plan that cannot be carried out, or a target that cannot be written.
    """
    listener = listener or Listener()
    check_file(task.target, "--out", force=task.force)
    spilled = task.work.temporary() if task.work else task.target.parent
    planner = planner_for(source, task, spilled, listener)
    spec = planned_spec(source, task, planner)
    if listener.planned:
        listener.planned(file_bytes(spec))
    comparisons: list[Comparison] = []

    def certify(path: Path) -> Certificates:
        if task.text is None:
            return Certificates(())
        certifier = Certifier(source.weights, task.text, device=task.device, progress=listener.progress)
        bonds = (None, *task.prefixes)
        comparisons.extend(certifier.compare(path, chi) for chi in bonds)
        return Certificates(tuple(map(certifier.certificate, bonds, comparisons)))

    with MpoWriter(task.target, spec, force=task.force, folder=spilled) as writer:
        table = planner.surveyed.table if planner.surveyed else None
        bases = planner.bases(spec)
        method = task.method or Method(norm=task.options.keeps_norm)
        # A report shows every fit, so it needs them done in this run.
        store = None if listener.fitted else task.work
        if store is not None:
            store.scope("fit", hashlib.sha256(json.dumps(spec_metadata(spec)).encode()).hexdigest()[:16])
        outputs = output_moments(source, task, planner, method, listener)
        Fitting(writer, source.weights, method, listener, table, store, outputs, bases).run(planner.walk)
        writer.commit(certify)
    comparison = comparisons[0] if comparisons else None
    if comparison:
        record_outcome(planner, spec, comparison.kl_mean)
    return replace(result_of(task.target, spec, source.spec, comparison), surveyed=planner.surveyed)


def output_moments(
    source: Source, task: ExportTask, planner: Planner, method: Method, listener: Listener
) -> OutputMoments:
    """The moments of gradients by the layers' outputs that integers are rounded with; none where the effort asks for none."""
    walk, count = planner.walk, task.effort.outputs
    if walk is None or not count or method.rounding != "compensated":
        return lambda name: None
    picks = np.linspace(0, len(walk.windows) - 1, min(count, len(walk.windows))).round().astype(np.int64)
    outputs = Outputs(source.weights, walk.windows[picks], task.work, device=task.device)
    outputs.measure(lambda done, total: listener.progress("outputs", done, total))
    return outputs.moment


def without_cores(source: Source, file: ModelSpec, most_bytes: int, task: ExportTask, listener: Listener) -> Result:
    """Fits integers alone, chosen as the plan `auto` does, in at most the bytes of a file with cores, and measures them.

    Args:
        file, most_bytes: the spec and the size of the file with cores.
        task: its target is where the file without cores is written; it needs calibration text, and text to measure on.
    """
    planner = planner_for(source, task, task.target.parent, listener)
    rows = {name: without_operators(row) for name, row in planner.survey(complete=False).candidates.items()}
    layers = allocated_layers(file, rows, most_bytes)
    plain = replace(task, options=Options("int4"), text=None, layers=layers, surveyed=planner.surveyed)
    result = export(source, plain, listener)
    if task.text is None:
        return result
    certifier = Certifier(source.weights, task.text, device=task.device, progress=listener.progress)
    return replace(result, comparison=certifier.compare(task.target))


def result_of(path: Path, spec: ModelSpec, source: ModelSpec, comparison: Comparison | None) -> Result:
    """The result for a written file."""
    dense = sum(tensor.size for tensor in content_tensors(source))
    cores = sum(any(term.kind == "mpo" for term in linear.terms) for linear in spec.linears)
    return Result(path, spec, source, path.stat().st_size, dense, cores, comparison)


def planner_for(source: Source, task: ExportTask, folder: Path, listener: Listener) -> Planner:
    """What a task's plan is made from; activations are spilled to `folder`."""
    text = task.calibration
    walk = None if text is None else calibration_walk(source, text, folder, task.windows, task.device)
    return Planner(
        source.weights,
        text,
        walk,
        listener.progress,
        listener.log,
        task.surveyed,
        care=task.effort.care,
        store=task.work,
        transforms=task.options.transforms or "hadamard",
        blind=walk is None and task.effort == QUICK,
    )


def planned_spec(source: Source, task: ExportTask, planner: Planner) -> ModelSpec:
    """The spec of the file to write, complete before anything is fitted."""
    if task.layers is not None:
        return replace(file_spec(source, task), linears=task.layers)
    if task.options.target.default and planner.blind:
        task = replace(task, options=replace(task.options, target=Target(size=default_bytes(source.spec))))
    if task.options.target.default:
        # The header records the size, so the size is chosen for a header that records one.
        some = replace(task, options=replace(task.options, target=Target(size=default_bytes(source.spec))))
        task = replace(task, options=planner.sized(longest_spec(source, some), task.options))
    layers = planner.layers(longest_spec(source, task), within_kl(planner, task.options))
    return replace(file_spec(source, task), linears=layers)


def longest_spec(source: Source, task: ExportTask) -> ModelSpec:
    """The spec of the file to write with all that a later stage will add to its provenance, the layers still dense."""
    spec = file_spec(source, task)
    options = {**spec.provenance.options, **task.reserved}
    return replace(spec, provenance=replace(spec.provenance, options=options))


def file_spec(source: Source, task: ExportTask) -> ModelSpec:
    """The spec of the file to write with its provenance, the layers still dense."""
    from mpo_runtime import __version__

    options = {**task.options.recorded(source.spec), "effort": task.effort.name}
    if task.calibration is not None:
        options["calibration"] = task.calibration.name
    provenance = Provenance(
        source=source.folder.name,
        revision=source.revision,
        source_sha256=source.weights.sha256(),
        exporter=f"mpo-runtime {__version__}",
        options=options,
        calibration_sha256=None if task.calibration is None else task.calibration.sha256,
    )
    return replace(source.spec, provenance=provenance)


@dataclass(slots=True)
class Fitting:
    """Fits the layers of a planned file one after the other, and writes each as soon as it is fitted.

    Args:
        table: the second moment that the embedding's rows are rounded with. None measures it if the embedding is the head
            too, and otherwise rounds each row by itself.
        store: keeps the tensors of every layer; those of a run before are taken from it.
        outputs: the moments of gradients that integers are rounded with.
        bases: the stored transforms that layers take, by their names.
        done: the number of layers that are written.
        written: the transforms that are written.
    """

    writer: MpoWriter
    source: DenseWeights
    method: Method
    listener: Listener
    table: Matrix | None = None
    store: Store | None = None
    outputs: OutputMoments = lambda name: None
    bases: Bases = field(default_factory=dict)
    done: int = 0
    written: set[str] = field(default_factory=set)

    def run(self, walk: Calibration | None) -> None:
        """Writes all tensors in the order of the file; layers are fitted to the walk's text, or to the weights alone.

        Raises:
            ConfigError: naming the layer that cannot be fitted.
            CheckpointError: if an embedded file has vanished.
        """
        spec = self.writer.spec
        if walk is None:
            for linear in spec.linears:
                if not self.resumed(linear):
                    self.blind(linear)
        else:
            self.calibrated({linear.name: linear for linear in spec.linears}, walk)
        for vector in spec.vectors:
            self.writer.write(f"{vector.name}.weight", self.source.array(f"{vector.name}.weight"))
        for file in spec.files:
            content = self.source.file(file.name)
            if content is None:
                raise CheckpointError(f"{self.source.folder}: {file.name} vanished during the export")
            self.writer.write(f"file.{file.name}", np.frombuffer(content, np.uint8))

    def calibrated(self, linears: dict[str, LinearSpec], walk: Calibration) -> None:
        """Fits the embedding to its uses, then every layer to what the compressed layers before it make of the text."""

        def build(name: str, matrix: Matrix, moment: Moment) -> NDArray[np.float32]:
            return self.built(linears, name, moment)

        if first := self.finished_blocks(linears):
            blocks = {
                EMBEDDING,
                *(name for block in range(first) for name in block_linears(self.source.architecture, block)),
            }
            for name in linears:
                if name in blocks:
                    self.resumed(linears[name])
            walk.compress(build, store=self.store, parts=self.in_parts(linears))
            return
        if self.table is None and self.source.architecture.tie_word_embeddings:
            for names, moment in walk.dense():
                if names == (EMBEDDING,):
                    self.table = moment.second
        table = None if self.table is None else Moment(self.table.copy(), None, walk.windows.size, device=walk.device)
        embedding = self.layer(linears[EMBEDDING], table).matrix.astype(np.float32)

        walk.compress(build, embedding=embedding, store=self.store, parts=self.in_parts(linears))

    def in_parts(self, linears: dict[str, LinearSpec]) -> Parts:
        """Layers that become integers alone may be fitted some columns at a time, but for those that mind their outputs."""
        alone = {name for name, linear in linears.items() if in_integers(linear, self.method)}
        return integer_parts(linears, lambda name: name in alone and self.outputs(name) is None, self.finished)

    def built(self, linears: dict[str, LinearSpec], name: str, moment: Moment) -> NDArray[np.float32]:
        """Fits a layer in its turn; the embedding was fitted before all others, and as a head it has no other turn."""
        if name == EMBEDDING:
            return np.empty((linears[name].out_features, linears[name].in_features), np.float32)
        return self.layer(linears[name], moment).matrix.astype(np.float32)

    def finished_blocks(self, linears: dict[str, LinearSpec]) -> int:
        """How many blocks a run before has finished; 0 where one of their layers cannot be read."""
        first = compressed_blocks(self.store)
        names = [
            EMBEDDING,
            *(name for block in range(first) for name in block_linears(self.source.architecture, block)),
        ]
        if first and self.store and all(self.store.read(f"fit-{name}") is not None for name in names):
            return first
        if self.store:
            self.store.forget(UPSTREAMS)
        return 0

    def resumed(self, linear: LinearSpec) -> bool:
        """Writes the tensors of a layer that a run before has fitted; False if there are none."""
        kept = None if self.store is None else self.store.read(f"fit-{linear.name}")
        if kept is None:
            return False
        self.write(linear, kept)
        return True

    def layer(self, linear: LinearSpec, moment: Moment | None) -> Built:
        """Fits one layer, keeps its tensors, and writes them."""
        weight = f"{linear.name}.0.weight"
        raw, dtype, start = self.source.array(weight), self.source.dtype(weight), time.perf_counter()
        outputs, basis = self.outputs(linear.name), basis_of(linear, self.bases)
        built = build_linear(linear, raw, dtype, moment, self.method, outputs, basis)
        self.finished(linear, built, time.perf_counter() - start, moment)
        return built

    def blind(self, linear: LinearSpec) -> None:
        """Fits one layer to its weights alone; integers some rows at a time, unless a listener wants the matrix too."""
        if self.listener.fitted or [term.kind for term in linear.terms] != ["quantized"]:
            self.layer(linear, None)
            return
        weight = f"{linear.name}.0.weight"
        raw, dtype = self.source.array(weight), self.source.dtype(weight)
        self.keep(linear, rounded_rows(linear, raw, dtype, basis_of(linear, self.bases)))

    def finished(self, linear: LinearSpec, built: Built, seconds: float, moment: Moment | None = None) -> None:
        """Reports a layer's fit, keeps its tensors, and writes them."""
        if self.listener.fitted:
            if moment is not None:
                moment.turn(PLAIN)
            dense = dense_matrix(self.source, linear.name)
            self.listener.fitted(Fitted(linear.name, dense, built.matrix, moment, seconds))
        self.keep(linear, built.tensors)

    def keep(self, linear: LinearSpec, tensors: dict[str, NDArray[Any]]) -> None:
        """Keeps a layer's tensors and writes them."""
        if self.store is not None:
            self.store.write(f"fit-{linear.name}", tensors)
        self.write(linear, tensors)

    def write(self, linear: LinearSpec, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Writes the tensors of a layer, its bias, and before them the transform of its input if it is the first to take it."""
        if linear.transform and linear.transform.name not in self.written:
            self.written.add(linear.transform.name)
            for tensor in transform_tensors(linear.transform):
                self.writer.write(tensor.name, self.bases[linear.transform.name].tensors[tensor.name])
        for tensor in linear_tensors(linear):
            bias = tensor.name == f"{linear.name}.bias"
            self.writer.write(tensor.name, self.source.array(tensor.name) if bias else tensors[tensor.name])
        self.done += 1
        self.listener.progress("fitting", self.done, len(self.writer.spec.linears))
