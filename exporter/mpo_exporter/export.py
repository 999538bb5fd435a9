"""The export: a dense model in, a `.mpo` file out, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpo_exporter.build import Tensors, build_linear
from mpo_exporter.plan import Options, plan_layers
from mpo_formats import (
    Certificate,
    Certificates,
    CheckpointError,
    ModelSpec,
    MpoFile,
    MpoWriter,
    Provenance,
    Quality,
)
from mpo_formats.layout import content_tensors
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.checkpoint import Checkpoint
from mpo_runtime.measure import Comparison, compare
from mpo_runtime.models.granite import GraniteModel
from mpo_runtime.texts import TokenText

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Result:
    """What an export made: sizes, and the comparison with the dense model where one was measured."""

    path: Path
    spec: ModelSpec
    source: ModelSpec
    file_bytes: int
    source_bytes: int
    core_layers: int
    comparison: Comparison | None

    @property
    def bits_per_weight(self) -> float:
        """Bits of the whole file per weight of the dense model, embeddings included."""
        return self.file_bytes * 8 / self.source.architecture.parameters()


def silent(stage: str, done: int, total: int) -> None:
    """Progress that is not shown."""


def export(
    folder: Path,
    target: Path,
    options: Options,
    *,
    force: bool = False,
    revision: str | None = None,
    text: TokenText | None = None,
    prefixes: tuple[int, ...] = (),
    device: str = "cpu",
    progress: Progress = silent,
) -> Result:
    """Exports the Hugging Face folder `folder` to the file `target`.

    Args:
        force: overwrites an existing target, once the new file is complete.
        text: held-out text on which the result is compared with the dense model; None measures nothing.
        prefixes: values of χ at which the file's prefixes are measured too.
        progress: called with a stage, the steps done and the steps in all.

    Raises:
        MpoError: for a damaged source, a plan that cannot be carried out, or a target that cannot be written.
    """
    source = Checkpoint(folder)
    try:
        spec = compressed_spec(source, options, revision)
        comparison: list[Comparison] = []

        def measure(path: Path) -> Certificates:
            if text is None:
                return Certificates(())
            bonds = (None, *prefixes)
            dense = GraniteModel(source.spec.architecture, ReferenceOps(source, device=device))
            comparison.extend(measure_file(path, chi, dense, text, device, progress) for chi in bonds)
            measured = zip(bonds, comparison, strict=True)
            return Certificates(tuple(Certificate(chi, quality(result, text)) for chi, result in measured))

        with MpoWriter(target, spec, force=force) as writer:
            write_tensors(writer, source, spec, progress)
            writer.commit(measure)
        dense = sum(tensor.size for tensor in content_tensors(source.spec))
        cores = sum(any(term.kind == "mpo" for term in linear.terms) for linear in spec.linears)
        size = target.stat().st_size
        return Result(target, spec, source.spec, size, dense, cores, comparison[0] if comparison else None)
    finally:
        source.close()


def compressed_spec(source: Checkpoint, options: Options, revision: str | None) -> ModelSpec:
    """The spec of the file to write: the plan's layers, the source's vectors, files and provenance."""
    from mpo_runtime import __version__

    chosen = {"plan": options.plan, "chi": str(options.chi), "cores": str(options.cores)}
    provenance = Provenance(
        source=source.folder.name,
        revision=revision,
        source_sha256=source.sha256(),
        exporter=f"mpo-runtime {__version__}",
        options=chosen,
        calibration_sha256=None,
    )
    spec = source.spec
    return ModelSpec(spec.architecture, plan_layers(spec, options), spec.vectors, spec.files, provenance)


def write_tensors(writer: MpoWriter, source: Checkpoint, spec: ModelSpec, progress: Progress) -> None:
    """Fits and writes layer after layer; only one layer's tensors exist at a time."""
    layers = {linear.name: linear for linear in spec.linears}
    vectors = {f"{vector.name}.weight" for vector in spec.vectors}
    built: Tensors = {}
    done = 0
    for tensor in writer.pending():
        name = tensor.name
        if name in vectors or name.endswith(".bias"):
            writer.write(name, source.array(name))
        elif name.startswith("file."):
            content = source.file(name.removeprefix("file."))
            if content is None:
                raise CheckpointError(f"{source.folder}: {name.removeprefix('file.')} vanished during the export")
            writer.write(name, np.frombuffer(content, np.uint8))
        else:
            if name not in built:
                layer = next(layer for layer in layers if name.startswith(f"{layer}."))
                linear = layers.pop(layer)
                weight = f"{layer}.0.weight"
                built = build_linear(linear, source.array(weight), source.dtype(weight))
                done += 1
                progress("fitting", done, len(spec.linears))
            writer.write(name, built[name])


def measure_file(
    path: Path, chi: int | None, dense: GraniteModel, text: TokenText, device: str, progress: Progress
) -> Comparison:
    """Compares a written file, or its prefix at χ = `chi`, with its dense source on held-out text."""
    stage = "measuring" if chi is None else f"measuring χ={chi}"
    with MpoFile(path) as file:
        ours = GraniteModel(file.spec.architecture, ReferenceOps(file, chi=chi, device=device))
        return compare(ours, dense, text.ids, progress=lambda done, total: progress(stage, done, total))


def quality(comparison: Comparison, text: TokenText) -> Quality:
    """The certificate's figures."""
    return Quality(
        text=text.name,
        text_sha256=text.sha256,
        tokens=int(text.ids.size),
        window=comparison.model.window,
        perplexity=comparison.model.perplexity,
        perplexity_error=comparison.model.error,
        dense_perplexity=comparison.reference.perplexity,
        kl_mean=comparison.kl_mean,
        kl_999=comparison.kl_999,
        same_top1=comparison.same_top1,
    )
