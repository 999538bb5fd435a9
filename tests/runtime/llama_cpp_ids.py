"""Records which ids llama.cpp gives to many texts, in llama_cpp_ids.json beside this file.

    python -m tests.runtime.llama_cpp_ids LLAMA_SERVER

LLAMA_SERVER is the program llama-server of llama.cpp. It reads GGUF files with the vocabulary of the embedded model, one for
each rule by which text is cut, and one with that vocabulary as a SentencePiece BPE. A digest stands for the ids of 100 texts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import torch

from mpo_exporter.source import embedded_model
from tests.gguf_files import Change, byte_level, write_gguf
from tests.helpers import granite_config, random_tensors
from tests.runtime.tokenizer_texts import awkward, begins

RECORD = Path(__file__).with_name("llama_cpp_ids.json")
BYTE_LEVEL = ("llama-bpe", "qwen2", "smollm", "refact", "gpt-2", "starcoder")
SENTENCEPIECE = ("llama", "llama without a prefix")


def texts() -> list[str]:
    return [*awkward(), *begins(embedded_model().parent)]


def embedded_document() -> Any:
    """The embedded model's tokenizer.json, with merges of digits added, in which the rules differ too."""
    document = json.loads((embedded_model() / "tokenizer.json").read_text(encoding="utf-8"))
    digits = [str(digit) for digit in range(10)]
    merges = [
        *itertools.product(digits, digits),
        *((f"{ten}0", "0") for ten in digits),
        *(("Ġ", one) for one in digits),
    ]
    for left, right in merges:
        document["model"]["merges"].append([left, right])
        document["model"]["vocab"][left + right] = len(document["model"]["vocab"])
    return document


def write_vocabulary(path: Path, rule: str) -> Path:
    """A GGUF file of a tiny Llama with the embedded model's vocabulary, which is cut by that rule."""
    document = embedded_document()
    vocabulary = document["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = [token["content"] for token in document["added_tokens"]]
    plain = [token for token in tokens if token not in special]
    if rule in BYTE_LEVEL:
        merges = [tuple(merge) for merge in document["model"]["merges"]]
        change, size = byte_level(plain, merges, rule, special), len(tokens)
    else:
        change, size = as_sentencepiece(plain, rule == "llama")
    config = granite_config(model_type="llama", num_hidden_layers=1, vocab_size=size)
    tensors = {name: tensor.numpy() for name, tensor in random_tensors(config, 0, torch.float32).items()}
    return write_gguf(path, config, tensors, tokenizer=change)


def as_sentencepiece(tokens: Iterable[str], prefix: bool) -> tuple[Change, int]:
    """The tokens that are text as pieces of a SentencePiece BPE, an early one before a late one; how many there are."""
    byte_of = {character: byte for byte, character in gguf_bytes().items()}
    raw = [bytes(byte_of[character] for character in token) for token in tokens]
    decoded = [piece.decode(errors="ignore").replace(" ", "▁") for piece in raw]
    pieces = list(dict.fromkeys(piece for piece in decoded if piece.isprintable() and piece))
    rows = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
    rows += [(piece, 1) for piece in pieces]

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([piece for piece, _ in rows])
        writer.add_token_scores([0.0] * 259 + [-float(rank) for rank in range(len(pieces))])
        writer.add_token_types([kind for _, kind in rows])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_space_prefix(prefix)

    return add, len(rows)


def gguf_bytes() -> dict[int, str]:
    """The character that stands for each byte in a byte-level BPE."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


def digests(encode: Callable[[str], list[int]]) -> list[str]:
    """A digest of the ids of every 100 texts."""
    ids = [encode(text) for text in texts()]
    return [
        hashlib.sha256(json.dumps(ids[start : start + 100]).encode()).hexdigest()[:16]
        for start in range(0, len(ids), 100)
    ]


def server_digests(program: str, file: Path) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [program, "-m", str(file), "--port", str(port), "-c", "64", "-np", "1", "-t", "1", "--no-warmup"]

    def encode(text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        address = f"http://127.0.0.1:{port}/tokenize"
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return list(json.load(answer)["tokens"])

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(120):
                try:
                    encode("ready?")
                    break
                except urllib.error.URLError:
                    time.sleep(0.5)
            return digests(encode)
        finally:
            server.kill()


def main() -> None:
    (program,) = sys.argv[1:]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for rule in (*BYTE_LEVEL, *SENTENCEPIECE):
            found[rule] = server_digests(program, write_vocabulary(Path(folder) / "model.gguf", rule))
            print(f"{rule}: {len(texts())} texts")
    RECORD.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
