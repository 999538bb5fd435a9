"""From a request's token ids to pieces of text, on the model's batched engine, without blocking the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mpo_formats import ConfigError, MpoError
from mpo_runtime.engine import Request
from mpo_runtime.sampler import top_logprobs
from mpo_runtime.text.stream import TextStream
from mpo_server.errors import ApiError, internal, too_long
from mpo_server.sampling import Drawing

if TYPE_CHECKING:
    from mpo_runtime.engine import Generation, Step
    from mpo_runtime.model import Model
    from mpo_runtime.sampler import Choice

PACE = 0.004  # seconds between two looks at a text
MOST_STEPS_AT_ONCE = 16  # that one piece joins, where several are ready


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """A token and its log-probability in nats, with the most likely tokens in its place."""

    token: int
    logprob: float | None
    top: tuple[Choice, ...] = ()


@dataclass(slots=True)
class Piece:
    """What came since the last piece: parts of text, each with whether it spells a special token, and the tokens.

    `finish` is set on the last piece: `stop` or `length`.
    """

    parts: list[tuple[str, bool]] = field(default_factory=list)
    tokens: list[TokenFacts] = field(default_factory=list)
    finish: str | None = None

    @property
    def text(self) -> str:
        """The text without special tokens."""
        return "".join(text for text, special in self.parts if not special)


class Answer:
    """One text in the making."""

    def __init__(
        self, model: Model, ids: Sequence[int], drawing: Drawing, index: int, continued: bool, wake: Any
    ) -> None:
        request = Request(
            ids=tuple(ids),
            sampling=drawing.of_choice(index),
            max_tokens=1 if drawing.max_tokens == 0 else drawing.max_tokens,
            stop_ids=() if drawing.ignore_eos else model.end_ids,
            logits_hook=None if drawing.grammar is None else drawing.grammar.hook(),
        )
        self.generation: Generation = model.engine.submit(request, notify=wake)
        self._text = TextStream(model.tokenizer, drawing.stop, ids if continued else ())
        self._logprobs = drawing.logprobs
        self._nothing = drawing.max_tokens == 0
        self.completion_tokens = 0
        self.ids = list(ids)  # of the prompt and the text
        self.first_token: float | None = None
        self.finished = False

    def poll(self) -> Piece | None:
        """What came since the last call; None where nothing did."""
        piece = Piece()
        for _ in range(MOST_STEPS_AT_ONCE):
            step = self.generation.poll()
            if step is None:
                break
            self._take(step, piece)
            if piece.finish:
                self.finished = True
                self.generation.cancel()
                break
        return piece if piece.tokens or piece.parts or piece.finish else None

    def _take(self, step: Step, piece: Piece) -> None:
        self.first_token = self.first_token or time.monotonic()
        if self._nothing:
            piece.finish = "length"
            return
        self.completion_tokens += 1
        self.ids.append(step.token)
        ended = step.finish == "stop"
        text, special = self._text.push(step.token, ended=ended, last=step.finish is not None)
        piece.parts += [(text, False)] if text else []
        piece.parts += [(special, True)] if special else []
        if not ended:
            top = () if not self._logprobs else tuple(top_logprobs(step.logits, self._logprobs))
            piece.tokens.append(TokenFacts(step.token, step.logprob, top))
        piece.finish = "stop" if self._text.stopped else step.finish

    def timings(self) -> dict[str, float]:
        """Counts and times, with the names that llama.cpp gives them."""
        run = self.generation
        fresh = run.prompt_tokens - run.cached_tokens
        prompt, decode, count = run.prompt_seconds * 1e3, run.decode_seconds * 1e3, self.completion_tokens
        return {
            "cache_n": run.cached_tokens,
            "prompt_n": fresh,
            "prompt_ms": prompt,
            "prompt_per_token_ms": prompt / max(fresh, 1),
            "prompt_per_second": fresh / prompt * 1e3 if prompt else 0.0,
            "predicted_n": count,
            "predicted_ms": decode,
            "predicted_per_token_ms": decode / max(count - 1, 1),
            "predicted_per_second": (count - 1) / decode * 1e3 if decode else 0.0,
        }


class Answers:
    """All texts of one request, in the order of its prompts; `close`, however it ends, frees their places in the batch."""

    def __init__(
        self, model: Model, prompts: Sequence[Sequence[int]], drawing: Drawing, deadline: float, continued: bool = False
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._woken = False  # whether the event is set or about to be
        self._deadline = deadline
        self.prompts = prompts
        self.started = time.monotonic()
        self.answers: list[Answer] = []
        try:
            for ids in prompts:
                for index in range(drawing.choices):
                    self.answers.append(Answer(model, ids, drawing, index, continued, self._wake))
        except BaseException:
            self.close()
            raise
        self._timer = self._loop.call_at(deadline, self._event.set)

    def _wake(self) -> None:
        """Called by the engine's thread: something came."""
        if self._woken:
            return
        self._woken = True
        try:
            self._loop.call_soon_threadsafe(self._event.set)
        except RuntimeError:  # the server has ended
            return

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all texts as they come, with the number of the text.

        Raises ApiError where the generation fails or the request's time is over.
        """
        open_answers = list(enumerate(self.answers))
        while open_answers:
            self._event.clear()
            self._woken = False  # what comes from here on sets the event again
            more, looked = False, self._loop.time()
            for index, answer in open_answers:
                try:
                    piece = answer.poll()
                except MpoError as error:
                    raise generation_error(error) from None
                if piece is not None:
                    more = more or len(piece.tokens) >= MOST_STEPS_AT_ONCE
                    yield index, piece
                elif answer.generation.done and not answer.finished:
                    raise internal("the generation ended early; the server is closing")
            open_answers = [(index, answer) for index, answer in open_answers if not answer.finished]
            if self._loop.time() >= self._deadline and open_answers:
                raise ApiError(504, "the request took longer than the server allows", code="timeout")
            if open_answers:
                if not more:
                    await self._event.wait()
                # Tokens that come faster are sent together; other requests have their turn in any case.
                await asyncio.sleep(max(0.0, looked + PACE - self._loop.time()))

    def stop(self, index: int) -> None:
        """Ends one of the texts, which has all that is wanted of it."""
        self.answers[index].finished = True
        self.answers[index].generation.cancel()

    def close(self) -> None:
        """Leaves the batch within one step; does nothing where everything has ended."""
        for answer in self.answers:
            answer.generation.cancel()
        if hasattr(self, "_timer"):
            self._timer.cancel()

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompt and of the texts."""
        choices = len(self.answers) // len(self.prompts)
        return usage(
            sum(map(len, self.prompts)),
            sum(answer.completion_tokens for answer in self.answers),
            sum(answer.generation.cached_tokens for answer in self.answers[::choices]),
        )


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """Counts of tokens in OpenAI's form."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def check_length(ids: Sequence[int], context: int, param: str) -> None:
    """Raises ApiError for a prompt that is empty or leaves no room in the context."""
    if not ids:
        raise ApiError(400, f"{param}: gives no token", param=param, code="invalid_value")
    if len(ids) >= context:
        raise too_long(len(ids), context, param)


def generation_error(error: MpoError) -> ApiError:
    """What a client sees of a failed generation."""
    if isinstance(error, ConfigError) or str(error).startswith("structured output"):
        return ApiError(400, str(error), code="invalid_value")
    return internal(str(error))
