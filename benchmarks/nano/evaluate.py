"""Bits per byte of a model on the test split of each domain, beside xz -9 on the same text: the table of its card.

    python benchmarks/nano/evaluate.py --corpus ../shared/corpus --model exporter/mpo_exporter/data/granite-nano

Bits of all tokens, role and end markers included, over the UTF-8 bytes of the content alone. xz sees the content alone.
With --transformers the same windows also go through that library's own model: the two columns must agree.
"""

from __future__ import annotations

import argparse
import lzma
import math
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from corpus import DOMAINS, chat_rows, content_bytes, documents, text_documents

from mpo_runtime.loading import load_network, open_weights, read_text_files
from mpo_runtime.measure import cut_windows, perplexity


def content(corpus: Path, domain: str) -> bytes:
    """The text of a test split without markers."""
    if domain == "chat":
        rows = chat_rows(corpus / domain / "test.jsonl.gz")
        return "\n".join(message["content"] for messages in rows for message in messages).encode()
    return "\n".join(text_documents(corpus / domain / "test.txt.gz")).encode()


def transformers_bits(folder: Path, windows: list[np.ndarray]) -> float:
    """Bits of every predicted token of `windows` under transformers, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    nats = 0.0
    with torch.no_grad():
        for window in windows:
            ids = torch.from_numpy(window)[None]
            nats += float(F.cross_entropy(model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="sum"))
    return nats / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--transformers", action="store_true", help="a column for the same model under transformers")
    arguments = parser.parse_args()
    weights = open_weights(arguments.model)
    tokenizer, _ = read_text_files(weights)
    if tokenizer is None:
        raise SystemExit(f"{arguments.model}: has no tokenizer")
    network = load_network(weights)
    total_bits = total_bytes = 0.0
    peer = " under transformers |" if arguments.transformers else ""
    print(f"| domain | tokens | bits per byte |{peer} xz -9 |\n|---|---|---|{'---|' if peer else ''}---|", flush=True)
    for domain in DOMAINS:
        texts = documents(arguments.corpus, domain, "test")
        ids = np.array([token for text in texts for token in tokenizer.encode(text, parse_special=True)])
        size = content_bytes(arguments.corpus, domain, "test")
        result = perplexity(network, ids)
        bits = result.nats * result.tokens / math.log(2)
        packed = len(lzma.compress(content(arguments.corpus, domain), preset=9)) * 8 / size
        if peer:
            peer = f" {transformers_bits(arguments.model, cut_windows(ids, network, None)) / size:.4f} |"
        print(f"| {domain} | {result.tokens:,} | {bits / size:.4f} |{peer} {packed:.3f} |", flush=True)
        total_bits, total_bytes = total_bits + bits, total_bytes + size
    print(f"| all |  | {total_bits / total_bytes:.4f} |{' |' if peer else ''}  |")


if __name__ == "__main__":
    main()
