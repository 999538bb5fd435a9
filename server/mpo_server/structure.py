"""Structured output: a JSON schema becomes a mask over the vocabulary before each draw, by llguidance.

A schema that cannot be compiled, or not in time, is an error of the request, never dropped. White space in the JSON is
bounded, so that a model cannot fill its answer with it.
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
from mpo_runtime.helper_process import SECONDS_TO_START, HelperProcess
from mpo_server.errors import ApiError, invalid
from mpo_server.grammar_helper import GrammarFailure, make_matcher, make_tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from mpo_runtime.model import Model

LARGEST_SCHEMA = 1 << 16  # characters of its JSON
DEEPEST_SCHEMA = 32
SECONDS = 5.0  # for compiling one schema
KEPT_GRAMMARS = 32
WHITE_SPACE = r"[ \n]{0,2}"
_OPTIONS = "x-guidance"  # a member by which a schema would change the compiler's options


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar that compiled; `hook` gives the mask of one generation."""

    matcher: LLMatcher
    vocabulary: int

    def hook(self) -> GrammarHook:
        """A new mask, at the beginning of the grammar."""
        return GrammarHook(self.matcher.deep_copy(), self.vocabulary)


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
    """Compiles grammars for one model's tokenizer, which is prepared when it is first needed; safe from several threads.

    Grammars of earlier requests are kept, so that the same schema costs nothing again.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._helper: HelperProcess | None = None
        self._kept: dict[str, Grammar] = {}
        self.vocabulary = model.network.architecture.vocab_size

    def compile(self, source: str, param: str) -> Grammar:
        """A grammar; raises ApiError where it does not compile in time or would not be honoured. Takes long.

        Args:
            param: the field of the request that it comes from.
        """
        if not self._model.end_ids:
            raise invalid(param, "the model has no end-of-text token, which structured output needs")
        with self._lock:
            try:
                grammar = self._kept.pop(source, None) or self._new(source)
            except GrammarFailure as error:
                raise invalid(param, f"the schema cannot be compiled: {str(error)[:300]}", "invalid_schema") from None
            self._kept[source] = grammar  # the last one used is the last one to go
            if len(self._kept) > KEPT_GRAMMARS:
                del self._kept[next(iter(self._kept))]
        return grammar

    def schema(self, schema: Any, param: str) -> Grammar:
        """The grammar of a JSON schema."""
        return self.compile(json_grammar(check_schema(schema, param)), param)

    def close(self) -> None:
        """Ends the helper process, if there is one."""
        with self._lock:
            self._stop()

    def _new(self, source: str) -> Grammar:
        """Compiles in the helper process, which is ended where that takes too long, then here."""
        try:
            if self._helper is None:
                self._helper = HelperProcess("mpo_server.grammar_helper", "structured output")
                self._helper.ask(json.dumps(self._arguments).encode(), SECONDS_TO_START)
            answer = self._helper.ask(source.encode(), SECONDS)
        except BaseException:
            self._stop()
            raise
        if answer is None:
            limit = f"it takes longer than {SECONDS:g} seconds" if self._helper.expired else "it needs too much memory"
            self._stop()
            raise GrammarFailure(limit)
        if answer != b"+":
            raise GrammarFailure(answer[1:].decode())
        return Grammar(make_matcher(self._tokenizer, source), self.vocabulary)

    def _stop(self) -> None:
        if self._helper is not None:
            self._helper.stop()
            self._helper = None

    @cached_property
    def _arguments(self) -> tuple[str, int, tuple[int, ...]]:
        return self._model.text_tokenizer().to_json(), self.vocabulary, tuple(self._model.end_ids)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return make_tokenizer(*self._arguments)


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
