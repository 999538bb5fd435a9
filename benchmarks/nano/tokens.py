"""Trains the tokenizer on the train splits and writes each split of each domain as one uint16 token file.

python benchmarks/nano/tokens.py --corpus ../shared/corpus --out work/nano
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from corpus import DOMAINS, SPECIAL_TOKENS, documents
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 4096
# Words, single digits, punctuation runs and line breaks apart: the split that GGUF and ONNX tokenizers call "qwen2".
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(corpus: Path) -> Tokenizer:
    """Trains byte-level BPE on a third of the documents of every train split (deterministic)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )

    def sample():
        for domain in DOMAINS:
            for index, document in enumerate(documents(corpus, domain, "train")):
                if domain == "chat" or index % 3 == 0:
                    for token in SPECIAL_TOKENS:
                        document = document.replace(token, "\n")
                    yield document

    tokenizer.train_from_iterator(sample(), trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(arguments.corpus)
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    for domain in DOMAINS:
        for split in ("train", "valid", "test"):
            texts = list(documents(arguments.corpus, domain, split))
            encoded = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
            ids = np.fromiter((token for ids in encoded for token in ids), dtype=np.uint16)
            ids.tofile(arguments.out / f"{domain}.{split}.u16")
            print(f"{domain}/{split}: {len(texts):,} documents, {ids.size:,} tokens", flush=True)


if __name__ == "__main__":
    main()
