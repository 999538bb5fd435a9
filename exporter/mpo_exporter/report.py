"""The table after an export: what went in, what came out, what it cost."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from mpo_exporter.export import Result
from mpo_runtime.cli.console import size_text
from mpo_runtime.cli.inspect import stored_parameters
from mpo_runtime.texts import TokenText


def print_report(result: Result, text: TokenText | None, reason: str) -> None:
    """Prints sizes and quality before and after.

    Args:
        text: what was measured on, None where nothing was.
        reason: why nothing was measured.
    """
    dense_parameters = result.source.architecture.parameters()
    parameters = stored_parameters(result.spec)
    table = Table("", "dense", "compressed", "change")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("parameters", f"{dense_parameters:,}", f"{parameters:,}", change(parameters, dense_parameters))
    before, after = result.source_bytes, result.file_bytes
    table.add_row("file bytes", size_text(before), size_text(after), change(after, before))
    bits = before * 8 / dense_parameters
    table.add_row(
        "bits per weight", f"{bits:.2f}", f"{result.bits_per_weight:.2f}", change(result.bits_per_weight, bits)
    )
    if result.comparison:
        model, dense = result.comparison.model, result.comparison.reference
        table.add_row(
            "perplexity",
            f"{dense.perplexity:.2f} ± {dense.error:.2f}",
            f"{model.perplexity:.2f} ± {model.error:.2f}",
            change(model.perplexity, dense.perplexity),
        )
        table.add_row("KL to dense, mean", "0", f"{result.comparison.kl_mean:.4f}", "")
        table.add_row("KL to dense, 99.9 %", "0", f"{result.comparison.kl_999:.4f}", "")
        table.add_row("same top token", "100 %", f"{100 * result.comparison.same_top1:.1f} %", "")
    layers = len(result.spec.linears)
    table.add_row("layers with cores", "0", f"{result.core_layers} of {layers}", "")
    console = Console()
    console.print(table)
    if text and result.comparison:
        console.print(f"measured on the first {text.ids.size:,} tokens of {text.name}, held-out text; "
                      "nothing was trained or calibrated on it", highlight=False)  # fmt: skip
    else:
        console.print(f"quality was not measured: {reason}", highlight=False)
    console.print(f"wrote {result.path}; talk to it: mpo-run chat {result.path}", highlight=False)


def change(after: float, before: float) -> str:
    """The change in per cent."""
    return f"{100 * (after / before - 1):+.1f} %"
