"""ppl and compare."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpo_runtime.cli import console
from mpo_runtime.loading import load_network, open_weights, read_text_files
from mpo_runtime.text.token_text import BUILT_IN_TEXT, TokenText, read_tokens
from mpo_runtime.weights.protocol import Weights


def read_text(weights: Weights, path: Path) -> TokenText:
    """Tokenises a text with a model's own tokenizer and template."""
    tokenizer, template = read_text_files(weights)
    return read_tokens(path, tokenizer, template)


def measure_perplexity(file: Path, text: Path, window: int | None, load_options: dict[str, Any], as_json: bool) -> None:
    """Prints perplexity with its standard error, and bits per byte."""
    from mpo_runtime.measure import perplexity

    weights = open_weights(file)
    tokens = read_text(weights, text)
    network = load_network(weights, **load_options)
    with console.progress("perplexity") as update:
        result = perplexity(network, tokens.ids, window, lambda done, total: update("measuring", done, total))
    bits = result.bits_per_byte(tokens.content_bytes) if tokens.content_bytes else None
    if as_json:
        print(console.json_text({**asdict(result), "bits_per_byte": bits, "text_sha256": tokens.sha256}))
        return
    print(f"perplexity {result.perplexity:.4f} ± {result.error:.4f} (standard error)")
    if bits is not None:
        print(f"bits per byte {bits:.4f}")
    print(f"{result.tokens} tokens of {tokens.name} in windows of at most {result.window}")


def compare_models(
    file: Path, to: Path, text: Path | None, window: int | None, load_options: dict[str, Any], as_json: bool
) -> None:
    """Prints how a model differs from a reference on a text."""
    from mpo_runtime.measure import compare

    ours, reference = open_weights(file), open_weights(to)
    tokens = read_text(reference, text or BUILT_IN_TEXT)
    network = load_network(ours, **load_options)
    teacher = load_network(reference, **{**load_options, "chi": None})
    with console.progress("compare") as update:
        result = compare(network, teacher, tokens.ids, window, lambda done, total: update("measuring", done, total))
    if as_json:
        print(console.json_text({**asdict(result), "text": tokens.name, "text_sha256": tokens.sha256}))
        return
    print(
        f"perplexity            {result.model.perplexity:.4f} ± {result.model.error:.4f}   "
        f"reference {result.reference.perplexity:.4f} ± {result.reference.error:.4f}"
    )
    print(f"KL divergence (nats)  mean {result.kl_mean:.5f}   99.9% {result.kl_999:.5f}")
    print(
        f"same most likely token {100 * result.same_top1:.2f} %   logits cosine {result.cosine:.5f}   MSE {result.mse:.5f}"
    )
    print(f"{result.model.tokens} tokens of {tokens.name} in windows of at most {result.model.window}")
