"""Speed of drafts without a second model (`--speculate ngram`) beside plain decoding, on a model that writes real text.

    python benchmarks/speculation.py smollm2.mpo --text TEXT --out benchmarks/results/DATE-speculation.json

The tasks: copy a text, correct a text, summarise it (the text has about --tokens tokens, from the built-in evaluation text where
none is given), and three open questions, in which little repeats. Both ways generate greedily through the chat template; texts
must be equal. Rounds take turns; the table gives the medians of decoding (without the prompt), and the drafted and kept tokens.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from parts.results import write_results

from mpo_runtime.loading import load
from mpo_runtime.model import Model
from mpo_runtime.text.token_text import BUILT_IN_TEXT, read_tokens

OPEN = ("Why is the sky blue?", "Write a short story about a lighthouse.", "How do I learn to cook?")
REPEATING = {
    "copy": "Repeat the following text word for word:\n\n{text}",
    "correct": "Correct the spelling of the following text and write it again in full:\n\n{text}",
    "summarise": "Summarise the following text:\n\n{text}",
}


def generated(model: Model, prompt: str, most: int) -> tuple[str, Any]:
    """The greedy answer to a prompt, and the figures of the generation."""
    pieces = model.chat([{"role": "user", "content": prompt}], temperature=0, max_tokens=most)
    figures = pieces.start().figures
    return "".join(piece.text for piece in pieces), figures


def measure(plain: Model, drafting: Model, name: str, prompt: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One task in rounds, both ways in turns.

    Raises:
        SystemExit: where the texts differ.
    """
    rates: dict[str, list[float]] = {"plain": [], "ngram": []}
    for _ in range(arguments.rounds):
        texts = []
        for way, model in (("plain", plain), ("ngram", drafting)):
            text, figures = generated(model, prompt, arguments.most)
            texts.append(text)
            rates[way].append(figures.tokens / figures.decode_seconds)
        if texts[0] != texts[1]:
            raise SystemExit(f"{name}: the texts differ\n{texts[0]!r}\n{texts[1]!r}")
    return {
        "task": name,
        "prompt_tokens": figures.prompt_tokens,
        "tokens": figures.tokens,
        "drafted": figures.drafted,
        "accepted": figures.accepted,
        **{f"{way}_tokens_per_second": statistics.median(found) for way, found in rates.items()},
        "ratio": statistics.median(two / one for one, two in zip(rates["plain"], rates["ngram"], strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--text", type=Path, default=BUILT_IN_TEXT, help="the text to copy, correct and summarise")
    parser.add_argument("--tokens", type=int, default=1000, help="of it")
    parser.add_argument("--most", type=int, default=400, help="tokens that are generated at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON")
    arguments = parser.parse_args()
    options: dict[str, Any] = {"threads": arguments.threads, "prefix_bytes": 0}
    with load(arguments.file, **options) as plain, load(arguments.file, speculate="ngram", **options) as drafting:
        tokenizer = plain.text_tokenizer()
        text = tokenizer.decode(read_tokens(arguments.text, tokenizer, None).ids[: arguments.tokens].tolist())
        tasks = {name: prompt.format(text=text) for name, prompt in REPEATING.items()}
        tasks |= {f"question {number}": prompt for number, prompt in enumerate(OPEN, 1)}
        rows = [measure(plain, drafting, name, prompt, arguments) for name, prompt in tasks.items()]
    print("| task | prompt | tokens | drafted | kept | plain, tokens/s | with drafts | ratio |\n|" + "---|" * 8)
    for row in rows:
        cells = [row["task"], *(str(row[key]) for key in ("prompt_tokens", "tokens", "drafted", "accepted"))]
        cells += [f"{row[f'{way}_tokens_per_second']:.1f}" for way in ("plain", "ngram")]
        print("| " + " | ".join([*cells, f"{row['ratio']:.2f}"]) + " |")
    write_results(arguments.out, rows, file=arguments.file.name)


if __name__ == "__main__":
    main()
