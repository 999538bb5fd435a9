"""The same bytes without cores: integers allocated by the survey, fitted and measured as the file was."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mpo_exporter.calibrate.moments import Calibration
from mpo_exporter.calibrate.windows import WINDOW, cut_calibration
from mpo_exporter.export import export, measure_file
from mpo_exporter.measure.survey import Survey, stored_bytes, survey
from mpo_exporter.plan.allocate import descend_hulls, front
from mpo_exporter.plan.budget import allocated_layers
from mpo_exporter.plan.named import Options
from mpo_exporter.progress import Progress
from mpo_exporter.report.facts import Predicted, WithoutCores
from mpo_exporter.terms import Candidate
from mpo_formats import ModelSpec
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint

# Weights times calibration tokens up to which the alternative is fitted if the user says nothing.
BUDGET = 5e11
CURVE_POINTS = 24


def affordable(spec: ModelSpec, windows: int) -> bool:
    """Whether fitting the model once more stays within the budget."""
    return spec.architecture.parameters() * windows * WINDOW <= BUDGET


def without_cores(
    source: Checkpoint,
    spec: ModelSpec,
    file_bytes: int,
    text: TokenText,
    calibration: TokenText,
    windows: int,
    surveyed: Survey | None,
    folder: Path,
    device: str,
    progress: Progress,
) -> WithoutCores:
    """Fits and measures integers alone in at most `file_bytes`.

    Args:
        spec: of the file with cores.
        surveyed: a survey of this source, in the place of a new one.
        folder: where the file lies for a while.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="without-cores-", dir=folder) as work:
        target = Path(work) / "without-cores.mpo"
        if surveyed is None:
            walk = Calibration(source, cut_calibration(calibration, source.architecture, count=windows), Path(work))
            surveyed = survey(source, walk, progress=progress)
        integers = {name: without_operators(row) for name, row in surveyed.candidates.items()}
        layers = allocated_layers(spec, integers, file_bytes)
        result = export(
            source.folder,
            target,
            Options("int4"),
            calibration=calibration,
            windows=windows,
            layers=layers,
            surveyed=surveyed,
            device=device,
            progress=progress,
        )
        dense = decoder_for(source.architecture, ReferenceOps(source, device=device))
        found = measure_file(target, None, dense, text, device, progress)
    return WithoutCores(
        file_bytes=result.file_bytes,
        perplexity=found.model.perplexity,
        error=found.model.error,
        kl_mean=found.kl_mean,
        kl_999=found.kl_999,
        same_top1=found.same_top1,
        seconds=time.perf_counter() - start,
    )


def without_operators(row: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that have no cores."""
    return [one for one in row if not any(term.kind == "mpo" for term in one.terms)]


def predicted_curve(surveyed: Survey, spec: ModelSpec, file_bytes: int) -> tuple[Predicted, ...]:
    """The loss that the survey expects of its best plans of integers, over sizes of the whole file, the smallest first."""
    fronts = {name: front(without_operators(row)) for name, row in surveyed.candidates.items()}
    least = sum(row[0].bytes for row in fronts.values())
    most = sum(row[-1].bytes for row in fronts.values())
    rest = file_bytes - sum(stored_bytes(linear) for linear in spec.linears)
    found: list[Predicted] = []
    for number in range(CURVE_POINTS):
        budget = round(least * (most / least) ** (number / (CURVE_POINTS - 1)))
        chosen = descend_hulls(fronts, budget).values()
        size = rest + sum(one.bytes for one in chosen)
        if not found or size > found[-1].bytes:
            found.append(Predicted(size, sum(one.loss for one in chosen)))
    return tuple(found)
