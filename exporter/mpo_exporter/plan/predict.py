"""Predictions for a plan before anything is fitted: bytes, memory, KL, speed and the time of the export.

Bytes are exact. The KL is the survey's expected loss, corrected by what earlier exports of the model measured. The speed
comes from the latency table, memory and time from small pieces timed on this machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mpo_exporter.calibrate.windows import WINDOW
from mpo_exporter.effort import EFFORTS, NORMAL, Effort
from mpo_exporter.measure.cache import Cached, CacheFile
from mpo_exporter.measure.cost import Cost, export_cost, measured_rates
from mpo_exporter.measure.latency import open_table, save_table
from mpo_exporter.measure.timings import base_memory, fit_seconds, open_rates, save_rates
from mpo_exporter.plan.budget import file_bytes
from mpo_exporter.plan.options import Options, Target
from mpo_exporter.plan.planner import Planner
from mpo_formats import Architecture, ModelSpec
from mpo_formats.layout import content_tensors
from mpo_runtime import native
from mpo_runtime.engine import default_context

# Losses of layers add up while they are small; a sum above this is far too large and only says "very bad".
MOST_NATS = 1.0
# Bytes of an element of the KV cache, whose default type is f32.
KV_BYTES = 4
# Outcomes of exports of one model that are cached at most.
MOST_OUTCOMES = 64
# Rounds in which the correction and the loss that it is looked up for settle.
FIXED_POINT_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predictions for a plan.

    Args:
        memory_bytes: the resident memory of a chat with a full context of `context` tokens.
        kl: in nats per token; None, like `tokens_per_second`, if it cannot be predicted.
        costs: what the export takes, by effort.
        reasons: sentences that say why a prediction is missing or not to be trusted.
    """

    file_bytes: int
    memory_bytes: int
    context: int
    kl: float | None
    tokens_per_second: float | None
    costs: dict[str, Cost]
    reasons: tuple[str, ...]


def predict(
    planner: Planner, spec: ModelSpec, measured_tokens: int = 0, effort: Effort = NORMAL, window: int = WINDOW
) -> Prediction:
    """Predicts what exporting `spec` will give.

    Args:
        effort: the one that was asked for; its windows are those of the planner's text.
        window: tokens of a window of calibration text.
        measured_tokens: tokens that the file will be measured on.
    """
    reasons: list[str] = []
    rates = open_rates(planner.log)
    size, context = file_bytes(spec), default_context(spec.architecture, None)
    memory = size + cache_bytes(spec.architecture, context) + base_memory(rates)
    kl = predicted_kl(planner, spec, reasons)
    speed = predicted_speed(planner, spec, reasons)
    source_bytes = sum(tensor.size for tensor in content_tensors(planner.source.spec))
    machine = measured_rates(spec.architecture)
    costs = {}
    for name, usual in EFFORTS.items():
        each = usual.suited(spec.architecture.parameters())
        calibrated = each.windows > 0 and (planner.walk is not None or effort.windows == 0)
        windows = len(planner.walk.windows) if calibrated and planner.walk and each == effort else each.windows
        cost = export_cost(
            spec.architecture,
            machine,
            each,
            windows=windows if calibrated else 0,
            window=window,
            file_bytes=size,
            source_bytes=source_bytes,
            measured_tokens=measured_tokens,
            surveyed=planner.surveyed is not None,
        )
        cores = fit_seconds(spec, calibrated, rates)
        costs[name] = replace(cost, stages=cost.stages | {"fitting": cost.stages["fitting"] + cores})
    save_rates(rates, planner.log)
    return Prediction(size, memory, context, kl, speed, costs, tuple(reasons))


def cache_bytes(architecture: Architecture, context: int) -> int:
    """Bytes of a KV cache for one conversation."""
    heads = architecture.num_key_value_heads * architecture.head_dim
    return 2 * architecture.num_hidden_layers * heads * context * KV_BYTES


def predicted_kl(planner: Planner, spec: ModelSpec, reasons: list[str]) -> float | None:
    """The expected KL in nats per token; None, with a reason added, if the survey does not cover the plan."""
    if planner.blind:
        reasons.append("KL: not predicted with --effort quick, which judges layers by their weights alone")
        return None
    if planner.walk is None:
        reasons.append("KL: not predicted for a plan that is fitted to the weights alone; give --calib")
        return None
    surveyed = planner.survey(complete=False)
    if not all(any(one.describes(linear) for one in surveyed.candidates[linear.name]) for linear in spec.linears):
        surveyed = planner.survey()
    expected = surveyed.total_loss(spec.linears)
    if expected is None:
        reasons.append("KL: not predicted: the plan has sums of terms that the survey did not measure")
        return None
    if expected > MOST_NATS:
        reasons.append(
            f"KL: losses do not add up beyond {MOST_NATS:g}; expect a model that hardly works before healing"
        )
    return expected * correction(planner, expected)


def predicted_speed(planner: Planner, spec: ModelSpec, reasons: list[str]) -> float | None:
    """Decoded tokens per second in one conversation, with the kernels and threads of this process."""
    if not native.available():
        reasons.append("tokens/s: not predicted: there are no native kernels here")
        return None
    table = open_table(spec, progress=planner.progress, log=planner.log)
    seconds = table.token(spec)
    save_table(table, planner.log)
    return 1 / seconds


def outcomes_file(planner: Planner) -> CacheFile | None:
    """The cache file of the KL that earlier exports of this model had; None without calibration text."""
    if planner.text is None or planner.walk is None:
        return None
    key = {"version": 1, "windows": list(planner.walk.windows.shape)}
    parts = (planner.source.sha256(), planner.text.sha256)
    return CacheFile("outcomes", planner.source.folder.resolve().name, parts, key)


def correction(planner: Planner, expected: float) -> float:
    """The measured over the expected KL of the earlier export whose expected KL is nearest; 1 if there was none."""
    file = outcomes_file(planner)
    cached = file.read() if file else None
    pairs = [] if cached is None else [(one, kl) for one, kl in cached.content if one > 0 and kl > 0]
    if not pairs or expected <= 0:
        return 1.0
    nearest = min(pairs, key=lambda pair: abs(math.log(pair[0] / expected)))
    return float(nearest[1] / nearest[0])


def record_outcome(planner: Planner, spec: ModelSpec, kl: float) -> None:
    """Caches the KL that an export measured beside the expected one, for later predictions."""
    file = outcomes_file(planner)
    if file is None or planner.surveyed is None:
        return
    expected = planner.surveyed.total_loss(spec.linears)
    if not expected or not kl > 0 or expected > MOST_NATS:
        return
    cached = file.read()
    rows = [] if cached is None else cached.content
    file.write(Cached([*rows, [expected, kl]][-MOST_OUTCOMES:]))


def within_kl(planner: Planner, options: Options) -> Options:
    """The options with the target KL divided by the correction, so that it bounds the survey's expected loss."""
    wanted = options.target.max_kl
    if wanted is None:
        return options
    # The correction is that of earlier exports near the planned loss, not near the measured one.
    factor = correction(planner, wanted)
    for _ in range(FIXED_POINT_ROUNDS):
        factor = max(factor, correction(planner, wanted / factor))
    return replace(options, target=Target(max_kl=wanted / factor))
