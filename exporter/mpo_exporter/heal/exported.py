"""Healing as the last stage of an export: the file that was written is replaced by its healed form."""

from __future__ import annotations

from pathlib import Path

from mpo_exporter.export import Result
from mpo_exporter.heal.data import pack_windows, read_healing_text
from mpo_exporter.heal.distributed import Workers
from mpo_exporter.heal.progress import shown
from mpo_exporter.heal.run import Healed, heal
from mpo_exporter.heal.settings import Settings, parse_tokens
from mpo_formats import MpoError
from mpo_runtime.loading import read_text_files
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint


def heal_settings(
    wanted: bool, tokens: str | None, epochs: float | None, minutes: float | None, text: Path | None = None
) -> Settings | None:
    """What `--heal` and `--heal-tokens`, `--heal-epochs`, `--heal-minutes` and `--heal-text`, which imply it, ask for.

    Raises:
        ConfigError: for two bounds at once, or one that cannot be read.
    """
    if not wanted and all(value is None for value in (tokens, epochs, minutes, text)):
        return None
    return Settings(tokens=None if tokens is None else parse_tokens(tokens), epochs=epochs, minutes=minutes)


def check_healing(folder: Path, settings: Settings, text: Path | None) -> dict[str, str]:
    """Refuses, before the export begins, a healing text that could not be learned from at its end.

    Returns:
        The longest that healing may add to the file's provenance, so that a target in bytes leaves room for it.

    Raises:
        ConfigError: naming file and line of what cannot be read, or for a text that is too short.
    """
    source = Checkpoint(folder)
    tokenizer, template = read_text_files(source)
    source.close()
    words = read_healing_text(text, tokenizer, template, assistant_only=settings.assistant_only)
    pack_windows(words, source.architecture, settings.window, settings.batch)
    digest, number = "0" * 64, "0" * 12
    return {
        "healed_tokens": number,
        "healed_minutes": number,
        "healed_teacher_sha256": digest,
        "healed_text": words.name,
        "healed_text_sha256": digest,
        "healed_codes": "trained",
    }


def heal_exported(
    exported: Result, folder: Path, settings: Settings, text: Path | None, held_out: TokenText | None, device: str
) -> Healed:
    """Heals a file that was just exported from the Hugging Face folder `folder`, in its place.

    The healed file and its certificate are complete before they replace the file, which stays whole if healing fails, and
    as it was where its KL on `held_out` was measured and healing raised it: nothing is written then.

    Raises:
        MpoError: as mpo_exporter.heal.run.heal, and what became of the file.
    """
    path, kl = exported.path, exported.comparison.kl_mean if exported.comparison else None
    try:
        with shown("heal") as update:
            return heal(
                path,
                folder,
                path,
                settings,
                text=text,
                held_out=held_out,
                force=True,
                others=True,
                workers=Workers(device=device),
                progress=update,
                most_kl=kl,
            )
    except MpoError as error:
        raise type(error)(f"{error}; {path} is the file before healing") from None
