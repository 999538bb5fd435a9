"""Sizes of a file and its dense model, and the points of the plot of quality against bytes."""

from __future__ import annotations

from collections.abc import Sequence

from mpo_exporter.measure.survey import Survey
from mpo_exporter.plan.allocate import descend_hulls, front
from mpo_exporter.report.facts import Measured, Memory, Point, Predicted, Ratios, Report, Sizes, Speed, WithoutCores
from mpo_exporter.terms import stored_bytes, without_operators
from mpo_formats import Certificates, ModelSpec
from mpo_formats.layout import ELEMENTS, content_tensors, linear_bytes

# Points of the curve that the survey predicts.
CURVE_POINTS = 24


def dense_bytes(source: ModelSpec, most: int) -> int:
    """Bytes of a dense model's tensors and files, counting at most `most` bytes for an element."""
    total = 0
    for tensor in content_tensors(source):
        width = ELEMENTS[tensor.dtype][1]
        total += tensor.size * min(width, most) // width
    return total


def sizes_of(spec: ModelSpec, source: ModelSpec, file_bytes: int) -> Sizes:
    """The sizes of a file and of the dense model that it was made from."""
    parameters = source.architecture.parameters()
    before = dense_bytes(source, 2)
    return Sizes(
        dense_parameters=parameters,
        parameters=spec.stored_parameters(),
        dense_bytes=before,
        source_bytes=dense_bytes(source, 4),
        file_bytes=file_bytes,
        dense_bits_per_weight=before * 8 / parameters,
        bits_per_weight=file_bytes * 8 / parameters,
    )


def ratios_of(sizes: Sizes, speed: Speed | None, memory: Memory | None) -> Ratios:
    """The four ratios, compressed over dense."""
    return Ratios(
        parameters=sizes.parameters / sizes.dense_parameters,
        bytes=sizes.file_bytes / sizes.dense_bytes,
        memory=memory.peak / memory.dense_peak if memory else None,
        speed=speed.median / speed.dense_median if speed else None,
    )


def points_of(
    spec: ModelSpec,
    sizes: Sizes,
    quality: Measured,
    certificates: Certificates,
    plain: WithoutCores | None,
    earlier: Sequence[Point],
) -> tuple[Point, ...]:
    """The points of the plot, all measured on the same tokens, the largest size first.

    Args:
        certificates: of the file; prefixes that were measured on other tokens are left out.
        plain: the file of the same size without cores.
        earlier: points of earlier reports; those that are known already are left out.
    """
    points = [
        Point("dense", "dense bf16", sizes.dense_bytes, 0.0, quality.dense_perplexity),
        Point("this file", "this file", sizes.file_bytes, quality.kl_mean, quality.perplexity),
    ]
    for entry in certificates.entries:
        found = entry.quality
        same = (found.text_sha256, found.tokens) == (quality.text_sha256, quality.tokens)
        if entry.chi is not None and same:
            size = sizes.file_bytes - sum(
                linear_bytes(linear) - linear_bytes(linear.truncated(entry.chi)) for linear in spec.linears
            )
            points.append(Point("prefix", f"χ = {entry.chi}", size, found.kl_mean, found.perplexity))
    if plain:
        points.append(Point("without cores", "same bytes, no cores", plain.file_bytes, plain.kl_mean, plain.perplexity))
    known = {(point.bytes, point.kl_mean) for point in points}
    points += [point for point in earlier if (point.bytes, point.kl_mean) not in known]
    return tuple(sorted(points, key=lambda point: -point.bytes))


def earlier_points(earlier: Report | None, quality: Measured, source_sha256: str) -> list[Point]:
    """The points of an earlier report, if it is about the same dense model and was measured on the same tokens."""
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


def predicted_curve(surveyed: Survey, spec: ModelSpec, file_bytes: int) -> tuple[Predicted, ...]:
    """The loss that the survey expects of its best plans of integers, for several sizes of the whole file, increasing.

    Args:
        spec, file_bytes: of the file that is reported on.
    """
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
