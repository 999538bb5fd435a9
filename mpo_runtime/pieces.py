"""Generated text piece by piece: tokens to text, stop strings, most likely tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mpo_formats import ConfigError
from mpo_runtime.engine import FinishReason, Generation, Step
from mpo_runtime.sampler import Choice, top_logprobs
from mpo_runtime.text.stopping import StopMatcher
from mpo_runtime.text.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of generated text, one for each token.

    `text` may be empty while a character or a possible stop string is incomplete. `finish` is set on the last piece:
    `stop` at an end token or stop string, `length` when the limit or the context is reached. `logprob` is the token's
    log-probability in nats under the model's own distribution, before penalties, temperature and filters. `top` holds
    the most likely tokens and their log-probabilities, as many as `top_logprobs` asked for.
    """

    text: str
    token: int
    logprob: float
    finish: FinishReason | None
    top: tuple[Choice, ...] = ()


class Pieces(Iterator[Piece]):
    """A text in the making: an iterator of its pieces. Closing or dropping it ends the generation.

    Args:
        begin: begins the generation; called by `start`, or when the first piece is asked for.
        continued: ids whose text the generated text follows: they decide about a space at its beginning.
        top: how many of the most likely tokens each piece lists.
    """

    def __init__(
        self,
        begin: Callable[[], Generation],
        tokenizer: Tokenizer | None,
        decoder: StreamDecoder | None,
        matcher: StopMatcher,
        top: int,
    ) -> None:
        self._begin, self._tokenizer, self._decoder, self._matcher, self._top = begin, tokenizer, decoder, matcher, top
        self.generation: Generation | None = None
        self._ended = False

    def start(self) -> Generation:
        """Begins the generation, where it has not begun, and returns it: figures, and `poll` of single steps."""
        if self.generation is None:
            if self._ended:
                raise ConfigError("generate: the text was closed before it began")
            self.generation = self._begin()
        return self.generation

    def __next__(self) -> Piece:
        """The next piece, waiting for it; raises what went wrong while it was made."""
        if self._ended:
            raise StopIteration
        generation = self.start()
        try:
            return self._piece(next(generation))
        except BaseException:
            self.close()
            raise

    def poll(self) -> Piece | None:
        """The next piece if there is one, without waiting; `done` says whether there will be more."""
        if self._ended:
            return None
        generation = self.start()
        try:
            step = generation.poll()
            piece = None if step is None else self._piece(step)
        except BaseException:
            self.close()
            raise
        if piece is None and generation.done:
            self.close()
        return piece

    @property
    def done(self) -> bool:
        """Whether no more pieces will come."""
        return self._ended

    def close(self) -> None:
        """Ends the text; from any thread, any number of times."""
        self._ended = True
        if self.generation is not None:
            self.generation.cancel()

    def _piece(self, step: Step) -> Piece:
        decoder, matcher = self._decoder, self._matcher
        text = decoder.push(step.token) if decoder and step.finish != "stop" else ""
        spelling = self._special_spelling(step.token) if matcher.active and step.finish != "stop" else ""
        if decoder and (step.finish or spelling):
            text += decoder.finish() if step.finish else decoder.settle()
        text, stopped = matcher.push(text)
        if spelling and not stopped:
            more, stopped = matcher.push(spelling, special=True)
            text += more
        if step.finish and not stopped:
            text += matcher.flush()
        finish: FinishReason | None = "stop" if stopped else step.finish
        if finish is not None:
            self.close()
        return Piece(text, step.token, step.logprob, finish, tuple(top_logprobs(step.logits, self._top)))

    def _special_spelling(self, token: int) -> str:
        """The spelling of a special token, which the text leaves out; nothing for any other token."""
        if self._tokenizer is None or token not in self._tokenizer.special_ids:
            return ""
        return self._tokenizer.id_to_token(token) or ""
