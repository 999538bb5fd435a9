"""Bits per byte of a model on the test split of each domain, beside xz -9 on the same text: the table of its card.

    python benchmarks/nano/evaluate.py --corpus ../shared/corpus --model exporter/mpo_exporter/data/granite-nano

Bits of all tokens, role and end markers included, over the UTF-8 bytes of the content alone. xz sees the content alone.
"""

from __future__ import annotations

import argparse
import lzma
import math
from pathlib import Path

import numpy as np
from corpus import DOMAINS, chat_rows, content_bytes, documents, text_documents

from mpo_runtime.measure import perplexity
from mpo_runtime.model import load_network, read_text_files
from mpo_runtime.weights import open_weights


def content(corpus: Path, domain: str) -> bytes:
    """The text of a test split without markers."""
    if domain == "chat":
        rows = chat_rows(corpus / domain / "test.jsonl.gz")
        return "\n".join(message["content"] for messages in rows for message in messages).encode()
    return "\n".join(text_documents(corpus / domain / "test.txt.gz")).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    arguments = parser.parse_args()
    weights = open_weights(arguments.model)
    tokenizer, _ = read_text_files(weights)
    if tokenizer is None:
        raise SystemExit(f"{arguments.model}: has no tokenizer")
    network = load_network(weights)
    total_bits = total_bytes = 0.0
    print("| domain | tokens | bits per byte | xz -9 |\n|---|---|---|---|", flush=True)
    for domain in DOMAINS:
        texts = documents(arguments.corpus, domain, "test")
        ids = np.array([token for text in texts for token in tokenizer.encode(text, parse_special=True)])
        size = content_bytes(arguments.corpus, domain, "test")
        result = perplexity(network, ids)
        bits = result.nats * result.tokens / math.log(2)
        packed = len(lzma.compress(content(arguments.corpus, domain), preset=9)) * 8 / size
        print(f"| {domain} | {result.tokens:,} | {bits / size:.4f} | {packed:.3f} |", flush=True)
        total_bits, total_bytes = total_bits + bits, total_bytes + size
    print(f"| all |  | {total_bits / total_bytes:.4f} |  |")


if __name__ == "__main__":
    main()
