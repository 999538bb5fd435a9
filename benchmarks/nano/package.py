"""Writes a trained model in Hugging Face layout, as it ships inside the exporter.

python benchmarks/nano/package.py --data work/nano --out exporter/mpo_exporter/data/granite-nano
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from network import Nano, NanoConfig
from safetensors.torch import save_file

# The role tokens of Granite 3, without its default system message: a model of this size cannot follow one.
CHAT_TEMPLATE = """{%- for message in messages %}
{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_of_role|>assistant<|end_of_role|>' }}
{%- endif %}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of tokens.py and train.py")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    config = NanoConfig()
    model = Nano(config)
    saved = torch.load(arguments.data / "nano.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(saved["model"])
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    save_file(model.hugging_face_state(), out / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(arguments.data / "tokenizer.json", out / "tokenizer.json")
    write(out / "config.json", config.hugging_face())
    write(out / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0})
    token = "<|end_of_text|>"
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token,
        "eos_token": token,
        "pad_token": token,
        "unk_token": token,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
    }
    write(out / "tokenizer_config.json", settings)
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    print(f"{out}: step {saved['step']}, {sum(p.numel() for p in model.parameters()):,} parameters")


def write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
