"""A plan for a file of a given size: candidates chosen so that the whole file fits.

The length of the header depends on the plan. So every candidate is charged an estimate of what it adds there, and a search
over the bytes that the layers may take corrects the error of the estimates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mpo_exporter.plan.allocate import choose, front
from mpo_exporter.terms import Candidate, fitting_group, stored_bytes
from mpo_formats import LinearSpec, ModelSpec, PlanError, container
from mpo_formats.codec import to_json
from mpo_formats.layout import DIGEST_SIZE, PADDING, file_tensors, linear_tensors
from mpo_formats.spec import GROUPS
from mpo_formats.writer import spec_metadata

Candidates = Mapping[str, Sequence[Candidate]]
# If the user names no target: bits of the whole file per weight, or more if the expected KL, in nats per token, is larger.
DEFAULT_BITS = 4.25
DEFAULT_KL = 0.03
# A model counts as small if its header, tokenizer and certificate take more than this share of the default target.
SMALL_SHARE = 1 / 4
# No layer gets less than this share of the average bits: predicted losses are least reliable there (docs/method.md, Allocation).
FLOOR = 1 / 2
# Plans that are tried at most.
ATTEMPTS = 40
# A plan that leaves less than this share of the target unused is good enough.
SLACK = 1 / 2000
# Bytes that are tried on top of those that the charges allow, since charges are estimates.
MARGINS = (64, 192, 448)
# Bytes of one tensor's entry in the header besides its name and shape, and the precision of a target for `--max-kl`.
ENTRY = 60
PRECISION = 1 / 500


def file_bytes(spec: ModelSpec) -> int:
    """Bytes of the whole file of a spec: header, tensors, padding, certificate and checksums."""
    tensors = file_tensors(spec)
    return len(container.write_header(spec_metadata(spec), tensors)) + sum(tensor.size for tensor in tensors)


def default_bytes(spec: ModelSpec) -> int:
    """The least size if the user names no target: 4.25 bits of the whole file per weight of the model.

    If header, tokenizer, norms and certificate take more than a quarter of that, they are added on top. Layers whose rows
    no group divides stay dense, and count with their dense size.
    """
    wanted = int(DEFAULT_BITS * spec.architecture.parameters() / 8)
    for linear in spec.linears:
        if fitting_group(linear.in_features, max(GROUPS)) is None:
            weights = linear.out_features * linear.in_features
            wanted += 2 * weights - int(DEFAULT_BITS * weights / 8)
    fixed = file_bytes(spec) - sum(stored_bytes(linear) for linear in spec.linears)
    return wanted if fixed <= SMALL_SHARE * wanted else wanted + fixed


def least_bytes(spec: ModelSpec, candidates: Candidates) -> int:
    """The size of the smallest file that can be made of the candidates."""
    return file_bytes(
        with_choice(spec, {name: min(row, key=lambda one: one.bytes) for name, row in candidates.items()})
    )


def charged_rows(spec: ModelSpec, candidates: Candidates) -> dict[str, list[Candidate]]:
    """The candidates of every layer that no other one beats, each with its `charge`."""
    return {linear.name: [charge(linear, one) for one in front(candidates[linear.name])] for linear in spec.linears}


def allocated_layers(
    spec: ModelSpec, candidates: Candidates, target_bytes: int, charged: Candidates | None = None
) -> tuple[LinearSpec, ...]:
    """The layers of a file of at most `target_bytes`, header and embedded files included, and hardly less.

    Args:
        spec: of the file to write, with any terms.
        charged: the `charged_rows` of these, if they were computed before.

    Raises:
        PlanError: when even the smallest candidates make a larger file.
    """
    least = least_bytes(spec, candidates)
    if least > target_bytes:
        raise PlanError(
            f"target: {target_bytes:,} bytes are too few, the smallest file of this model takes {least:,}; "
            "give a larger target"
        )
    charged = charged_rows(spec, candidates) if charged is None else charged
    weights = {linear.name: linear.out_features * linear.in_features for linear in spec.linears}
    low = sum(min(one.bytes for one in row) for row in charged.values())
    high, budget = target_bytes, low + target_bytes - least
    best = with_choice(spec, {name: min(row, key=lambda one: one.bytes) for name, row in charged.items()})
    most, before = 0, best

    def planned_within(budget: int) -> tuple[ModelSpec, int]:
        planned = with_choice(spec, choose(floored(charged, weights, budget), budget))
        return planned, file_bytes(planned)

    for _ in range(ATTEMPTS):
        planned, size = planned_within(budget)
        left = target_bytes - size
        if left < 0:
            high = budget
            if planned == before:  # choices are coarse: go below the charges of this plan to get another one
                high = budget = min(budget, charged_bytes(planned, charged))
            before = planned
        else:
            low = max(low, budget)
            best, most = (planned, size) if size > most else (best, most)
        if 0 <= left <= SLACK * target_bytes or high - low < ENTRY:
            break
        budget = budget + left if low < budget + left < high else (low + high) // 2
    # Charges are off by some bytes: a plan that just does not fit by them may still fit the file, and lose less.
    tries = [planned_within(low + extra) for extra in MARGINS]
    fitting = [best, *(planned for planned, size in tries if most <= size <= target_bytes)]
    return min(fitting, key=lambda planned: expected_loss(planned.linears, candidates) or 0.0).linears


def charged_bytes(planned: ModelSpec, charged: Candidates) -> int:
    """The charged bytes of a plan's layers."""
    return sum(next(one.bytes for one in charged[linear.name] if one.describes(linear)) for linear in planned.linears)


def charge(linear: LinearSpec, candidate: Candidate) -> Candidate:
    """The candidate with the bytes that it is expected to add to header and checksums counted in."""
    built = candidate.stored(linear)
    entries = 0
    for tensor in linear_tensors(built):
        entries += ENTRY + len(tensor.name) + len(str(tensor.shape)) + DIGEST_SIZE
        entries += ENTRY + len(PADDING) + DIGEST_SIZE if tensor.padding else 0
    return replace(candidate, bytes=candidate.bytes + entries + len(to_json(built)))


def floored(candidates: Candidates, weights: Mapping[str, int], budget: int) -> Candidates:
    """The candidates that give a layer at least half of the average bits per weight; if there is none, the layer's largest.

    If the smallest of these exceed the budget, all candidates unchanged.
    """
    share = FLOOR * budget / sum(weights.values())
    kept = {
        name: [one for one in row if one.bytes >= share * weights[name]] or [max(row, key=lambda one: one.bytes)]
        for name, row in candidates.items()
    }
    return kept if sum(min(one.bytes for one in row) for row in kept.values()) <= budget else candidates


def layers_within_loss(
    spec: ModelSpec, candidates: Candidates, most: float, charged: Candidates | None = None
) -> tuple[LinearSpec, ...]:
    """The layers of the smallest file with an expected loss of at most `most` nats per token, to 0.2 % of its bytes.

    Args:
        charged: as `allocated_layers` takes them.

    Raises:
        PlanError: if no plan reaches that loss.
    """
    largest = finest(candidates)
    least = sum(one.loss for one in largest.values())
    if least > most:
        raise PlanError(f"--max-kl {most:g}: the least that any plan of this model is expected to reach is {least:.4g}")
    best = with_choice(spec, largest).linears
    low, high = least_bytes(spec, candidates), file_bytes(with_choice(spec, largest))
    charged = charged_rows(spec, candidates) if charged is None else charged
    while high - low > PRECISION * high:
        middle = (low + high) // 2
        planned = allocated_layers(spec, candidates, middle, charged)
        if (found := expected_loss(planned, candidates)) is not None and found <= most:
            best, high = planned, middle
        else:
            low = middle
    smallest = allocated_layers(spec, candidates, low, charged)
    found = expected_loss(smallest, candidates)
    return smallest if found is not None and found <= most else best


def finest(candidates: Candidates) -> dict[str, Candidate]:
    """The candidate of least loss for every layer."""
    return {name: min(row, key=lambda one: (one.loss, one.bytes)) for name, row in candidates.items()}


@dataclass(frozen=True, slots=True)
class DefaultSize:
    """The size of a file for which the user named no target: the larger one of two.

    Args:
        bits, kl: the sizes in bytes by DEFAULT_BITS and by DEFAULT_KL.
        bits_loss: the expected KL at the size by DEFAULT_BITS; None where no plan is that small.
        kl_loss: the expected KL at the size by DEFAULT_KL; above it only where no plan is expected to reach it.
    """

    bits: int
    kl: int
    bits_loss: float | None
    kl_loss: float

    @property
    def size(self) -> int:
        """The larger size."""
        return max(self.bits, self.kl)

    def in_words(self) -> str:
        """Which size was taken, and what the other one would have given."""
        by_bits = f"{DEFAULT_BITS:g} bits per weight, {self.bits:,} bytes"
        at_bits = "no plan is that small" if self.bits_loss is None else f"an expected KL of {self.bits_loss:.2g}"
        if self.bits >= self.kl:
            other = f"an expected KL of {self.kl_loss:.2g} would take {self.kl:,} bytes"
            return f"no target was given: took {by_bits}, with {at_bits}; {other}"
        reached = f"the size with an expected KL of {self.kl_loss:.2g}, {self.kl:,} bytes"
        return f"no target was given: took {reached}; {by_bits}, would have given: {at_bits}"


def default_size(spec: ModelSpec, source: ModelSpec, candidates: Candidates) -> DefaultSize:
    """The sizes that are the default for a model, with their expected KL.

    Args:
        spec: of the file to write, with any terms.
        source: of the dense model.
    """
    bits = default_bytes(source)
    most = max(DEFAULT_KL, sum(one.loss for one in finest(candidates).values()))
    charged = charged_rows(spec, candidates)
    by_kl = layers_within_loss(spec, candidates, most, charged)
    bits_loss = None
    if bits >= least_bytes(spec, candidates):
        bits_loss = expected_loss(allocated_layers(spec, candidates, bits, charged), candidates)
    kl_loss = expected_loss(by_kl, candidates) or 0.0
    return DefaultSize(bits, file_bytes(replace(spec, linears=by_kl)), bits_loss, kl_loss)


def expected_loss(linears: Sequence[LinearSpec], candidates: Candidates) -> float | None:
    """The summed loss of layers in nats per token, None if one of them is not among the candidates."""
    total = 0.0
    for linear in linears:
        found = [one.loss for one in candidates[linear.name] if one.describes(linear)]
        if not found:
            return None
        total += found[0]
    return total


def with_choice(spec: ModelSpec, chosen: Mapping[str, Candidate]) -> ModelSpec:
    """The spec with every layer's terms replaced by the chosen ones."""
    return replace(spec, linears=tuple(chosen[linear.name].stored(linear) for linear in spec.linears))
