"""Runs vLLM's offline class in a process of its own: `python generate.py REQUEST.json RESULT.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def generate(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The tokens that follow each prompt, drawn greedily, and the log-probabilities of the prompts' tokens.

    Raises:
        SystemExit: where the request asks for stock vLLM and this process has imported our plugin.
    """
    from vllm import LLM, SamplingParams

    model = LLM(
        model=request["folder"],
        dtype=request.get("dtype", "float32"),
        max_model_len=256,
        max_num_seqs=16,
        enforce_eager=True,
        tensor_parallel_size=request.get("ranks", 1),
    )
    sampling = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True, prompt_logprobs=0)
    found = model.generate([{"prompt_token_ids": prompt} for prompt in request["prompts"]], sampling)
    if request.get("stock") and (ours := {"mpo_vllm", "mpo_runtime", "mpo_formats"} & set(sys.modules)):
        sys.exit(f"expected vLLM alone, found {sorted(ours)}")
    return [
        {
            "tokens": list(one.outputs[0].token_ids),
            "prompt_logprobs": [
                place[token].logprob
                for place, token in zip(one.prompt_logprobs or [], one.prompt_token_ids or [], strict=True)
                if place is not None
            ],
        }
        for one in found
    ]


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(generate(given)))
