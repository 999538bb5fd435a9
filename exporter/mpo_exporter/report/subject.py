"""The plain facts of a file: what it is, how large, on what machine it is measured, and the sizes that are known."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

from mpo_exporter.report.facts import Machine, Measured, Memory, Point, Ratios, Sizes, Speed, Subject, WithoutCores
from mpo_formats import Certificates, ModelSpec
from mpo_formats.layout import ELEMENTS, content_tensors, linear_bytes
from mpo_runtime import native
from mpo_runtime.cli.inspect import stored_parameters
from mpo_runtime.loading import choose_backend
from mpo_runtime.measure import Comparison
from mpo_runtime.text.token_text import TokenText

PROCESSORS = Path("/proc/cpuinfo")


def dense_bytes(source: ModelSpec, most: int) -> int:
    """Bytes of a dense model's tensors and files, with at most `most` bytes for an element."""
    total = 0
    for tensor in content_tensors(source):
        width = ELEMENTS[tensor.dtype][1]
        total += tensor.size * min(width, most) // width
    return total


def subject_of(spec: ModelSpec, file: Path, name: str) -> Subject:
    """Names and origins of a file."""
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


def sizes_of(spec: ModelSpec, source: ModelSpec, file_bytes: int) -> Sizes:
    """Sizes before and after."""
    parameters = source.architecture.parameters()
    before = dense_bytes(source, 2)
    return Sizes(
        dense_parameters=parameters,
        parameters=stored_parameters(spec),
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


def measured(found: Comparison, text: TokenText) -> Measured:
    """A comparison as it is reported."""
    return Measured(
        text=text.name,
        text_sha256=text.sha256,
        tokens=int(text.ids.size),
        window=found.model.window,
        dense_perplexity=found.reference.perplexity,
        dense_error=found.reference.error,
        perplexity=found.model.perplexity,
        error=found.model.error,
        kl_mean=found.kl_mean,
        kl_999=found.kl_999,
        same_top1=found.same_top1,
        cosine=found.cosine,
        mse=found.mse,
    )


def points_of(
    spec: ModelSpec,
    sizes: Sizes,
    quality: Measured,
    certificates: Certificates,
    plain: WithoutCores | None,
    earlier: Sequence[Point],
) -> tuple[Point, ...]:
    """All sizes whose quality is known on the same tokens of the same text, the largest first."""
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
    """The processor's name as the system tells it."""
    if PROCESSORS.exists():
        for line in PROCESSORS.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
