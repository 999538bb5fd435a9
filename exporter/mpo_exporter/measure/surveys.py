"""Surveys that are kept: a model is surveyed once on a calibration text, whatever budgets are planned from it."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict
from typing import Any

from mpo_exporter.calibrate.moments import Calibration
from mpo_exporter.measure.cache import Kept, Shelf, Tell, untold
from mpo_exporter.measure.survey import CORED, FISHER_WINDOWS, GRIDS, LADDER, Alone, Survey, survey
from mpo_exporter.progress import Progress, silent
from mpo_exporter.terms import Candidate
from mpo_formats import Dense, Mpo, Quantized, Term
from mpo_formats.codec import to_json
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint

# Changes whenever a survey of the same model and text would come out differently.
VERSION = 3


def survey_shelf(source: Checkpoint, walk: Calibration, text: TokenText) -> Shelf:
    """Where a survey is kept: by the digests of the model and of the calibration text."""
    key = {
        "version": VERSION,
        "architecture": hashlib.sha256(to_json(source.architecture).encode()).hexdigest(),
        "windows": list(walk.windows.shape),
        "tokens": hashlib.sha256(walk.windows.tobytes()).hexdigest(),
        "gradients": FISHER_WINDOWS,
        "grids": [[grid.bits, grid.group, grid.zeros] for grid in GRIDS],
        "cores": [[grid.bits, grid.group, grid.zeros] for grid in CORED],
        "bonds": list(LADDER),
    }
    return Shelf("survey", source.folder.resolve().name, (source.sha256(), text.sha256), key)


def kept_survey(
    source: Checkpoint, walk: Calibration, text: TokenText, *, progress: Progress = silent, tell: Tell = untold
) -> Survey:
    """The survey of a model on a calibration text: what is kept of it, or a new one, which is then kept.

    Raises:
        ConfigError: as `survey` does.
    """
    shelf = survey_shelf(source, walk, text)
    kept = shelf.read(tell)
    if kept is not None:
        tell(f"survey: measured before, read from {shelf.path.name}")
        return unpacked(kept)
    started = time.perf_counter()
    found = survey(source, walk, progress=progress)
    seconds = time.perf_counter() - started
    tell(f"survey: every layer measured in {seconds:.0f} s, kept for other budgets")
    shelf.write(packed(found, seconds), tell)
    return found


def packed(found: Survey, seconds: float) -> Kept:
    """A survey as plain data and one array."""
    rows = {
        name: [[one.bytes, one.loss, [asdict(term) for term in one.terms]] for one in row]
        for name, row in found.candidates.items()
    }
    alone = {name: asdict(one) for name, one in found.alone.items()}
    return Kept({"candidates": rows, "alone": alone, "seconds": seconds}, {"table": found.table.astype("float32")})


def unpacked(kept: Kept) -> Survey:
    """The survey that `packed` put away."""
    rows = {
        name: [Candidate(size, loss, tuple(map(plain_term, terms))) for size, loss, terms in row]
        for name, row in kept.content["candidates"].items()
    }
    alone = {
        name: Alone(*(pairs(one[kind]) for kind in ("low_rank", "balanced")))
        for name, one in kept.content["alone"].items()
    }
    return Survey(rows, kept.arrays["table"].astype("float64"), alone)


def pairs(rows: list[list[Any]]) -> tuple[tuple[int, float], ...]:
    """JSON's lists of two as tuples."""
    return tuple((chi, loss) for chi, loss in rows)


def plain_term(data: dict[str, Any]) -> Term:
    """A term of its fields as JSON has them; raises FormatError for values that are none."""
    kind = {"dense": Dense, "quantized": Quantized, "mpo": Mpo}[data["kind"]]
    built: Term = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})
    return built
