"""What to do with a file that was just written."""

from __future__ import annotations

from pathlib import Path

from mpo_formats import MpoFile


def wrote(path: Path) -> str:
    """That a file was written, and the command that suits it: a chat needs a template, a text a tokenizer."""
    with MpoFile(path) as file:
        if file.file("tokenizer.json") is None:
            return f"wrote {path}; see what is in it: mpo-run info {path}"
        if file.file("chat_template.jinja") is None:
            return f'wrote {path}; it has no chat template, let it continue a text: mpo-run generate {path} -p "…"'
    return f"wrote {path}; talk to it: mpo-run chat {path}"
