"""What a plan is expected to give, before anything is fitted: bytes, memory, KL, speed and the time of the export.

Bytes are exact. The KL is the survey's expected loss, corrected by what earlier exports of the model measured; speed is
from the latency table, memory and time from small pieces timed on this machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mpo_exporter.measure.cache import Kept, Shelf
from mpo_exporter.measure.expected import total_loss
from mpo_exporter.measure.latency import keep_table, open_table
from mpo_exporter.measure.timings import PASSES, base_memory, fit_seconds, keep_rates, open_rates, run_seconds
from mpo_exporter.plan.budget import file_bytes
from mpo_exporter.plan.named import Options
from mpo_exporter.plan.planner import Planner
from mpo_formats import Architecture, ModelSpec
from mpo_runtime import native
from mpo_runtime.engine import default_context

# Losses add up while they are small; a sum above this is known to be too large by far and only says "very bad".
MOST_NATS = 1.0
KV_BYTES = 4  # the cache's default type is f32
MOST_OUTCOMES = 64
# Turns in which the correction and the loss that it leads to settle.
FIXED_POINT_TURNS = 4


@dataclass(frozen=True, slots=True)
class Prediction:
    """What to expect of a plan; None where there is nothing measured to tell it from, and `reasons` says why.

    `memory_bytes` is the resident memory of a chat with a full context of `context` tokens; `kl` in nats a token.
    """

    file_bytes: int
    memory_bytes: int
    context: int
    kl: float | None
    tokens_per_second: float | None
    export_seconds: float
    reasons: tuple[str, ...]


def predict(planner: Planner, spec: ModelSpec, measured_tokens: int = 0) -> Prediction:
    """Predicts what exporting `spec` will give.

    Args:
        measured_tokens: that the result is to be measured on.
    """
    reasons: list[str] = []
    rates = open_rates(planner.tell)
    size, context = file_bytes(spec), default_context(spec.architecture, None)
    memory = size + cache_bytes(spec.architecture, context) + base_memory(rates)
    kl = predicted_kl(planner, spec, reasons)
    speed = predicted_speed(planner, spec, reasons)
    calibrated = planner.walk is not None
    seconds = fit_seconds(spec, calibrated, rates)
    parameters = spec.architecture.parameters()
    if planner.walk is not None:
        seconds += run_seconds(parameters, planner.walk.windows.size, PASSES, rates)
    seconds += run_seconds(parameters, measured_tokens, 2, rates)
    keep_rates(rates, planner.tell)
    return Prediction(size, memory, context, kl, speed, seconds, tuple(reasons))


def cache_bytes(architecture: Architecture, context: int) -> int:
    """Bytes of a KV cache for one conversation."""
    heads = architecture.num_key_value_heads * architecture.head_dim
    return 2 * architecture.num_hidden_layers * heads * context * KV_BYTES


def predicted_kl(planner: Planner, spec: ModelSpec, reasons: list[str]) -> float | None:
    """Expected KL in nats a token; None, with the reason, where the plan is not fitted to what the survey measured."""
    if planner.walk is None:
        reasons.append("KL: not predicted for a plan that is fitted to the weights alone; give --calib")
        return None
    expected = total_loss(planner.survey(), spec.linears)
    if expected is None:
        reasons.append("KL: not predicted: the plan has sums of terms that the survey did not measure")
        return None
    if expected > MOST_NATS:
        reasons.append(
            f"KL: losses do not add up beyond {MOST_NATS:g}; expect a model that hardly works before healing"
        )
    return expected * correction(planner, expected)


def predicted_speed(planner: Planner, spec: ModelSpec, reasons: list[str]) -> float | None:
    """Decoded tokens a second in one conversation, with the kernels and threads at hand."""
    if not native.available():
        reasons.append("tokens/s: not predicted: there are no native kernels here")
        return None
    table = open_table(spec, progress=planner.progress, tell=planner.tell)
    seconds = table.token(spec)
    keep_table(table, planner.tell)
    return 1 / seconds


def outcomes_shelf(planner: Planner) -> Shelf | None:
    """Where the measured KL of earlier exports of this model is kept; None without calibration text."""
    if planner.text is None or planner.walk is None:
        return None
    key = {"version": 1, "windows": list(planner.walk.windows.shape)}
    parts = (planner.source.sha256(), planner.text.sha256)
    return Shelf("outcomes", planner.source.folder.resolve().name, parts, key)


def correction(planner: Planner, expected: float) -> float:
    """Measured over expected KL of the earlier export whose expected KL is nearest; 1 where there was none."""
    shelf = outcomes_shelf(planner)
    kept = shelf.read() if shelf else None
    pairs = [] if kept is None else [(one, kl) for one, kl in kept.content if one > 0 and kl > 0]
    if not pairs or expected <= 0:
        return 1.0
    nearest = min(pairs, key=lambda pair: abs(math.log(pair[0] / expected)))
    return float(nearest[1] / nearest[0])


def remember(planner: Planner, spec: ModelSpec, kl: float) -> None:
    """Keeps what an export measured beside what the survey expected of it, for later predictions."""
    shelf = outcomes_shelf(planner)
    if shelf is None or planner.surveyed is None:
        return
    expected = total_loss(planner.surveyed, spec.linears)
    if not expected or not kl > 0 or expected > MOST_NATS:
        return
    kept = shelf.read()
    rows = [] if kept is None else kept.content
    shelf.write(Kept([*rows, [expected, kl]][-MOST_OUTCOMES:]))


def within_kl(planner: Planner, options: Options) -> Options:
    """The options with `max_kl` in the survey's terms: what the correction makes of the survey's loss is to stay below."""
    if options.max_kl is None:
        return options
    # What earlier exports near the planned loss, not near the measured one, were off by.
    factor = correction(planner, options.max_kl)
    for _ in range(FIXED_POINT_TURNS):
        factor = max(factor, correction(planner, options.max_kl / factor))
    return replace(options, max_kl=options.max_kl / factor)
