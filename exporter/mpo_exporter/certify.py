"""Certifies written files: each is read back and measured beside the dense model that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mpo_exporter.calibrate.lanes import in_lanes
from mpo_exporter.calibrate.upstream import WindowOps
from mpo_exporter.progress import Progress, silent
from mpo_formats import Certificate, LinearSpec, MpoFile, Quality
from mpo_runtime.layers.linear import Linear, MatrixTerm
from mpo_runtime.measure import Comparison, Found, Item, compare
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.protocol import Weights


class WholeOps(WindowOps):
    """The same ops with one matrix for each layer, where they are held in memory: its terms and its transform multiplied out."""

    def load_layer(self, weights: Weights, spec: LinearSpec, chi: int | None) -> Linear:
        """A layer as one matrix."""
        layer = super().load_layer(weights, spec, chi)
        if not self.held or (len(layer.terms) == 1 and not spec.transformed):
            return layer
        whole = replace(spec, hadamard=0, transform=None)
        return Linear(whole, [MatrixTerm.of(layer.weight())], layer.bias)


class Certifier:
    """Measures `.mpo` files beside their dense model on one held-out text.

    Args:
        dense: the weights of the dense model, its teacher.
        device: that both models run on.
        progress: is given the windows measured, one stage for each file or prefix.
    """

    def __init__(self, dense: Weights, text: TokenText, *, device: str = "cpu", progress: Progress = silent) -> None:
        self.dense = decoder_for(dense.spec.architecture, WindowOps(dense, device=device))
        self.text, self.device, self.progress = text, device, progress

    def compare(self, path: Path, chi: int | None = None) -> Comparison:
        """Measures a file, or its prefix with bonds of at most χ.

        Raises:
            FormatError: for a damaged file.
        """
        stage = "measuring" if chi is None else f"measuring χ={chi}"
        with MpoFile(path) as file:
            ours = decoder_for(file.spec.architecture, WholeOps(file, chi=chi, device=self.device))
            return compare(
                ours,
                self.dense,
                self.text.ids,
                progress=lambda done, total: self.progress(stage, done, total),
                over=self._in_lanes,
            )

    def _in_lanes(self, work: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
        return in_lanes(lambda lane, item: work(item), items, self.device)

    def certificate(self, chi: int | None, found: Comparison) -> Certificate:
        """A comparison as the file's certificate records it."""
        return Certificate(
            chi,
            Quality(
                text=self.text.name,
                text_sha256=self.text.sha256,
                tokens=int(self.text.ids.size),
                window=found.model.window,
                perplexity=found.model.perplexity,
                perplexity_error=found.model.error,
                dense_perplexity=found.reference.perplexity,
                kl_mean=found.kl_mean,
                kl_999=found.kl_999,
                same_top1=found.same_top1,
            ),
        )
