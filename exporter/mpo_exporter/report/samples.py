"""Text that both models generate from a few fixed prompts, unedited, and what tends to go wrong in it."""

from __future__ import annotations

from dataclasses import dataclass

from mpo_exporter.progress import Progress
from mpo_exporter.report.facts import Prompt, Sample, Texts
from mpo_runtime.model import Model
from mpo_runtime.sampler import SamplingOptions

PROMPTS = (
    ("Once upon a time, there was a little", False),
    ("Water is important for life because", False),
    ("The main difference between the two is", False),
    ("I want to book a table at a restaurant.", True),
    ("Why is the sky blue?", True),
    ("Write a short story about a dog that finds a key.", True),
)
LIMIT = 96
TEMPERATURE = 0.7
SEED = 1
GRAM = 4
# An answer that ends within this share of the limit ends early.
EARLY_SHARE = 1 / 8
LEAST_TOKENS = 8
# Seconds that all texts together may take.
SECONDS = 20.0


def repeated_share(tokens: list[int], size: int = GRAM) -> float:
    """The share of a text's n-grams of tokens that occurred in it before; 0 for a text without any."""
    grams = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """At most so many new tokens; an end before `early` of them counts as an early stop."""

    tokens: int
    early: int


def limits(context: int, slowest: float | None) -> Limits:
    """Limits that a context and the tokens a second of the slower model allow."""
    allowed = LIMIT if slowest is None else max(LEAST_TOKENS, int(SECONDS * slowest / (2 * len(PROMPTS))))
    tokens = max(1, min(LIMIT, allowed, context // 2))
    return Limits(tokens, max(1, int(tokens * EARLY_SHARE)))


def sample(model: Model, prompt: str, chat: bool, bounds: Limits) -> Sample:
    """One continuation by a model."""
    sampling = SamplingOptions(temperature=TEMPERATURE, seed=SEED)
    pieces = list(
        model.chat([{"role": "user", "content": prompt}], max_tokens=bounds.tokens, sampling=sampling)
        if chat
        else model.generate(prompt, max_tokens=bounds.tokens, sampling=sampling)
    )
    finish = pieces[-1].finish or "length"
    tokens = [piece.token for piece in pieces]
    said = tokens[:-1] if finish == "stop" else tokens
    early = finish == "stop" and len(said) < bounds.early
    return Sample("".join(piece.text for piece in pieces), len(said), finish, repeated_share(said), early)


def write_texts(dense: Model | None, compressed: Model, slowest: float | None, progress: Progress) -> Texts | str:
    """Has both models go on from the prompts, chat turns only where there is a chat template, or says why not."""
    if compressed.tokenizer is None:
        return "the model has no tokenizer.json"
    bounds = limits(compressed.engine.context, slowest)
    room = compressed.engine.context - bounds.tokens
    found = []
    for number, (text, chat) in enumerate(PROMPTS, 1):
        if (chat and compressed.template is None) or prompt_length(compressed, text, chat) > room:
            continue
        theirs = sample(dense, text, chat, bounds) if dense else None
        found.append(Prompt(text, chat, theirs, sample(compressed, text, chat, bounds)))
        progress("texts", number, len(PROMPTS))
    if not found:
        return "no prompt fits into the context"
    ours, theirs_all = [one.compressed for one in found], [one.dense for one in found if one.dense]
    return Texts(
        temperature=TEMPERATURE,
        seed=SEED,
        limit=bounds.tokens,
        early_tokens=bounds.early,
        dense_repeated=sum(one.repeated for one in theirs_all) / len(theirs_all) if theirs_all else None,
        repeated=sum(one.repeated for one in ours) / len(ours),
        dense_early=sum(one.early for one in theirs_all) if theirs_all else None,
        early=sum(one.early for one in ours),
        prompts=tuple(found),
    )


def prompt_length(model: Model, text: str, chat: bool) -> int:
    """Tokens of a prompt as the model is given it."""
    if chat:
        return len(model.encode_chat([{"role": "user", "content": text}]))
    return len(model.text_tokenizer().encode(text, add_special_tokens=True))
