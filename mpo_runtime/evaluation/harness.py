"""A model of this runtime as lm-eval's evaluator sees it, under the name `mpo`.

lm-eval does not find models of other packages, so `register` tells it of this class. What tokenises, splits and truncates is
lm-eval's own base class for models with tokens; here the tokens are run.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mpo_formats import ConfigError
from mpo_runtime.evaluation.kept import Kept, weights_digest
from mpo_runtime.evaluation.scoring import Scorer
from mpo_runtime.loading import load
from mpo_runtime.model import Message, Model
from mpo_runtime.sampler import SamplingOptions
from mpo_runtime.text.chat_template import named_tokens
from mpo_runtime.weights.store import resolve

NAME = "mpo"
NEW_TOKENS = 256
TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLED = ("top_k", "top_p", "min_p", "repetition_penalty")
# Called with the stage, the number of requests done and their total.
Progress = Callable[[str, int, int], None]


def require(module: str) -> Any:
    """A module of lm-eval; raises ConfigError where the package is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"eval needs the package lm-eval ({error}): pip install 'mpo-runtime[eval]'") from None


class Evaluated:
    """A loaded model that answers lm-eval's requests in token ids and text; answers are kept as they come.

    Args:
        kept: a file of JSON lines for the answers; None keeps none.
        options: of `mpo_runtime.load`.
    """

    def __init__(
        self,
        file: str | Path,
        kept: Path | None,
        options: Mapping[str, Any],
        progress: Progress = lambda stage, done, total: None,
    ) -> None:
        place = resolve(file)
        self.model: Model = load(place, **options)
        self.model.text_tokenizer()
        self.scorer = Scorer(self.model.network)
        self.progress = progress
        self.kept = Kept(kept)
        known = {name: options.get(name) for name in ("chi", "backend", "activations", "device")}
        self._identity = [weights_digest(place) if kept else "", known]

    def key(self, kind: str, request: Any) -> str:
        """What a kept answer belongs to: the weights, how they are run, and the request."""
        return hashlib.sha256(json.dumps([*self._identity, kind, request], default=str).encode()).hexdigest()

    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """The log-probability of each continuation in nats, and whether greedy decoding gives it."""
        keys = [self.key("score", pair) for pair in pairs]
        missing = [place for place, key in enumerate(keys) if key not in self.kept.rows]
        done = len(pairs) - len(missing)
        for index, score in self.scorer.scores([pairs[place] for place in missing]):
            self.kept.add(keys[missing[index]], {"nats": score.nats, "greedy": score.greedy})
            done += 1
            self.progress("scoring", done, len(pairs))
        rows = [self.kept.rows[key] for key in keys]
        return [(float(row["nats"]), bool(row["greedy"])) for row in rows]

    def generate(self, prompt: str, arguments: Mapping[str, Any]) -> str:
        """The text that follows a prompt up to a stop text; a prompt that is too long loses tokens at its beginning."""
        stop, limit, sampling = generation(arguments)
        room = self.model.engine.context - limit
        if room < 1:
            raise ConfigError(
                f"eval: {limit} new tokens do not fit into a context of {self.model.engine.context}; raise --ctx-size"
            )
        ids = self.model.encode(prompt, parse_special=True)[-room:]
        key = self.key("generate", [ids, dict(arguments)])
        if sampling.temperature == 0 and key in self.kept.rows:
            return str(self.kept.rows[key]["text"])
        pieces = self.model.generate(ids, max_tokens=limit, sampling=sampling, stop=stop)
        text = "".join(piece.text for piece in pieces)
        self.kept.add(key, {"text": text})
        return text

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """A conversation as text; without a generation prompt it ends with the last message's own text, to be continued."""
        if self.model.template is None:
            raise ConfigError("eval: the model has no chat template; leave out --chat")
        tokens: dict[str, Any] = dict(named_tokens(self.model.text_tokenizer()))
        text = self.model.template.render(messages, add_generation_prompt, **tokens)
        if add_generation_prompt:
            return text
        last = str(messages[-1]["content"]).strip()
        return text[: text.rindex(last) + len(last)] if last in text else text

    @property
    def end_of_text(self) -> int:
        """The token that ends a text."""
        return self.model.end_ids[0]

    @property
    def first_token(self) -> int:
        """The token in front of a text that has no context: begin-of-text where there is one, else end-of-text."""
        own = self.model.text_tokenizer().bos_id
        return self.end_of_text if own is None else own


def generation(arguments: Mapping[str, Any]) -> tuple[list[str], int, SamplingOptions]:
    """Stop texts, the most new tokens, and sampling options from a task's generation arguments.

    Without `do_sample` the most likely token is always taken, as in lm-eval's own models.

    Raises:
        ConfigError: for an argument that is not known.
    """
    given = dict(arguments)
    until = given.pop("until", None) or []
    stop = [text for text in ([until] if isinstance(until, str) else until) if text]
    limits = [given.pop(name, None) for name in TOKEN_LIMITS]
    limit = next((int(value) for value in limits if value is not None), NEW_TOKENS)
    drawn, temperature = given.pop("do_sample", False), given.pop("temperature", 1.0)
    chosen = {name: given.pop(name) for name in SAMPLED if name in given}
    if given:
        raise ConfigError(f"generation arguments {', '.join(given)}: are not supported")
    return stop, limit, SamplingOptions(temperature=temperature, **chosen) if drawn else SamplingOptions(temperature=0)


@cache
def harness_class() -> Any:
    """The class that lm-eval is told of; made when it is needed, because its base class is lm-eval's."""
    base = require("lm_eval.api.model").TemplateLM
    utils = require("lm_eval.utils")

    class Harness(base):  # type: ignore[misc, valid-type]
        """lm-eval's view of an `Evaluated`; `lm_eval` itself can make one by name: model="mpo", pretrained=FILE, chi=8."""

        def __init__(self, pretrained: str | Evaluated, **options: Any) -> None:
            super().__init__()
            ours = {name: value for name, value in options.items() if name not in ("batch_size", "max_batch_size")}
            made = pretrained if isinstance(pretrained, Evaluated) else Evaluated(pretrained, None, ours)
            self.evaluated = made

        @property
        def eot_token_id(self) -> int:
            return self.evaluated.end_of_text

        @property
        def prefix_token_id(self) -> int:
            return self.evaluated.first_token

        @property
        def max_length(self) -> int:
            return self.evaluated.scorer.longest

        @property
        def tokenizer_name(self) -> str:
            return self.evaluated.model.weights.spec.provenance.source or NAME

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
            model = self.evaluated.model
            if add_special_tokens is False:
                return model.text_tokenizer().encode(string, parse_special=True)
            return model.encode(string, parse_special=True)

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], **others: Any
        ) -> list[tuple[float, bool]]:
            return self.evaluated.score([(context, following) for _, context, following in requests])

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            windows = [
                [
                    utils.make_disjoint_window(window)
                    for window in utils.get_rolling_token_windows(
                        token_list=self.tok_encode(request.args[0]),
                        prefix_token=self.prefix_token_id,
                        max_seq_len=self.max_length,
                        context_len=1,
                    )
                ]
                for request in requests
            ]
            scores = iter(self.evaluated.score([pair for found in windows for pair in found]))
            return [sum(next(scores)[0] for _ in found) for found in windows]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            texts = []
            for number, request in enumerate(requests, 1):
                texts.append(self.evaluated.generate(*request.args))
                self.evaluated.progress("generating", number, len(requests))
            return texts

        def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
            return self.evaluated.render(chat_history, add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            template = self.evaluated.model.template
            return template.source if template is not None and chat_template else None

    require("lm_eval.api.registry").register_model(NAME)(Harness)
    return Harness
