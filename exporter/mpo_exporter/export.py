"""The export: a dense model in, a `.mpo` file out, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mpo_exporter.assemble import Assembly, Watch
from mpo_exporter.calibrate.moments import Calibration
from mpo_exporter.calibrate.windows import COUNT, cut_calibration
from mpo_exporter.fit.layer import Method
from mpo_exporter.measure.cache import Tell, untold
from mpo_exporter.measure.survey import Survey
from mpo_exporter.plan.named import Options
from mpo_exporter.plan.planner import Planner
from mpo_exporter.plan.predict import remember, within_kl
from mpo_exporter.progress import Progress, silent
from mpo_exporter.source import require_finite_weights
from mpo_formats import (
    Certificate,
    Certificates,
    LinearSpec,
    ModelSpec,
    MpoFile,
    MpoWriter,
    OutputError,
    Provenance,
    Quality,
)
from mpo_formats.layout import content_tensors
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.measure import Comparison, compare
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint


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
    surveyed: Survey | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits of the whole file per weight of the dense model, embeddings included."""
        return self.file_bytes * 8 / self.source.architecture.parameters()


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
    calibration: TokenText | None = None,
    windows: int = COUNT,
    layers: tuple[LinearSpec, ...] | None = None,
    method: Method | None = None,
    surveyed: Survey | None = None,
    tell: Tell = untold,
    watch: Watch | None = None,
    later: Mapping[str, str] | None = None,
) -> Result:
    """Exports the Hugging Face folder `folder` to the file `target`.

    Args:
        force: overwrites an existing target; text: held-out text to compare with the dense model on, or None.
        prefixes: values of χ at which the file's prefixes are measured too.
        progress: called with a stage, the steps done and the steps in all.
        calibration: text whose activations in at most `windows` windows the layers are fitted to; None: the weights alone.
        layers, method: terms of every layer, in the place of the plan's; how terms are fitted to the activations.
        surveyed, later: a survey of this source, in the place of the kept or a new one; as in `planned_spec`.
        tell, watch: called with a sentence on what measurements were found, stale or made; told of every layer's fit.

    Raises:
        MpoError: for a damaged source, a plan that cannot be carried out, or a target that cannot be written.
    """
    source = Checkpoint(folder)
    try:
        require_folder(target)
        planner = planner_for(source, calibration, windows, target.parent, surveyed, progress, tell)
        spec = planned_spec(planner, options, revision, layers, later)
        comparison: list[Comparison] = []

        def measure(path: Path) -> Certificates:
            if text is None:
                return Certificates(())
            bonds = (None, *prefixes)
            dense = decoder_for(source.spec.architecture, ReferenceOps(source, device=device))
            comparison.extend(measure_file(path, chi, dense, text, device, progress) for chi in bonds)
            measured = zip(bonds, comparison, strict=True)
            return Certificates(tuple(Certificate(chi, quality(result, text)) for chi, result in measured))

        with MpoWriter(target, spec, force=force) as writer:
            table = planner.surveyed.table if planner.surveyed else None
            Assembly(writer, source, method or method_of(options), progress, table, watch).run(planner.walk)
            writer.commit(measure)
        if comparison:
            remember(planner, spec, comparison[0].kl_mean)
        result = result_of(target, spec, source.spec, comparison[0] if comparison else None)
        return replace(result, surveyed=planner.surveyed)
    finally:
        source.close()


def result_of(path: Path, spec: ModelSpec, source: ModelSpec, comparison: Comparison | None) -> Result:
    """Sizes and counts of a written file."""
    dense = sum(tensor.size for tensor in content_tensors(source))
    cores = sum(any(term.kind == "mpo" for term in linear.terms) for linear in spec.linears)
    return Result(path, spec, source, path.stat().st_size, dense, cores, comparison)


def planner_for(
    source: Checkpoint,
    calibration: TokenText | None,
    windows: int,
    folder: Path,
    surveyed: Survey | None = None,
    progress: Progress = silent,
    tell: Tell = untold,
) -> Planner:
    """What plans of a source are made from; activations are spilled to `folder`."""
    walk = None
    if calibration is not None:
        require_finite_weights(source, source.folder.name)
        walk = Calibration(source, cut_calibration(calibration, source.architecture, count=windows), folder)
    return Planner(source, calibration, walk, progress, tell, surveyed)


def planned_spec(
    planner: Planner,
    options: Options,
    revision: str | None,
    layers: tuple[LinearSpec, ...] | None = None,
    later: Mapping[str, str] | None = None,
) -> ModelSpec:
    """The spec of the file to write, complete before anything is fitted; `layers` take the place of the plan's.

    Args:
        later: what a later stage will add to the provenance: a target in bytes leaves room for it.
    """
    spec = file_spec(planner.source, options, revision, planner.text)
    if layers is None:
        longest = replace(spec.provenance, options={**spec.provenance.options, **(later or {})})
        layers = planner.layers(replace(spec, provenance=longest), within_kl(planner, options))
    return replace(spec, linears=layers)


def method_of(options: Options) -> Method:
    """How a plan's terms are fitted: key projections may keep their matrix's norm."""
    return Method(norm=options.plan == "k-proj" and options.keys.norm)


def require_folder(target: Path) -> None:
    """Raises OutputError where the folder of the file to write is missing: calibration spills there before."""
    if not target.parent.is_dir():
        raise OutputError(f"{target}: cannot write (No such file or directory); give another folder with --out")


def file_spec(source: Checkpoint, options: Options, revision: str | None, calibration: TokenText | None) -> ModelSpec:
    """The spec of the file to write, its layers still the source's: vectors, files and provenance."""
    from mpo_runtime import __version__

    chosen = options.recorded()
    if calibration is not None:
        chosen["calibration"] = calibration.name
    provenance = Provenance(
        source=source.folder.name,
        revision=revision,
        source_sha256=source.sha256(),
        exporter=f"mpo-runtime {__version__}",
        options=chosen,
        calibration_sha256=None if calibration is None else calibration.sha256,
    )
    return replace(source.spec, provenance=provenance)


def measure_file(
    path: Path, chi: int | None, dense: Decoder, text: TokenText, device: str, progress: Progress
) -> Comparison:
    """Compares a written file, or its prefix at χ = `chi`, with its dense source on held-out text."""
    stage = "measuring" if chi is None else f"measuring χ={chi}"
    with MpoFile(path) as file:
        ours = decoder_for(file.spec.architecture, ReferenceOps(file, chi=chi, device=device))
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
