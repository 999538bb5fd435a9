"""chat: one answer for --prompt or piped input, a conversation in a terminal."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from mpo_runtime.cli.commands import open_model, print_speed, stream
from mpo_runtime.model import Model
from mpo_runtime.sampler import SamplingOptions


def run_chat(
    file: Path,
    prompt: str | None,
    system: str | None,
    load_options: dict[str, Any],
    options: SamplingOptions,
    max_tokens: int | None,
    stop: list[str],
    verbose: bool,
) -> None:
    """Answers one message, or talks until the input ends."""
    with open_model(file, load_options) as model:
        messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        if prompt is not None or not sys.stdin.isatty():
            text = prompt if prompt is not None else sys.stdin.read().strip()
            answer(model, [*messages, {"role": "user", "content": text}], options, max_tokens, stop, verbose)


def answer(
    model: Model,
    messages: list[dict[str, str]],
    options: SamplingOptions,
    max_tokens: int | None,
    stop: list[str],
    verbose: bool,
) -> None:
    """Streams one answer."""
    start = time.monotonic()
    count = stream(model.chat(messages, max_tokens=max_tokens, sampling=options, stop=stop))
    print()
    if verbose:
        print_speed(count, time.monotonic() - start)
