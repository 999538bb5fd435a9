"""Reads the training corpus: documents of each domain, and chat rows rendered in the model's own template.

The corpus folder holds `stories` and `web` (text, documents separated by a line `<|end_of_text|>`) and `chat`
(JSONL with `messages`), each as train, valid and test.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

END_OF_TEXT = "<|end_of_text|>"
START_OF_ROLE = "<|start_of_role|>"
END_OF_ROLE = "<|end_of_role|>"
TOOL_CALL = "<|tool_call|>"
SPECIAL_TOKENS = [END_OF_TEXT, START_OF_ROLE, END_OF_ROLE, TOOL_CALL]
DOMAINS = ("stories", "web", "chat")


def render_chat(messages: list[dict[str, str]]) -> str:
    """Renders messages exactly as chat_template.jinja does, without a generation prompt."""
    return "".join(
        f"{START_OF_ROLE}{message['role']}{END_OF_ROLE}{message['content']}{END_OF_TEXT}\n" for message in messages
    )


def text_documents(path: Path) -> Iterator[str]:
    """Yields the documents of a gzipped text file, without their separator lines."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for document in file.read().split(f"\n{END_OF_TEXT}\n"):
            if document.strip():
                yield document.removesuffix(f"\n{END_OF_TEXT}")


def chat_rows(path: Path) -> Iterator[list[dict[str, str]]]:
    """Yields the messages of each row of a gzipped JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["messages"]


def documents(corpus: Path, domain: str, split: str) -> Iterator[str]:
    """Yields rendered documents; every document ends with the end-of-text token."""
    if domain == "chat":
        for messages in chat_rows(corpus / domain / f"{split}.jsonl.gz"):
            yield render_chat(messages)
    else:
        for document in text_documents(corpus / domain / f"{split}.txt.gz"):
            yield document + END_OF_TEXT


def content_bytes(corpus: Path, domain: str, split: str) -> int:
    """Counts the UTF-8 bytes that a figure in bits per byte divides by: text only, no role or end markers."""
    if domain == "chat":
        rows = chat_rows(corpus / domain / f"{split}.jsonl.gz")
        return sum(len(message["content"].encode()) for messages in rows for message in messages)
    return sum(len(text.encode()) for text in text_documents(corpus / domain / f"{split}.txt.gz"))
