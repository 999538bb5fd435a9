"""How a request wants its text drawn and ended, in one checked record; the fields that all endpoints share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mpo_formats import ConfigError
from mpo_runtime.model import Model
from mpo_runtime.sampler import SamplingOptions
from mpo_server.errors import ApiError, invalid
from mpo_server.fields import Field, Table, flag, number, read, text_field, whole
from mpo_server.structure import Grammar

MOST_CHOICES = 16
MOST_STOPS = 16
LONGEST_STOP = 256
MOST_LOGPROBS = 20
MOST_TOKENS = 1 << 24
MOST_BIASES = 1024
LONGEST_PROMPT = 1 << 21  # characters

SAMPLING: Table = {
    "model": text_field(256, "Any name; the server has one model."),
    "temperature": number(0, 100, 0.7, "0 always takes the most likely token."),
    "top_p": number(0, 1, 1.0, "Draw from the most likely tokens that make up this probability."),
    "top_k": whole(0, 1_000_000, 0, "Draw from the K most likely tokens; 0 is off."),
    "min_p": number(0, 1, 0.0, "Drop tokens below this share of the most likely one."),
    "frequency_penalty": number(-2, 2, 0.0),
    "presence_penalty": number(-2, 2, 0.0),
    "repetition_penalty": number(0.01, 100, None, "Above 1 discourages tokens already in the text."),
    "repeat_penalty": number(0.01, 100, None, "Another name of repetition_penalty."),
    "seed": whole(0, 2**63 - 1, None, "The same seed gives the same text, whatever else runs."),
    "stop": Field(
        ("string", "array"),
        1,
        LONGEST_STOP,
        items={"type": "string", "minLength": 1, "maxLength": LONGEST_STOP},
        text="Texts at which to stop, spellings of special tokens among them.",
    ),
    "logit_bias": Field(
        ("object", "array"),
        0,
        MOST_BIASES,
        text="Numbers in -100 … 100 added to the logits of tokens, which are given by id or by text; false bans a token.",
    ),
    "n": whole(1, MOST_CHOICES, 1, "How many answers."),
    "ignore_eos": flag(False, "Go on after the model's end of text."),
    "stream": flag(False),
    "stream_options": Field(("object",)),
    "id_slot": whole(-1, 63, -1, "The slot that remembers this text (/slots); -1 takes them in turn."),
    "timings_per_token": flag(False, "Every chunk of a stream carries timings."),
}
# Fields that would change the answer and that this server lacks, with the values that leave them off.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "functions": ([],),
    "function_call": ("none",),
    "grammar": ("",),
    "grammar_lazy": (False,),
    "json_schema": (),
    "lora": ([],),
    "mirostat": (0,),
    "modalities": (["text"],),
    "prompt_template": (),
    "suffix": ("",),
    "top_n_sigma": (-1, 0),
    "typical_p": (1,),
    "web_search_options": (),
    "xtc_probability": (0,),
}


@dataclass(frozen=True, slots=True)
class Drawing:
    """What to generate: how tokens are drawn, how many, where the text ends, and what is told about them.

    logprobs: how many of the most likely tokens are listed for each; None for no log-probabilities.
    grammar: what the text must be like; None for any text.
    """

    sampling: SamplingOptions
    max_tokens: int | None
    stop: tuple[str, ...]
    choices: int
    logprobs: int | None
    ignore_eos: bool
    stream: bool
    include_usage: bool
    timings_per_token: bool
    slot: int = -1
    grammar: Grammar | None = None

    def of_choice(self, index: int) -> SamplingOptions:
        """The sampling options of one of the answers: each has a seed of its own."""
        if self.sampling.seed is None or index == 0:
            return self.sampling
        return replace(self.sampling, seed=(self.sampling.seed + index) % 2**63)


def read_drawing(model: Model, data: Mapping[str, Any], max_tokens: int | None, logprobs: int | None) -> Drawing:
    """The shared fields of a request as a record; raises ApiError naming the field that is wrong."""
    refuse_unsupported(data)
    values = read(SAMPLING, data)
    repetition = values["repetition_penalty"] if values["repetition_penalty"] is not None else values["repeat_penalty"]
    try:
        sampling = SamplingOptions(
            temperature=values["temperature"],
            top_k=values["top_k"],
            top_p=values["top_p"] or 1e-9,  # 0 leaves the most likely token
            min_p=values["min_p"],
            repetition_penalty=1.0 if repetition is None else repetition,
            frequency_penalty=values["frequency_penalty"],
            presence_penalty=values["presence_penalty"],
            logit_bias=read_biases(model, values["logit_bias"]),
            seed=values["seed"],
        )
    except ConfigError as error:
        raise invalid(str(error).partition(" ")[0], str(error)) from None
    return Drawing(
        sampling=sampling,
        max_tokens=max_tokens,
        stop=read_stops(values["stop"]),
        choices=values["n"],
        logprobs=logprobs,
        ignore_eos=values["ignore_eos"],
        stream=values["stream"],
        include_usage=include_usage(values["stream_options"], values["stream"]),
        timings_per_token=values["timings_per_token"],
        slot=values["id_slot"],
    )


def refuse_unsupported(data: Mapping[str, Any]) -> None:
    """Raises ApiError for a field that would change the answer and that this server lacks."""
    for name, off in UNSUPPORTED.items():
        value = data.get(name)
        if value is not None and value not in off:
            raise ApiError(
                400, f"{name}: this server does not support it; leave it out", param=name, code="unsupported"
            )


def include_usage(options: Mapping[str, Any] | None, stream: bool) -> bool:
    """Whether a stream ends with a chunk that counts tokens."""
    if options is None:
        return False
    if not stream:
        raise invalid("stream_options", "is only allowed with stream: true")
    return bool(read({"include_usage": flag(False)}, options, "stream_options.")["include_usage"])


def read_stops(given: str | list[Any] | None) -> tuple[str, ...]:
    """The stop strings."""
    if given is None:
        return ()
    texts = [given] if isinstance(given, str) else given
    if len(texts) > MOST_STOPS:
        raise invalid("stop", f"expected at most {MOST_STOPS} strings, found {len(texts)}", "out_of_range")
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not 1 <= len(text) <= LONGEST_STOP:
            raise invalid(f"stop[{index}]", f"expected a string of 1 to {LONGEST_STOP} characters")
    return tuple(dict.fromkeys(texts))


def read_biases(model: Model, given: Mapping[str, Any] | list[Any] | None) -> dict[int, float]:
    """Biases by token id. A key is an id, as number or string, or a text, whose tokens all get the bias.

    A list of pairs [id or text, bias] is taken too; `false` bans a token.
    """
    if not given:
        return {}
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    biases: dict[int, float] = {}
    vocabulary = model.network.architecture.vocab_size
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise invalid("logit_bias", "expected pairs of a token (id or text) and a number")
        key, value = pair
        value = -100.0 if value is False else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
            raise invalid("logit_bias", "expected numbers between -100 and 100, or false")
        for token in biased_tokens(model, key):
            if not 0 <= token < vocabulary:
                raise invalid("logit_bias", f"token id {token} lies outside the vocabulary of {vocabulary}")
            biases[token] = float(value)
    return biases


def biased_tokens(model: Model, key: Any) -> list[int]:
    """The token ids that a key of `logit_bias` means."""
    if isinstance(key, int) and not isinstance(key, bool):
        return [key]
    if not isinstance(key, str) or not key or len(key) > LONGEST_STOP:
        raise invalid("logit_bias", f"expected token ids or texts of 1 to {LONGEST_STOP} characters as keys")
    if key.lstrip("-").isdecimal() and key.isascii():
        return [int(key)] if len(key) < 20 else [-1]
    return model.text_tokenizer().encode(key, parse_special=True)
