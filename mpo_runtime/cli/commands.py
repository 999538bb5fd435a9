"""generate, ppl and compare."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpo_formats.errors import ConfigError
from mpo_runtime.cli import console
from mpo_runtime.model import Model, load, load_network, read_text_files
from mpo_runtime.sampler import SamplingOptions
from mpo_runtime.texts import TokenText, read_tokens
from mpo_runtime.weights import Weights, open_weights

BUILT_IN_TEXT = Path(__file__).parent.parent / "data" / "evaluation.jsonl"


def sampling(
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    frequency_penalty: float,
    presence_penalty: float,
    logit_bias: Sequence[str] | None,
    seed: int | None,
) -> SamplingOptions:
    """Sampling options from command-line values; raises ConfigError naming the one that is out of range."""
    biases = {}
    for item in logit_bias or []:
        token, _, bias = item.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise ConfigError(f"--logit-bias {item}: expected ID=BIAS, such as 42=-5") from None
    return SamplingOptions(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        logit_bias=biases,
        seed=seed,
    )


def open_model(file: Path, load_options: dict[str, Any]) -> Model:
    """Loads a model, with a note on standard error where it has to run slowly."""
    model = load(file, **load_options)
    note_kernels(model)
    return model


def note_kernels(model: Model) -> None:
    """Says once, clearly, when a faster path is missing."""
    from mpo_runtime import kernels

    if not kernels.native_available():
        print("note: running without native kernels (no C++ compiler was found at install); reinstall with one for speed",
              file=sys.stderr)  # fmt: skip
    if not getattr(model.network.ops, "held", True):
        print(
            "note: too little memory for float32 weights; they are rebuilt for every token, which is slow",
            file=sys.stderr,
        )


def generate_text(
    file: Path,
    prompt: str | None,
    load_options: dict[str, Any],
    options: SamplingOptions,
    max_tokens: int | None,
    stop: list[str],
    verbose: bool,
) -> None:
    """Continues a prompt on standard output."""
    text = prompt if prompt is not None else sys.stdin.read().rstrip("\n")
    with open_model(file, load_options) as model:
        start = time.monotonic()
        pieces = model.generate(text, max_tokens=max_tokens, sampling=options, stop=stop)
        print(text, end="", flush=True)
        count = stream(pieces)
        print()
        if verbose:
            print_speed(count, time.monotonic() - start)


def stream(pieces: Any) -> int:
    """Prints pieces as they come and returns their number; Ctrl-C ends the text, not the program."""
    count = 0
    try:
        for piece in pieces:
            count += 1
            if piece.text:
                print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
    return count


def print_speed(tokens: int, seconds: float) -> None:
    """Tokens per second on standard error, the prompt's time included."""
    print(f"[{tokens} tokens in {seconds:.2f} s, {tokens / max(seconds, 1e-9):.1f} tokens/s]", file=sys.stderr)


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
        print(json.dumps({**asdict(result), "bits_per_byte": bits, "text_sha256": tokens.sha256}))
        return
    print(f"perplexity {result.perplexity:.4f} ± {result.error:.4f} (standard error)")
    if bits is not None:
        print(f"bits per byte {bits:.4f}")
    print(f"{result.tokens} tokens of {tokens.name} in {result.windows} windows of {result.window}")


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
        print(json.dumps({**asdict(result), "text": tokens.name, "text_sha256": tokens.sha256}))
        return
    print(f"perplexity            {result.model.perplexity:.4f} ± {result.model.error:.4f}   "
          f"reference {result.reference.perplexity:.4f} ± {result.reference.error:.4f}")  # fmt: skip
    print(f"KL divergence (nats)  mean {result.kl_mean:.5f}   99.9% {result.kl_999:.5f}")
    print(
        f"same most likely token {100 * result.same_top1:.2f} %   logits cosine {result.cosine:.5f}   MSE {result.mse:.5f}"
    )
    print(f"{result.model.tokens} tokens of {tokens.name} in {result.model.windows} windows of {result.model.window}")
