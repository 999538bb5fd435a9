"""generate: continues one prompt or many, as a stream of text or as one JSON object a prompt."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo_formats.errors import ConfigError
from mpo_runtime.cli.console import json_text
from mpo_runtime.cli.prompt_cache import kept_prompt
from mpo_runtime.loading import load
from mpo_runtime.model import Model, Piece
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.pieces import Pieces
from mpo_runtime.sampler import Choice, SamplingOptions
from mpo_runtime.text.chat_template import TemplateOptions
from mpo_runtime.text.decode import decode_argument, decode_text


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate and how to show it.

    template: the options of the chat template that answers each prompt as a message; None continues the prompts as they are.
    system: the system message before each prompt, with a template only.
    """

    sampling: SamplingOptions
    max_tokens: int | None
    stop: tuple[str, ...]
    logprobs: int
    as_json: bool
    verbose: bool
    parse_special: bool = False
    template: TemplateOptions | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        if self.logprobs < 0:
            raise ConfigError(f"--logprobs: expected 0 or more, found {self.logprobs}")
        if self.logprobs and not self.as_json:
            raise ConfigError("--logprobs: are printed as JSON only; add --json")
        if self.parse_special and self.template is not None:
            raise ConfigError("--parse-special: is for prompts that are continued as they are; leave out --chat")

    def encode(self, model: Model, prompt: str) -> list[int]:
        """The token ids of a prompt."""
        if self.template is None:
            return model.encode(prompt, parse_special=self.parse_special)
        text = decode_argument(self.system or "", "--system")
        system = [{"role": "system", "content": text}] if text else []
        return model.encode_chat([*system, {"role": "user", "content": prompt}], self.template)

    def start(self, model: Model, ids: list[int]) -> Pieces:
        """Checks a prompt and returns the pieces that continue it."""
        return model.generate(
            ids, max_tokens=self.max_tokens, sampling=self.sampling, stop=self.stop, top_logprobs=self.logprobs
        )


def run_generate(
    file: Path,
    load_options: dict[str, Any],
    prompt: str | None,
    prompts: Path | None,
    request: Request,
    prompt_cache: Path | None = None,
) -> None:
    """Continues each prompt on standard output; all prompts are checked before the first is run."""
    if prompt is not None and prompts is not None:
        raise ConfigError("--prompt and --prompts: give one of them")
    if prompts is None:
        texts = [read_stdin().rstrip("\n") if prompt is None else decode_argument(prompt, "--prompt")]
    else:
        texts = read_prompts(prompts)
    with open_model(file, load_options) as model, kept_prompt(model, load_options, prompt_cache):
        started = []
        for number, text in enumerate(texts, 1):
            try:
                ids = request.encode(model, text)
                started.append((text, ids, request.start(model, ids)))
            except ConfigError as error:
                raise ConfigError(f"{prompts}: prompt {number}: {error}" if prompts else str(error)) from None
        for index, (text, ids, pieces) in enumerate(started):
            if request.as_json:
                print(json_text(describe(model, index, text, ids, pieces)), flush=True)
            else:
                shown = "" if request.template else text
                print("\n" * (index > 0) + shown, end="", flush=True)
                show(pieces, request.verbose)


def show(pieces: Iterable[Piece], verbose: bool) -> None:
    """Prints a text as it comes."""
    start, count = time.monotonic(), 0
    try:
        for piece in pieces:
            count += 1
            print_text(piece.text)
    finally:
        print(flush=True)  # also after Ctrl-C
    if verbose:
        seconds = time.monotonic() - start
        print(f"[{count} tokens in {seconds:.2f} s, {count / max(seconds, 1e-9):.1f} tokens/s]", file=sys.stderr)


def describe(model: Model, index: int, prompt: str, ids: list[int], pieces: Iterable[Piece]) -> dict[str, Any]:
    """One continuation and its figures as plain data; `tokens` and `logprobs` include the token that ended it."""
    start = time.monotonic()
    first = start
    found: list[Piece] = []
    for piece in pieces:
        first = first if found else time.monotonic()
        found.append(piece)
    end = time.monotonic()
    facts: dict[str, Any] = {
        "index": index,
        "prompt": prompt,
        "text": "".join(piece.text for piece in found),
        "tokens": [piece.token for piece in found],
        "logprobs": [piece.logprob for piece in found],
        "finish": found[-1].finish,
    }
    if found[0].top:
        facts["top_logprobs"] = [[choice_data(model, choice) for choice in piece.top] for piece in found]
    rate = (len(found) - 1) / (end - first) if len(found) > 1 else None
    facts["timings"] = {
        "prompt_tokens": len(ids),
        "first_token_seconds": first - start,
        "new_tokens": len(found),
        "seconds": end - start,
        "tokens_per_second": rate,
    }
    return facts


def choice_data(model: Model, choice: Choice) -> dict[str, Any]:
    """A likely token as plain data; an incomplete character is shown as U+FFFD."""
    text = model.text_tokenizer().decode([choice.token], skip_special_tokens=False)
    return {"token": choice.token, "text": text, "logprob": choice.logprob}


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: one a line, empty lines left out, or the `prompt` of each row of a `.jsonl` file.

    Raises:
        ConfigError: naming the file and the line that cannot be read.
    """
    try:
        text = decode_text(path.read_bytes(), path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a file of prompts") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"{path}: holds no prompt")
    if path.suffix != ".jsonl":
        return [line for _, line in lines]
    return [row_prompt(path, number, line) for number, line in lines]


def row_prompt(path: Path, number: int, line: str) -> str:
    """The prompt of one row of JSON."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # the latter where brackets are nested a thousand deep
        raise ConfigError(f"{path}: line {number} is not JSON; expected one object a line") from None
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str):
        raise ConfigError(f"{path}: line {number}: expected an object with a text under `prompt`")
    return prompt


def open_model(file: Path, load_options: dict[str, Any]) -> Model:
    """Loads a model; prints a note on standard error where it will run slowly or an option has no effect."""
    model = load(file, **load_options)
    if model.tokenizer is None:
        model.close()
        raise ConfigError(
            f"{file}: has no tokenizer, which text needs; put the model's tokenizer.json (or tokenizer.model) into the folder"
        )
    if isinstance(model.network, Decoder):  # not ONNX Runtime
        note_kernels(model)
        note_chi(model, load_options.get("chi"))
    return model


def note_chi(model: Model, chi: int | None) -> None:
    """Prints a note where --chi is not below the largest bond, so that it changes nothing."""
    largest = model.weights.spec.largest_bond()
    if chi is not None and chi >= largest:
        has = f"the largest bond is {largest}" if largest else "the model has no cores"
        print(f"note: --chi {chi} changes nothing: {has}", file=sys.stderr)


def note_kernels(model: Model) -> None:
    """Prints a note where the model runs without native kernels or without float32 copies of its weights."""
    from mpo_runtime import native

    if not native.available():
        print(
            "note: running without native kernels (no C++ compiler was found at install); reinstall with one for speed",
            file=sys.stderr,
        )
    if not getattr(model.network.ops, "held", True):
        print(
            "note: too little memory for float32 weights; they are rebuilt for every token, which is slow",
            file=sys.stderr,
        )


def read_stdin() -> str:
    """All of standard input; raises ConfigError where it is not UTF-8."""
    if sys.stdin.isatty():
        print("(reading from the terminal; end with Ctrl-D on a line of its own)", file=sys.stderr)
    content = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
    return decode_text(content, "standard input")


# A model's text must not steer the terminal: control characters except tab and line feed are left out there.
_CONTROLS = dict.fromkeys([code for code in [*range(32), *range(127, 160)] if chr(code) not in "\t\n"])


def print_text(text: str) -> None:
    """Prints generated text at once, without control characters where standard output is a terminal."""
    if text:
        print(text.translate(_CONTROLS) if sys.stdout.isatty() else text, end="", flush=True)
