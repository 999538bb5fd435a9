"""Structured output: a JSON schema becomes a mask over the vocabulary before each draw, by llguidance.

A schema that cannot be compiled is an error of the request, never dropped. White space in the JSON is bounded, so that a
model cannot fill its answer with it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpo_formats import MpoError
from mpo_server.errors import ApiError, invalid

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from mpo_runtime.model import Model

LARGEST_SCHEMA = 1 << 16  # characters of its JSON
DEEPEST_SCHEMA = 32
WHITE_SPACE = r"[ \n]{0,2}"
_OPTIONS = "x-guidance"  # a member by which a schema would change the compiler's options


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar that compiled; `hook` gives the mask of one generation."""

    compiler: Compiler
    source: str

    def hook(self) -> GrammarHook:
        """A new mask, at the beginning of the grammar."""
        return GrammarHook(self.compiler.matcher(self.source), self.compiler.vocabulary)


class GrammarHook:
    """Called before each draw with the ids so far and the logits; leaves only tokens that the grammar allows."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher, self._taken = matcher, 0
        self._bits = np.zeros((vocabulary + 31) // 32, np.int32)

    def __call__(self, ids: Sequence[int], logits: NDArray[np.float32]) -> None:
        """Masks the logits [vocabulary] in place."""
        new = list(ids[self._taken :])
        self._taken = len(ids)
        if new and not self._matcher.consume_tokens(new):
            raise MpoError(f"structured output: {self._matcher.get_error()}")
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            raise MpoError(f"structured output: {self._matcher.get_error()}")
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: logits.size]
        logits[: allowed.size][allowed == 0] = -np.inf
        logits[allowed.size :] = -np.inf


class Compiler:
    """Compiles grammars for one model's tokenizer, which is prepared when it is first needed."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._lock = threading.Lock()
        self.vocabulary = model.network.architecture.vocab_size

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        raw = self._model.text_tokenizer().to_json()
        return LLTokenizer(raw, n_vocab=self.vocabulary, eos_token=list(self._model.end_ids))

    def tokenizer(self) -> LLTokenizer:
        """The tokenizer as llguidance needs it."""
        with self._lock:
            return self._tokenizer

    def matcher(self, source: str) -> LLMatcher:
        """A matcher at the beginning of a grammar; raises MpoError where it does not compile."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_grammar_size=100_000, max_lexer_states=50_000, verbose_errors=False)
        matcher = LLMatcher(self.tokenizer(), source, limits=limits, log_level=0)
        if matcher.is_error():
            raise MpoError(" ".join(matcher.get_error().split()))
        return matcher

    def compile(self, source: str, param: str) -> Grammar:
        """A checked grammar; raises ApiError where it does not compile or warns that it would not honour something."""
        from llguidance import LLMatcher

        if not self._model.end_ids:
            raise invalid(param, "the model has no end-of-text token, which structured output needs")
        wrong, messages = LLMatcher.validate_grammar_with_warnings(source, self.tokenizer())
        try:
            if wrong or messages:
                raise MpoError(" ".join(" ".join(messages).split()))
            # Also the first mask: a grammar may compile and yet allow nothing.
            GrammarHook(self.matcher(source), self.vocabulary)([], np.zeros(self.vocabulary, np.float32))
        except MpoError as error:
            raise invalid(param, f"the schema cannot be compiled: {str(error)[:300]}", "invalid_schema") from None
        return Grammar(self, source)

    def schema(self, schema: Any, param: str) -> Grammar:
        """The grammar of a JSON schema."""
        return self.compile(json_grammar(check_schema(schema, param)), param)


def read_format(given: Mapping[str, Any] | None, param: str = "response_format") -> Any:
    """The schema that `response_format` asks for, or None for plain text.

    Takes OpenAI's forms of chat completions ({"type": "json_schema", "json_schema": {"schema": …}}) and of responses, where
    the schema stands beside the type.
    """
    if given is None:
        return None
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = given.get("schema")
        return {"type": "object"} if schema is None else check_schema(schema, f"{param}.schema")
    if kind != "json_schema":
        raise invalid(f"{param}.type", "expected text, json_object or json_schema")
    place, where = given, param
    if "json_schema" in given or "schema" not in given:
        place, where = given.get("json_schema") or {}, f"{param}.json_schema"
    if not isinstance(place, Mapping) or place.get("schema") is None:
        raise ApiError(400, f"{where}.schema: is missing", param=f"{where}.schema", code="missing_required_parameter")
    return check_schema(place["schema"], f"{where}.schema")


def check_schema(schema: Any, param: str) -> dict[str, Any]:
    """A schema within the limits on size and depth; raises ApiError for another."""
    if not isinstance(schema, dict):
        raise invalid(param, "expected a JSON schema, which is an object", "invalid_schema")
    size = len(json.dumps(schema))
    if size > LARGEST_SCHEMA:
        raise invalid(param, f"expected at most {LARGEST_SCHEMA} characters, found {size}", "invalid_schema")
    level: list[Any] = [schema]
    for _ in range(DEEPEST_SCHEMA):
        level = [item for value in level for item in _inner(value, param)]
        if not level:
            return schema
    raise invalid(param, f"is nested deeper than {DEEPEST_SCHEMA} levels", "invalid_schema")


def _inner(value: Any, param: str) -> list[Any]:
    if isinstance(value, dict):
        if _OPTIONS in value:
            raise invalid(param, f"{_OPTIONS} is not allowed", "invalid_schema")
        return list(value.values())
    return value if isinstance(value, list) else []


def with_options(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema with the compiler's options: bounded white space, and nothing that is only ignored."""
    return {**schema, _OPTIONS: {"whitespace_pattern": WHITE_SPACE, "lenient": False}}


def json_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of one JSON value."""
    return json.dumps({"grammars": [{"json_schema": with_options(schema)}]})


def lark_grammar(lark: str) -> str:
    """A grammar in llguidance's dialect of Lark, which may hold schemas (`%json {…}`)."""
    return json.dumps({"grammars": [{"lark_grammar": lark}]})
