"""Held-out text of three domains, and a judge that compares any weights with the dense model on it."""

from __future__ import annotations

import gzip
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpo_exporter.source import data_folder
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.loading import read_text_files
from mpo_runtime.measure import Comparison, compare, window_logits
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.text.token_text import TokenText, read_tokens
from mpo_runtime.weights.checkpoint import Checkpoint
from mpo_runtime.weights.protocol import Weights

DOMAINS = ("stories", "web", "chat")
# Bytes of a corpus file that are read: this many for each token, and at least this many in total.
TOKEN_BYTES = 8
FEWEST_BYTES = 2_000_000


def domain_texts(source: Checkpoint, corpus: Path | None, split: str, tokens: int) -> dict[str, TokenText]:
    """At most `tokens` tokens of each domain: of a corpus folder's split, or of the embedded evaluation text (test)."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: domain_file(name, corpus, split, Path(folder), tokens) for name in DOMAINS}
        return {name: cut_text(source, file, tokens) for name, file in files.items()}


def domain_file(name: str, corpus: Path | None, split: str, folder: Path, tokens: int) -> Path:
    """One domain's text, at least `tokens` tokens of it where there are so many, as a file that `read_tokens` takes."""
    if corpus is None:
        if split != "test":
            raise SystemExit("the embedded evaluation text is of the test split; give --corpus for another")
        return filtered(data_folder() / "evaluation.jsonl", name, folder)
    [packed] = corpus.glob(f"{name}/{split}.*.gz")
    target = folder / f"{name}-{packed.stem}"
    with gzip.open(packed) as stream:
        raw = stream.read(max(TOKEN_BYTES * tokens, FEWEST_BYTES)).decode("utf-8", "ignore")
    # A row or paragraph that was cut short is left out.
    target.write_text(raw[: raw.rfind("\n") + 1], encoding="utf-8")
    return target


def filtered(path: Path, domain: str, folder: Path) -> Path:
    """The rows of a .jsonl file that are of one domain, as another file."""
    target = folder / f"{domain}-{path.name}"
    rows = [
        line for line in path.read_text(encoding="utf-8").split("\n") if line and json.loads(line)["domain"] == domain
    ]
    target.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return target


def cut_text(source: Checkpoint, path: Path, tokens: int | None) -> TokenText:
    """The first tokens of a text."""
    text = read_tokens(path, *read_text_files(source))
    return text if tokens is None else text.first(tokens)


def calibration_tokens(source: Checkpoint, path: Path | None, domain: str | None) -> TokenText:
    """The calibration text, the embedded one by default, or what of it is of one domain."""
    whole = path or data_folder() / "calibration.jsonl"
    if domain is None:
        return cut_text(source, whole, None)
    with tempfile.TemporaryDirectory() as folder:
        return cut_text(source, filtered(whole, domain, Path(folder)), None)


@dataclass(slots=True)
class Judge:
    """Compares weights with the dense model on each domain's text; the dense model runs once."""

    dense: Decoder
    texts: dict[str, TokenText]
    kept: dict[bytes, NDArray[np.float32]]

    @staticmethod
    def of(source: Checkpoint, texts: dict[str, TokenText]) -> Judge:
        """A judge of these texts; the dense model is not run yet."""
        return Judge(decoder_for(source.spec.architecture, ReferenceOps(source)), texts, {})

    def reference(self, window: NDArray[np.int64]) -> NDArray[np.float32]:
        """The dense model's logits of a window."""
        key = window.tobytes()
        if key not in self.kept:
            self.kept[key] = window_logits(self.dense, window)
        return self.kept[key]

    def weights(self, weights: Weights) -> dict[str, dict[str, float]]:
        """Measures the model of an open file."""
        return self.ops(ReferenceOps(weights))

    def ops(self, ops: ReferenceOps) -> dict[str, dict[str, float]]:
        """The figures by domain, and under `all` those over all domains."""
        model = decoder_for(self.dense.architecture, ops)
        found = {name: compare(model, self.reference, text.ids) for name, text in self.texts.items()}
        return {name: figures([result]) for name, result in found.items()} | {"all": figures(list(found.values()))}


def figures(parts: list[Comparison]) -> dict[str, float]:
    """The figures of several texts together: means over their tokens; squared errors of the mean in nats are added."""
    tokens = sum(part.model.tokens for part in parts)

    def mean(values: list[float]) -> float:
        return sum(value * part.model.tokens for value, part in zip(values, parts, strict=True)) / tokens

    perplexity = math.exp(mean([part.model.nats for part in parts]))
    spread = (
        math.sqrt(sum((part.model.error / part.model.perplexity * part.model.tokens) ** 2 for part in parts)) / tokens
    )
    return {
        "tokens": tokens,
        "perplexity": perplexity,
        "perplexity_error": perplexity * spread,
        "dense_perplexity": math.exp(mean([part.reference.nats for part in parts])),
        "kl_mean": mean([part.kl_mean for part in parts]),
        "kl_999": max(part.kl_999 for part in parts),
        "same_top1": mean([part.same_top1 for part in parts]),
    }
