"""The options that several commands share, each declared once; environment variables for the common ones.

Groups of them are dataclasses: a command takes the group as one parameter, and `grouped` shows typer its fields.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from mpo_runtime.sampler import SamplingOptions
    from mpo_runtime.text.chat_template import TemplateOptions

File = Annotated[
    Path, typer.Argument(help="A .mpo or GGUF file, a Hugging Face folder, or a name in the store.", show_default=False)
]
Chi = Annotated[
    int | None,
    typer.Option(envvar="MPO_CHI", help="Use only the first CHI values of every bond.", show_default="all"),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--ctx-size", "-c", envvar="MPO_CTX_SIZE", help="Tokens of context.", show_default="the model's, at most 4096"
    ),
]
KvType = Annotated[
    str,
    typer.Option(
        "--kv-type",
        envvar="MPO_KV_TYPE",
        help="What the KV cache is stored in: f32, f16, bf16, int8; auto: f16 on a GPU and with --activations int8.",
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", envvar="MPO_THREADS", help="CPU threads.", show_default="all")
]
Device = Annotated[
    str,
    typer.Option(envvar="MPO_DEVICE", help="cpu, a torch device such as cuda, or auto: the GPU where torch sees one."),
]
Backend = Annotated[
    str,
    typer.Option(
        envvar="MPO_BACKEND",
        help="native (C++), triton (GPU), reference (torch), or auto: triton on a GPU, native on a CPU where it was built.",
    ),
]
Activations = Annotated[
    str,
    typer.Option(
        envvar="MPO_ACTIVATIONS",
        help="What integer weights are multiplied with: int8 (fast; on a GPU bf16), or float (as the reference).",
    ),
]
EngineName = Annotated[
    str,
    typer.Option(
        envvar="MPO_ENGINE",
        help="mpo: this runtime; onnx: ONNX Runtime, for a folder of export-onnx; auto: what fits FILE.",
    ),
]
Speculate = Annotated[
    str | None,
    typer.Option(
        envvar="MPO_SPECULATE",
        help="ngram: try several tokens at once where the text repeats itself; the text stays the same.",
        show_default="off",
    ),
]
PromptCache = Annotated[
    Path | None,
    typer.Option(
        help="A file that keeps the KV cache of the last text from run to run; it is made where it is absent.",
        show_default=False,
    ),
]
Load = Annotated[
    str,
    typer.Option(
        envvar="MPO_LOAD",
        help="Where the native backend reads weights: map (the file), copy (memory of its own), auto (the faster).",
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", "-n", help="At most so many new tokens; never more than the context holds."),
]
Temperature = Annotated[float, typer.Option(envvar="MPO_TEMPERATURE", help="0 always takes the most likely token.")]
TopK = Annotated[int, typer.Option(help="Draw from the K most likely tokens; 0 is off.")]
TopP = Annotated[float, typer.Option(help="Draw from the most likely tokens that make up this probability; 1 is off.")]
MinP = Annotated[float, typer.Option(help="Drop tokens below this share of the most likely one; 0 is off.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 discourages tokens already in the text; 1 is off.")]
FrequencyPenalty = Annotated[
    float, typer.Option(help="Lowers a token's logit for each time it was generated; 0 is off.")
]
PresencePenalty = Annotated[float, typer.Option(help="Lowers a token's logit once it was generated; 0 is off.")]
LogitBias = Annotated[
    list[str] | None, typer.Option(help="ID=BIAS added to a token's logit; may be repeated.", show_default=False)
]
Seed = Annotated[
    int | None, typer.Option(envvar="MPO_SEED", help="Makes sampling reproducible.", show_default="random")
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        help="Text at which to stop, or a special token such as <|im_end|>; may be repeated.", show_default=False
    ),
]
Thinking = Annotated[
    bool | None,
    typer.Option(
        "--thinking/--no-thinking",
        help="Tell the chat template to let the model think first, or not to (thinking, enable_thinking).",
        show_default="the template's",
    ),
]
Tools = Annotated[
    Path | None, typer.Option(help="A JSON file of tools for the chat template: a list of objects.", show_default=False)
]
Documents = Annotated[
    Path | None,
    typer.Option(help="A JSON file of documents for the chat template: a list of objects.", show_default=False),
]
TemplateArgument = Annotated[
    list[str] | None,
    typer.Option(
        "--template-arg",
        help="NAME=VALUE, a variable of the chat template; VALUE is JSON or text; may be repeated.",
        show_default=False,
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        help="Which of the model's chat templates to use, by name.",
        show_default="default; tool_use where it has one and --tools is given",
    ),
]
Window = Annotated[
    int | None,
    typer.Option(help="Tokens of a window; each is run on its own.", show_default="512, or the model's context"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print tokens/s to standard error.")]


@dataclass(frozen=True, slots=True)
class Loading:
    """How a model is loaded to generate."""

    chi: Chi = None
    context: Context = None
    kv_type: KvType = "auto"
    threads: Threads = None
    device: Device = "cpu"
    backend: Backend = "auto"
    activations: Activations = "int8"
    engine: EngineName = "auto"
    speculate: Speculate = None
    prompt_cache: PromptCache = None
    load: Load = "auto"

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `mpo_runtime.load`; a file of --prompt-cache is read after it."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "prompt_cache"}


@dataclass(frozen=True, slots=True)
class Running:
    """How a model is loaded to be measured."""

    chi: Chi = None
    threads: Threads = None
    device: Device = "cpu"
    backend: Backend = "auto"
    activations: Activations = "float"  # figures should not depend on rounded activations
    load: Load = "auto"

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `mpo_runtime.loading.load_network`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class Timing:
    """How a model is loaded to be timed; threads are among what is varied."""

    chi: Chi = None
    kv_type: KvType = "auto"
    device: Device = "cpu"
    backend: Backend = "auto"
    activations: Activations = "int8"

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `mpo_runtime.loading.load_network`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn and where the text ends."""

    temperature: Temperature = 0.7
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    frequency_penalty: FrequencyPenalty = 0.0
    presence_penalty: PresencePenalty = 0.0
    logit_bias: LogitBias = None
    seed: Seed = None
    stop: Stop = None

    def options(self) -> SamplingOptions:
        """The options of the sampler; raises ConfigError naming the one that is out of range."""
        from mpo_runtime.sampler import SamplingOptions

        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "stop"}
        return SamplingOptions(**{**values, "logit_bias": parse_biases(self.logit_bias or [])})


@dataclass(frozen=True, slots=True)
class Templating:
    """What the chat template is told besides the messages."""

    thinking: Thinking = None
    tools: Tools = None
    documents: Documents = None
    template_arg: TemplateArgument = None
    template: Template = None

    def given(self) -> bool:
        """Whether any of them was given."""
        return any(getattr(self, field.name) is not None for field in fields(self))

    def options(self) -> TemplateOptions:
        """The options of the template; raises ConfigError naming the file or option that cannot be read."""
        from mpo_runtime.text.chat_template import TemplateOptions

        return TemplateOptions(
            thinking=self.thinking,
            tools=None if self.tools is None else read_objects(self.tools, "--tools"),
            documents=None if self.documents is None else read_objects(self.documents, "--documents"),
            arguments=parse_arguments(self.template_arg or []),
            template=self.template,
        )


def read_objects(path: Path, option: str) -> list[dict[str, Any]]:
    """The objects of a JSON file, a list of them or a single one; raises ConfigError for another form."""
    from mpo_formats.errors import ConfigError
    from mpo_runtime.text.decode import decode_text

    try:
        text = decode_text(path.read_bytes(), path)
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be read ({error.strerror}); give a JSON file") from None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{option} {path}: is not JSON ({error}); give a list of objects") from None
    rows = [found] if isinstance(found, dict) else found
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{option} {path}: expected a list of objects")
    return rows


def json_or_text(text: str) -> Any:
    """The value that a text stands for as JSON, or the text itself where it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # the latter where brackets are nested a thousand deep
        return text


def parse_arguments(items: list[str]) -> dict[str, Any]:
    """Variables of the chat template from `NAME=VALUE` each; raises ConfigError for another form."""
    from mpo_formats.errors import ConfigError

    arguments = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--template-arg {item}: expected NAME=VALUE, such as thinking=true")
        arguments[name.strip()] = json_or_text(value)
    return arguments


def parse_biases(items: list[str]) -> dict[int, float]:
    """Logit biases by token id from `ID=BIAS` each; raises ConfigError for another form."""
    from mpo_formats.errors import ConfigError

    biases = {}
    for item in items:
        token, _, bias = item.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise ConfigError(f"logit-bias {item}: expected ID=BIAS, such as 42=-5") from None
    return biases


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters that are dataclasses are replaced by their fields, which typer understands."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type[Any]] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if not is_dataclass(hints[name]):
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[name] = hints[name]
        types = get_type_hints(hints[name], include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=types[field.name]
            )
            for field in fields(hints[name])
        ]

    def expanded(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    expanded.__name__, expanded.__doc__ = command.__name__, command.__doc__
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    vars(expanded)["__signature__"] = inspect.Signature(parameters)
    return expanded
