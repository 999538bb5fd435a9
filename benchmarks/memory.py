"""Peak memory of calibrating and rounding one block of Granite 3.3 8B's geometry, on random weights.

    python benchmarks/memory.py [--windows 8] [--out benchmarks/results/DATE-memory.json]

Hidden 4096, inner 12800, 32 heads, 8 of keys and values; the vocabulary is cut, because the embedding is only
mapped. The block goes through what an export does to it: the moments on the dense and on the compressed upstream, the target
that makes up for the errors before, error-compensated rounding to 4 bits (one turn of descent: more take time, not memory).
More windows take more time and disk, not memory. Exits with 1 where the peak is above 8 GB.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from parts.results import write_results
from safetensors.torch import save_file

from mpo_exporter.calibrate.moments import Calibration, Moment
from mpo_exporter.quantize.gptq import compensated, target
from mpo_formats.architecture import EMBEDDING
from mpo_runtime.memory import peak_memory
from mpo_runtime.weights.checkpoint import Checkpoint

LIMIT = 8_000_000_000
HIDDEN, INNER, KEYS, VOCABULARY, WINDOW, GROUP = 4096, 12800, 1024, 1024, 256, 128
CONFIG = {
    "architectures": ["GraniteForCausalLM"],
    "model_type": "granite",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0078125,
    "logits_scaling": 16.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def write_checkpoint(folder: Path) -> Path:
    """A checkpoint of one block in bf16."""
    source = torch.Generator().manual_seed(0)
    block = "model.layers.0"
    attention = {"q": (HIDDEN, HIDDEN), "k": (KEYS, HIDDEN), "v": (KEYS, HIDDEN), "o": (HIDDEN, HIDDEN)}
    mlp = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    shapes = {f"{block}.self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
    shapes |= {f"{block}.mlp.{name}_proj.weight": shape for name, shape in mlp.items()}
    shapes["model.embed_tokens.weight"] = (VOCABULARY, HIDDEN)
    tensors = {
        name: (torch.randn(shape, generator=source) / shape[1] ** 0.5).bfloat16() for name, shape in shapes.items()
    }
    for name in (f"{block}.input_layernorm", f"{block}.post_attention_layernorm", "model.norm"):
        tensors[f"{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder


def walk(folder: Path, windows: int) -> list[dict[str, object]]:
    """Calibrates and rounds the block; returns the peak memory so far, in bytes, after each layer."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (windows, WINDOW))
    seen: list[dict[str, object]] = []
    start = time.monotonic()

    def build(name: str, matrix: NDArray[np.float64], moment: Moment) -> NDArray[np.float32]:
        before = time.monotonic()
        if name == EMBEDDING:
            return matrix.astype(np.float32)
        wanted = target(matrix, moment)
        found = compensated(wanted, moment, 4, GROUP, turns=1).matrix().astype(np.float32)
        row = {
            "layer": name,
            "shape": matrix.shape,
            "seconds": round(time.monotonic() - before, 1),
            "peak_bytes": peak_memory(),
        }
        seen.append(row)
        print(
            f"{name} {matrix.shape[0]}×{matrix.shape[1]}: {row['seconds']} s, peak {row['peak_bytes'] / 1e9:.2f} GB",
            flush=True,
        )
        return found

    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        Calibration(Checkpoint(folder), ids, Path(work)).compress(build)
    print(f"{time.monotonic() - start:.0f} s, {windows} windows of {WINDOW} tokens, peak {peak_memory() / 1e9:.2f} GB")
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8, help="of 256 tokens")
    parser.add_argument("--folder", type=Path, help="where the checkpoint and what is spilled go, about 2 GB")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        layers = walk(write_checkpoint(Path(folder) / "model"), arguments.windows)
    write_results(arguments.out, layers, peak_bytes=peak_memory())
    sys.exit(peak_memory() > LIMIT)


if __name__ == "__main__":
    main()
