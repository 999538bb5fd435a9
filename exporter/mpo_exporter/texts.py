"""Which text an export measures on and calibrates on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mpo_exporter.calibrate.moments import Calibration
from mpo_exporter.calibrate.windows import COUNT, cut_calibration
from mpo_exporter.plan.options import Options
from mpo_exporter.source import Source, data_folder, require_finite_weights
from mpo_formats import ConfigError
from mpo_runtime.evaluation.questions import Task, read_task
from mpo_runtime.text.token_text import BUILT_IN_TEXT, TokenText, read_tokens

# Multiply-adds and tokens that measuring may take if the user says nothing: at most a minute on two slow cores.
MEASURE_BUDGET = 2e11
MOST_TOKENS = 20_000
LEAST_TOKENS = 512


def held_out_text(source: Source, path: Path | None, tokens: int | None) -> tuple[TokenText | None, str]:
    """The text to measure quality on, or None and the reason why nothing is measured.

    Args:
        path: a text that nothing is fitted to; None for the built-in one.
        tokens: how many of its first tokens; 0 measures nothing, None takes as many as take about a minute.

    Raises:
        ConfigError: for a text that cannot be read.
    """
    if tokens == 0:
        return None, "--measure-tokens 0"
    if source.tokenizer is None:
        return None, "the model has no tokenizer.json"
    whole = read_tokens(path or BUILT_IN_TEXT, *source.text_files)
    if tokens is None:
        tokens = min(int(MEASURE_BUDGET / source.architecture.parameters()), MOST_TOKENS)
        if tokens < LEAST_TOKENS:
            return None, "the model is large for this machine; give --measure-tokens N to measure all the same"
    return whole.first(tokens), ""


def read_tasks(source: Source, paths: Sequence[Path]) -> tuple[Task, ...]:
    """The questions of JSONL files.

    Raises:
        ConfigError: for a file that cannot be read, or a model without tokenizer.
    """
    if paths and source.tokenizer is None:
        raise ConfigError(f"--task {paths[0]}: the model has no tokenizer.json to read questions with")
    return tuple(map(read_task, paths))


def calibration_text(source: Source, path: Path | None = None) -> TokenText:
    """A calibration text, chat rows through the chat template; the built-in one if `path` is None.

    Raises:
        ConfigError: for a file that cannot be read or that holds no text.
    """
    return read_tokens(path or data_folder() / "calibration.jsonl", *source.text_files)


def calibration_for(source: Source, options: Options, path: Path | None, windows: int) -> tuple[TokenText | None, str]:
    """The text that a plan's layers are fitted to, or None; and a sentence that says which.

    Plans that measure layers always take a text, the others only one that the user names.

    Args:
        path: the text that the user names.
        windows: of it; 0 uses no text.
    """
    if windows == 0 or not options.fits or (path is None and not options.takes_built_in_text):
        return None, "fitted to the weights alone, without calibration text"
    if source.tokenizer is None and path is None:
        return None, "fitted to the weights alone: the model has no tokenizer.json to read calibration text with"
    text = calibration_text(source, path)
    return text, f"fitted to the calibration text {text.name}"


def calibration_walk(
    source: Source, text: TokenText, folder: Path, windows: int = COUNT, device: str = "cpu"
) -> Calibration:
    """The walk over at most `windows` windows of a calibration text; activations are spilled to `folder`.

    Raises:
        CheckpointError: for weights that are not finite.
        ConfigError: for a text that is too short, or of another vocabulary.
    """
    require_finite_weights(source.weights, source.folder.name)
    cut = cut_calibration(text, source.architecture, count=windows)
    return Calibration(source.weights, cut, folder, device=device)
