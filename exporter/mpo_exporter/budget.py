"""A plan for a file of a given size: the survey's candidates, chosen so that the whole file fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mpo_exporter.allocate import Candidate, choose
from mpo_formats import LinearSpec, ModelSpec, PlanError, container
from mpo_formats.layout import file_tensors
from mpo_formats.writer import spec_metadata

# The header's length depends a little on the plan, so a budget may have to be lowered by what it grew.
ATTEMPTS = 32


def file_bytes(spec: ModelSpec) -> int:
    """Bytes of the whole file that a spec demands: header, tensors, padding, certificate and checksums."""
    tensors = file_tensors(spec)
    return len(container.write_header(spec_metadata(spec), tensors)) + sum(tensor.size for tensor in tensors)


def allocated_layers(
    spec: ModelSpec, candidates: Mapping[str, Sequence[Candidate]], target_bytes: int
) -> tuple[LinearSpec, ...]:
    """The layers of a file of at most `target_bytes`, its header and embedded files included.

    Args:
        spec: of the file, with any terms.

    Raises:
        PlanError: when even the smallest candidates make a larger file.
    """
    smallest = with_choice(spec, {name: min(row, key=lambda one: one.bytes) for name, row in candidates.items()})
    least = file_bytes(smallest)
    if least > target_bytes:
        raise PlanError(f"target: {target_bytes:,} bytes are too few, the smallest file of this model takes {least:,}; "
                        "give a larger target")  # fmt: skip
    floor = sum(min(one.bytes for one in row) for row in candidates.values())
    budget = floor + target_bytes - least
    for attempt in range(ATTEMPTS):
        planned = with_choice(spec, choose(candidates, max(budget, floor)))
        surplus = file_bytes(planned) - target_bytes
        if surplus <= 0:
            return planned.linears
        budget -= surplus + 64 * attempt  # a little more each time: another plan may have a longer header again
    return smallest.linears


def with_choice(spec: ModelSpec, chosen: Mapping[str, Candidate]) -> ModelSpec:
    """The spec with every layer's terms replaced by the chosen ones."""
    return replace(spec, linears=tuple(replace(linear, terms=chosen[linear.name].terms) for linear in spec.linears))
