"""Whether another library's tokenizer reads the embedded model's files as this runtime does: the same ids on every text.

    python benchmarks/nano/tokenizers_agree.py --corpus ../shared/corpus --model DIR --peer transformers
    python benchmarks/nano/tokenizers_agree.py --corpus ../shared/corpus --model DIR --peer onnxruntime-genai

The peer is what is installed (transformers 4 or 5; onnxruntime-genai with onnx). onnxruntime-genai opens a tokenizer
only beside a model: a one-layer ONNX graph without meaning is written for it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from corpus import DOMAINS, documents
from tokenizers import Tokenizer

AWKWARD = [
    "it's 1234 o'clock!\n\nNew line  two spaces",
    "<|start_of_role|>user<|end_of_role|>Hi there<|end_of_text|>\n",
    "naïve café — “quotes” 日本語 🙂",
    "  leading\ttabs\r\nCRLF  ",
    'fn main() { println!("x"); }',
]
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
RENDERED = (
    "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>Hello.<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
)
Encode = Callable[[str], list[int]]


def transformers_peer(folder: Path) -> tuple[Encode, str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    return lambda text: tokenizer.encode(text, add_special_tokens=False), rendered


def write_empty_model(folder: Path, vocabulary: int) -> None:
    """model.onnx that answers zeros, and the genai_config.json that names its inputs."""
    import onnx
    from onnx import TensorProto, helper

    def floats(name: str, *sizes: int) -> onnx.TensorProto:
        return helper.make_tensor(name, TensorProto.FLOAT, sizes, np.zeros(sizes, np.float32).tobytes(), raw=True)

    def value(name: str, kind: int, *sizes: str | int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, sizes)

    parts = ("key", "value")
    past = [value(f"past_key_values.0.{part}", TensorProto.FLOAT, "b", 1, "p", 8) for part in parts]
    present = [value(f"present.0.{part}", TensorProto.FLOAT, "b", 1, "t", 8) for part in parts]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "head"], ["logits"]),
        *(helper.make_node("Identity", [f"past_key_values.0.{part}"], [f"present.0.{part}"]) for part in parts),
    ]
    inputs = [value(name, TensorProto.INT64, "b", "s") for name in ("input_ids", "attention_mask")]
    outputs = [value("logits", TensorProto.FLOAT, "b", "s", vocabulary), *present]
    tables = [floats("table", vocabulary, 8), floats("head", 8, vocabulary)]
    graph = helper.make_graph(nodes, "empty", [*inputs, *past], outputs, tables)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "model.onnx"
    )
    names = {
        "inputs": {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
        "outputs": {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
    }
    sizes = {"head_size": 8, "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    decoder = {"filename": "model.onnx", **sizes, "num_key_value_heads": 1, **names}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = {"type": "granite", "vocab_size": vocabulary, "context_length": 1024, **ids, "decoder": decoder}
    (folder / "genai_config.json").write_text(json.dumps({"model": model, "search": {"max_length": 1024}}))


def genai_peer(folder: Path) -> tuple[Encode, str]:
    import onnxruntime_genai

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
            shutil.copyfile(folder / file, place / file)
        write_empty_model(place, json.loads((folder / "config.json").read_text())["vocab_size"])
        tokenizer = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(place)))
    rendered = tokenizer.apply_chat_template(json.dumps(MESSAGES), add_generation_prompt=True)
    return lambda text: [int(token) for token in tokenizer.encode(text)], rendered


def texts(corpus: Path) -> list[str]:
    """Awkward texts, and the begins of up to 500 documents of each part of the corpus."""
    found = list(AWKWARD)
    for domain in DOMAINS:
        found += [text[:1500] for text in documents(corpus, domain, "test")][:500]
    return found


PEERS = {"transformers": transformers_peer, "onnxruntime-genai": genai_peer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--peer", choices=PEERS, required=True)
    arguments = parser.parse_args()
    ours = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    encode, rendered = PEERS[arguments.peer](arguments.model)
    found = texts(arguments.corpus)
    differing = [text for text in found if encode(text) != ours.encode(text, add_special_tokens=False).ids]
    print(
        f"{arguments.peer} {version(arguments.peer)}: {len(found)} texts, {len(differing)} with other ids; "
        f"chat template {'equal' if rendered == RENDERED else 'differs'}"
    )
    for text in differing[:5]:
        print(f"  {text[:100]!r}")
    if differing or rendered != RENDERED:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
