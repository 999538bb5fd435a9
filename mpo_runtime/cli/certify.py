"""verify --quality: measures a file's certificate again and says whether it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpo_formats import Certificate, MpoFile, Quality
from mpo_formats.errors import ConfigError, FormatError
from mpo_runtime.cli import console
from mpo_runtime.loading import load_network, open_weights, read_text_files
from mpo_runtime.measure import compare, perplexity
from mpo_runtime.text.token_text import BUILT_IN_TEXT, TokenText, read_tokens
from mpo_runtime.weights.protocol import Weights

# Figures from another machine or backend differ by rounding; by more, the certificate does not hold.
TOLERANCE = 0.002


def verify_quality(file: Path, to: Path | None, text: Path | None, load_options: dict[str, Any]) -> None:
    """Measures every entry of a file's certificate again.

    Args:
        to: the dense model; without it the perplexity is checked and the KL divergence is not.
        text: the text of the certificate; the built-in one where None.

    Raises:
        ConfigError: when the file has no certificate, or the text is not the one that it names.
        FormatError: when a figure differs by more than 0.2 %.
    """
    with MpoFile(file) as weights:
        entries = weights.certificates().entries
        if not entries:
            raise ConfigError(f"{file}: has no certificate; export it without --measure-tokens 0")
        reference = open_weights(to) if to else None
        for entry in entries:
            tokens = certified_tokens(weights, entry.quality, text or BUILT_IN_TEXT)
            figures = measure_again(weights, reference, entry, tokens, load_options)
            report(file, entry, figures)


def certified_tokens(weights: MpoFile, quality: Quality, path: Path) -> TokenText:
    """The text of a certificate, tokenised; raises ConfigError when the text is another one."""
    tokens = read_tokens(path, *read_text_files(weights))
    if tokens.sha256 != quality.text_sha256:
        raise ConfigError(
            f"{path}: is not the text of the certificate ({quality.text}, SHA-256 "
            f"{quality.text_sha256[:12]}…); give that one with --text"
        )
    return tokens.first(quality.tokens)


def measure_again(
    weights: Weights, reference: Weights | None, entry: Certificate, tokens: TokenText, load_options: dict[str, Any]
) -> dict[str, tuple[float, float]]:
    """The certified and the measured value of each figure."""
    quality = entry.quality
    # As the exporter measured: a certificate must not depend on which kernels a machine has.
    load_options = {**load_options, "backend": "reference"}
    network = load_network(weights, chi=entry.chi, **load_options)
    with console.progress("verify") as update:
        if reference is None:
            result = perplexity(network, tokens.ids, quality.window, lambda done, all: update("measuring", done, all))
            return {"perplexity": (quality.perplexity, result.perplexity)}
        teacher = load_network(reference, **load_options)
        both = compare(network, teacher, tokens.ids, quality.window, lambda done, all: update("measuring", done, all))
    return {
        "perplexity": (quality.perplexity, both.model.perplexity),
        "dense perplexity": (quality.dense_perplexity, both.reference.perplexity),
        "KL mean": (quality.kl_mean, both.kl_mean),
        "same top token": (quality.same_top1, both.same_top1),
    }


def report(file: Path, entry: Certificate, figures: dict[str, tuple[float, float]]) -> None:
    """Prints the figures side by side; raises FormatError for the first that does not hold."""
    which = "whole file" if entry.chi is None else f"--chi {entry.chi}"
    for name, (certified, measured) in figures.items():
        print(f"{which}: {name}: certified {certified:.5g}, measured {measured:.5g}")
        # A divergence near zero is all rounding: it may also differ by a millionth of a nat.
        if abs(measured - certified) > TOLERANCE * abs(certified) + (1e-6 if name == "KL mean" else 0.0):
            raise FormatError(f"{file}: the certificate does not hold: {name} is {measured:.5g}, not {certified:.5g}")
    print(f"{which}: the certificate holds")
