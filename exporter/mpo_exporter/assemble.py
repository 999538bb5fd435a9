"""Fits layer after layer and writes each as soon as it is fitted, on the weights alone or on calibration text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpo_exporter.calibrate.moments import Calibration, Moment
from mpo_exporter.fit.layer import Built, Method, build_linear, widen
from mpo_exporter.progress import Progress
from mpo_formats import CheckpointError, LinearSpec, MpoWriter
from mpo_formats.architecture import EMBEDDING
from mpo_formats.layout import linear_tensors
from mpo_runtime.weights.checkpoint import Checkpoint

Matrix = NDArray[np.float64]
# name, the dense matrix, the fitted one, the moment that it was fitted to, the seconds that took
Watch = Callable[[str, Matrix, Matrix, Moment | None, float], None]


@dataclass(slots=True)
class Assembly:
    """The parts of one export: only one layer's tensors exist at a time.

    `table` is the second moment that the embedding's rows are rounded with; None measures it where the embedding is the
    head too, and else rounds each row by itself.
    """

    writer: MpoWriter
    source: Checkpoint
    method: Method
    progress: Progress
    table: Matrix | None = None
    watch: Watch | None = None
    done: int = 0

    def run(self, calibration: Calibration | None) -> None:
        """Writes all tensors, in the order of the file.

        Raises:
            ConfigError: naming the layer that cannot be fitted.
            CheckpointError: when an embedded file has vanished.
        """
        linears = self.writer.spec.linears
        if calibration is None:
            for linear in linears:
                self.layer(linear, None)
        else:
            self.calibrated({linear.name: linear for linear in linears}, calibration)
        for vector in self.writer.spec.vectors:
            self.writer.write(f"{vector.name}.weight", self.source.array(f"{vector.name}.weight"))
        for file in self.writer.spec.files:
            content = self.source.file(file.name)
            if content is None:
                raise CheckpointError(f"{self.source.folder}: {file.name} vanished during the export")
            self.writer.write(f"file.{file.name}", np.frombuffer(content, np.uint8))

    def calibrated(self, linears: dict[str, LinearSpec], calibration: Calibration) -> None:
        """Fits the embedding to its uses, then every layer to what the compressed layers before it make of the text."""
        tied = self.source.architecture.tie_word_embeddings
        if self.table is None and tied:
            for names, moment in calibration.dense():
                if names == (EMBEDDING,):
                    self.table = moment.second
        table = None if self.table is None else Moment(self.table, None, calibration.windows.size)
        embedding = self.layer(linears[EMBEDDING], table).matrix.astype(np.float32)

        def build(name: str, matrix: Matrix, moment: Moment) -> NDArray[np.float32]:
            if name == EMBEDDING:
                return embedding
            return self.layer(linears[name], moment).matrix.astype(np.float32)

        calibration.compress(build, embedding=embedding)

    def layer(self, linear: LinearSpec, moment: Moment | None) -> Built:
        """Fits one layer, and writes its tensors and its bias."""
        weight = f"{linear.name}.0.weight"
        raw, dtype, start = self.source.array(weight), self.source.dtype(weight), time.perf_counter()
        built = build_linear(linear, raw, dtype, moment, self.method)
        seconds = time.perf_counter() - start
        if self.watch:
            self.watch(linear.name, widen(raw, dtype), built.matrix, moment, seconds)
        for tensor in linear_tensors(linear):
            bias = tensor.name == f"{linear.name}.bias"
            self.writer.write(tensor.name, self.source.array(tensor.name) if bias else built.tensors[tensor.name])
        self.done += 1
        self.progress("fitting", self.done, len(self.writer.spec.linears))
        return built
