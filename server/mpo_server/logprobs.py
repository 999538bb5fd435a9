"""Log-probabilities of tokens in the two forms that OpenAI's interface has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpo_runtime.measure import log_softmax
from mpo_runtime.model import Model
from mpo_runtime.sampler import Choice, top_logprobs
from mpo_runtime.text.tokenizer import Tokenizer
from mpo_server.generation import TokenFacts

LEAST = -9999.0  # in place of minus infinity, which JSON lacks


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenFacts]) -> list[dict[str, Any]]:
    """Tokens in the form of chat completions."""
    return [
        {
            **_entry(tokenizer, facts.token, facts.logprob),
            "top_logprobs": [_entry(tokenizer, choice.token, choice.logprob) for choice in facts.top],
        }
        for facts in tokens
    ]


def _entry(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    content = tokenizer.token_bytes(token)
    return {
        "token": content.decode("utf-8", "replace"),
        "id": token,
        "logprob": finite(logprob),
        "bytes": list(content),
    }


def finite(logprob: float | None) -> float | None:
    """A log-probability that JSON can spell."""
    return logprob if logprob is None else max(logprob, LEAST)


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenFacts], offset: int, top: int) -> dict[str, Any]:
    """Tokens in the older form of completions.

    Args:
        offset: characters of text before the first token.
        top: how many likely tokens were asked for; at 0 `top_logprobs` is null.
    """
    texts, offsets = [], []
    for facts in tokens:
        texts.append(token_text(tokenizer, facts.token))
        offsets.append(offset)
        offset += len(texts[-1])
    likely: list[dict[str, float | None] | None] | None = None
    if top:
        likely = [None if facts.logprob is None else _likely(tokenizer, facts) for facts in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [finite(facts.logprob) for facts in tokens],
        "top_logprobs": likely,
        "text_offset": offsets,
    }


def _likely(tokenizer: Tokenizer, facts: TokenFacts) -> dict[str, float | None]:
    """The likely tokens by their text, the token itself among them; of two with the same text the likelier one."""
    found: dict[str, float | None] = {}
    for choice in (*facts.top, Choice(facts.token, facts.logprob or 0.0)):
        found.setdefault(token_text(tokenizer, choice.token), finite(choice.logprob))
    return found


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; bytes that are part of a character are spelled as OpenAI does, with `bytes:` before them."""
    content = tokenizer.token_bytes(token)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def prompt_facts(model: Model, ids: Sequence[int], top: int) -> list[TokenFacts]:
    """The log-probability of each token of a prompt after its first, in one pass besides the batch. Takes long."""
    facts = [TokenFacts(ids[0], None)]
    following = iter(ids[1:])
    if len(ids) < 2:
        return facts
    for part in model.prompt_logits(ids):
        for row, token in zip(log_softmax(part), following, strict=False):
            facts.append(TokenFacts(token, float(row[token]), tuple(top_logprobs(row, top)) if top else ()))
    return facts
