"""What a `.mpo` file says about itself: where its weights came from, and its measured quality (SPEC.md, section 8)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from mpo_formats.codec import describe
from mpo_formats.errors import FormatError
from mpo_formats.spec import require, require_sizes

LONGEST_TEXT = 4096
MOST_OPTIONS = 256
# Control characters could change the terminal on which they are printed; surrogates are not text.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_DIGEST = re.compile("[0-9a-f]{64}")


def require_text(name: str, text: str) -> None:
    """Raises FormatError unless the text is at most 4096 characters without control characters and surrogates."""
    if len(text) > LONGEST_TEXT or _UNSAFE.search(text):
        expected = f"at most {LONGEST_TEXT} characters and no control characters"
        raise FormatError(f"{name}: expected {expected}, found {describe(text)}")


def require_digest(name: str, digest: str) -> None:
    """Raises FormatError unless the text is a sha256 in 64 lower-case hexadecimal digits."""
    if not _DIGEST.fullmatch(digest):
        raise FormatError(f"{name}: expected 64 lower-case hexadecimal digits, found {describe(digest)}")


@dataclass(frozen=True, slots=True)
class Provenance:
    """The source model and the options of the export; `source_sha256` is empty where it was not computed."""

    source: str
    revision: str | None
    source_sha256: str
    exporter: str
    options: dict[str, str]
    calibration_sha256: str | None

    def __post_init__(self) -> None:
        require_text("source", self.source)
        require_text("exporter", self.exporter)
        if self.revision is not None:
            require_text("revision", self.revision)
        if self.source_sha256:
            require_digest("source_sha256", self.source_sha256)
        if self.calibration_sha256 is not None:
            require_digest("calibration_sha256", self.calibration_sha256)
        found = len(self.options)
        require(found <= MOST_OPTIONS, f"options: expected at most {MOST_OPTIONS}, found {found}")
        for key, value in self.options.items():
            require_text("options", key)
            require_text(f"options.{key[:80]}", value)


@dataclass(frozen=True, slots=True)
class Quality:
    """The compressed model compared with the dense one on one text; divergences in nats a token."""

    text: str
    text_sha256: str
    tokens: int
    window: int
    perplexity: float
    perplexity_error: float
    dense_perplexity: float
    kl_mean: float
    kl_999: float
    same_top1: float

    def __post_init__(self) -> None:
        require_text("text", self.text)
        require_digest("text_sha256", self.text_sha256)
        require_sizes("tokens", (self.tokens,), most=2**53)
        require_sizes("window", (self.window,))
        for name in ("perplexity", "dense_perplexity"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name}: expected more than 0, found {describe(value)}")
        error = self.perplexity_error
        require(0 <= error < math.inf, f"perplexity_error: expected at least 0, found {describe(error)}")
        for name in ("kl_mean", "kl_999"):
            # A divergence is not negative, but rounding may make a sum near zero so.
            value = getattr(self, name)
            require(-1e-3 < value < math.inf, f"{name}: expected at least 0, found {describe(value)}")
        share = self.same_top1
        require(0 <= share <= 1, f"same_top1: expected 0 to 1, found {describe(share)}")


@dataclass(frozen=True, slots=True)
class Certificate:
    """The measured quality of a file with all values of its bonds (chi is null), or with their first `chi` values."""

    chi: int | None
    quality: Quality

    def __post_init__(self) -> None:
        if self.chi is not None:
            require_sizes("chi", (self.chi,))


@dataclass(frozen=True, slots=True)
class Certificates:
    """All certificates of a file; empty where nothing was measured."""

    entries: tuple[Certificate, ...]

    def __post_init__(self) -> None:
        # The same chi may be measured on several texts, but only once on each.
        keys = [(entry.chi, entry.quality.text_sha256) for entry in self.entries]
        require(len(set(keys)) == len(keys), "entries: the same chi and text are listed twice")
