"""Prints a plan and what it is expected to give, before any work is done."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from mpo_exporter.measure.expected import layer_loss
from mpo_exporter.measure.survey import Survey, stored_bytes
from mpo_exporter.plan.predict import Prediction
from mpo_formats import ModelSpec
from mpo_runtime.cli.console import size_text
from mpo_runtime.cli.inspect import layer_text


def print_plan(spec: ModelSpec, prediction: Prediction, surveyed: Survey | None) -> None:
    """Prints every layer's terms, and the predictions for the whole."""
    table = Table("layer", "terms", "bytes", "bits", "expected KL")
    table.columns[0].no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for linear in spec.linears:
        size = stored_bytes(linear)
        loss = None if surveyed is None else layer_loss(surveyed, linear)
        table.add_row(
            linear.name.removeprefix("model.").removeprefix("layers."),
            layer_text(linear),
            f"{size:,}",
            f"{8 * size / (linear.out_features * linear.in_features):.2f}",
            "" if loss is None else f"{loss:.2g}",
        )
    console = Console(highlight=False)
    console.print(table)
    for line in prediction_lines(spec, prediction):
        console.print(line)


def prediction_lines(spec: ModelSpec, prediction: Prediction) -> list[str]:
    """The predictions in words."""
    size = prediction.file_bytes
    parameters = spec.architecture.parameters()
    unknown = "unknown"
    kl = unknown if prediction.kl is None else f"{prediction.kl:.4f} nats a token"
    speed = unknown if prediction.tokens_per_second is None else f"{prediction.tokens_per_second:.4g} tokens/s"
    cores = sum(any(term.kind == "mpo" for term in linear.terms) for linear in spec.linears)
    return [
        f"predicted bytes: {size:,} ({size_text(size)}, {8 * size / parameters:.2f} bits per weight)",
        f"predicted memory: {size_text(prediction.memory_bytes)} with a full context of {prediction.context:,} tokens",
        f"predicted KL: {kl}",
        f"predicted speed: {speed}, one conversation, on this machine",
        f"predicted time of the export: {time_text(prediction.export_seconds)}",
        f"layers with cores: {cores} of {len(spec.linears)}",
        *prediction.reasons,
    ]


def time_text(seconds: float) -> str:
    """Seconds as a reader wants them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
