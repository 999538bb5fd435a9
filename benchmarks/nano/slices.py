"""Cuts the small fixed texts that ship with the project: evaluation (test split), calibration and healing (train split).

    python benchmarks/nano/slices.py --corpus ../shared/corpus

Each document gives its first paragraphs, up to a limit, and every k-th document is taken, so that a slice is spread over
all sources. Rows of the three domains alternate, so that any beginning of a file holds all of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from corpus import DOMAINS, chat_rows, text_documents

ROOT = Path(__file__).parents[2]
EXPORTER_DATA = ROOT / "exporter" / "mpo_exporter" / "data"
RUNTIME_DATA = ROOT / "mpo_runtime" / "data"
PIECE = 4000  # characters of one document at most


@dataclass(frozen=True)
class Slice:
    """One file: its place, the split it comes from, bytes of each domain, and the phase of the documents taken."""

    path: Path
    split: str
    domain_bytes: int
    phase: int


SLICES = (
    Slice(EXPORTER_DATA / "evaluation.jsonl", "test", 200_000, 0),
    Slice(EXPORTER_DATA / "calibration.jsonl", "train", 100_000, 0),
    Slice(EXPORTER_DATA / "healing.jsonl", "train", 500_000, 1),
    Slice(RUNTIME_DATA / "evaluation.jsonl", "test", 20_000, 1),
)


def rows(corpus: Path, domain: str, split: str) -> list[dict[str, object]]:
    """All rows of a split, long documents cut at a paragraph."""
    if domain == "chat":
        return [
            {"domain": domain, "messages": messages} for messages in chat_rows(corpus / domain / f"{split}.jsonl.gz")
        ]
    result: list[dict[str, object]] = []
    for document in text_documents(corpus / domain / f"{split}.txt.gz"):
        # A long document gives several pieces, far apart.
        for start in range(0, max(len(document) - PIECE // 2, 1), 8 * PIECE):
            begin = document.find("\n\n", start) + 2 if start else 0
            piece = document[begin : begin + PIECE]
            cut = piece.rfind("\n\n") if len(piece) == PIECE else len(piece)
            if cut > 200:
                result.append({"domain": domain, "text": piece[:cut]})
    return result


def spread(items: list[dict[str, object]], limit: int, phase: int) -> Iterator[str]:
    """Yields JSON lines of every k-th item until `limit` bytes, with k as large as the limit allows."""
    lines = [json.dumps(item, ensure_ascii=False) for item in items]
    total = sum(len(line.encode()) for line in lines)
    step = max(1, total // limit - (1 if total // limit > 4 else 0))
    size = 0
    for line in lines[phase % step :: step]:
        size += len(line.encode())
        if size > limit:
            return
        yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    corpus = parser.parse_args().corpus
    for part in SLICES:
        lists = [list(spread(rows(corpus, domain, part.split), part.domain_bytes, part.phase)) for domain in DOMAINS]
        # Domains alternate in proportion to their numbers of rows.
        places = [(index / len(lines), line) for lines in lists for index, line in enumerate(lines)]
        text = "".join(line + "\n" for _, line in sorted(places, key=lambda place: place[0]))
        part.path.parent.mkdir(parents=True, exist_ok=True)
        part.path.write_text(text, encoding="utf-8")
        counts = ", ".join(f"{domain} {len(lines)}" for domain, lines in zip(DOMAINS, lists, strict=True))
        print(f"{part.path.relative_to(ROOT)}: {len(text.encode()):,} bytes, rows: {counts}")


if __name__ == "__main__":
    main()
