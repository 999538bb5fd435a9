"""Compiles grammars with llguidance, and is the helper process in which that is tried first.

A schema of a few characters can take minutes or gigabytes to compile (two large numbers of `multipleOf`, say). So each one is
compiled in a helper process, whose time and memory are limited, before this process does it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mpo_runtime.helper_process import confine, read_frame, write_frame

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MEMORY = 2 << 30  # bytes of address space


class GrammarFailure(Exception):
    """A grammar that cannot be compiled, or would not be honoured; one line."""


def make_tokenizer(raw: str, vocabulary: int, ends: Sequence[int]) -> LLTokenizer:
    """The tokenizer as llguidance needs it, from the text of a tokenizer.json."""
    from llguidance import LLTokenizer

    return LLTokenizer(raw, n_vocab=vocabulary, eos_token=list(ends))


def make_matcher(tokenizer: LLTokenizer, source: str) -> LLMatcher:
    """A matcher at the beginning of a grammar; raises GrammarFailure where it does not compile."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_grammar_size=100_000, max_lexer_states=50_000, verbose_errors=False)
    matcher = LLMatcher(tokenizer, source, limits=limits, log_level=0)
    check(matcher)
    return matcher


def check(matcher: LLMatcher) -> None:
    """Raises GrammarFailure where the matcher has failed."""
    if matcher.is_error():
        raise GrammarFailure(" ".join(matcher.get_error().split()))


def attempt(tokenizer: LLTokenizer, source: str) -> None:
    """Compiles a grammar; raises GrammarFailure where it does not compile, warns of something, or allows no token."""
    from llguidance import LLMatcher

    wrong, messages = LLMatcher.validate_grammar_with_warnings(source, tokenizer)
    if wrong or messages:
        raise GrammarFailure(" ".join(" ".join(messages).split()))
    matcher = make_matcher(tokenizer, source)
    matcher.compute_bitmask()
    check(matcher)


def serve() -> None:
    """The helper process: reads the tokenizer, then one grammar at a time, and answers each with + or - and the error."""
    confine(MEMORY)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    write_frame(answers, b"+")
    tokenizer: LLTokenizer | None = None
    while (request := read_frame(requests)) is not None:
        answer = b"+"
        try:
            if tokenizer is None:
                tokenizer = make_tokenizer(*json.loads(request))
            else:
                attempt(tokenizer, request.decode())
        except GrammarFailure as error:
            answer = b"-" + str(error).encode()
        write_frame(answers, answer)
