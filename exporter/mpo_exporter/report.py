"""The table after an export: what went in, what came out, what it cost."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from mpo_exporter.export import Result
from mpo_exporter.heal.run import Healed
from mpo_runtime.cli.console import size_text
from mpo_runtime.cli.inspect import stored_parameters
from mpo_runtime.texts import TokenText


def print_report(result: Result, text: TokenText | None, reason: str, healed: Healed | None = None) -> None:
    """Prints sizes and quality before and after, and after healing where there was one.

    Args:
        text: what was measured on, None where nothing was.
        reason: why nothing was measured.
    """
    again = [] if healed is None else ["healed"]
    dense_parameters = result.source.architecture.parameters()
    parameters = stored_parameters(result.spec)
    table = Table("", "dense", "compressed", *again, "change")
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, dense: str, ours: str, change: str = "", healed: str | None = None) -> None:
        table.add_row(name, dense, ours, *([healed or ours] if again else []), change)

    row("parameters", f"{dense_parameters:,}", f"{parameters:,}", change(parameters, dense_parameters))
    before, after = result.source_bytes, result.file_bytes
    row("file bytes", size_text(before), size_text(after), change(after, before))
    bits = before * 8 / dense_parameters
    row("bits per weight", f"{bits:.2f}", f"{result.bits_per_weight:.2f}", change(result.bits_per_weight, bits))
    if result.comparison:
        found = (result.comparison, (healed and healed.comparison) or result.comparison)
        dense = result.comparison.reference
        ours = [f"{one.model.perplexity:.2f} ± {one.model.error:.2f}" for one in found]
        last = found[-1].model.perplexity
        row(
            "perplexity",
            f"{dense.perplexity:.2f} ± {dense.error:.2f}",
            ours[0],
            change(last, dense.perplexity),
            ours[1],
        )
        for name, field in (("mean", "kl_mean"), ("99.9 %", "kl_999")):
            ours = [f"{getattr(one, field):.4f}" for one in found]
            row(f"KL to dense, {name}", "0", ours[0], "", ours[1])
        ours = [f"{100 * one.same_top1:.1f} %" for one in found]
        row("same top token", "100 %", ours[0], "", ours[1])
    layers = len(result.spec.linears)
    row("layers with cores", "0", f"{result.core_layers} of {layers}")
    console = Console()
    console.print(table)
    if text and result.comparison:
        console.print(f"measured on the first {text.ids.size:,} tokens of {text.name}, held-out text; "
                      "nothing was trained or calibrated on it", highlight=False)  # fmt: skip
    else:
        console.print(f"quality was not measured: {reason}", highlight=False)
    if healed:
        console.print(f"healed on {healed.tokens:,} tokens in {healed.minutes:.1f} minutes", highlight=False)
    console.print(f"wrote {result.path}; talk to it: mpo-run chat {result.path}", highlight=False)


def change(after: float, before: float) -> str:
    """The change in per cent."""
    return f"{100 * (after / before - 1):+.1f} %"
