"""Writes files of Granite 3.3's sizes with random weights: good for speed and memory, for nothing else.

    python benchmarks/synthetic.py --size 2b --plan 4 --out /tmp/granite-2b-4bit.mpo

A plan is a width (8, 6, 5, 4, 3, 2), a mixture such as 2,3,4 (blocks take the widths in turn), or `dense` for bf16; each with
cores where `+chi32` follows, and with inputs transformed in blocks of 128: by Hadamard's matrix where `+h` follows, by stored
matrices of 4 bits, one for all blocks, where `+t` does. Groups are 32 columns at 4 bits and more, 64 below; the embedding has 6
bits (as wide as the rest where that is 8, bf16 in `dense`). Or it is one of mpo-export's named plans: `int4`, `paper+chi600`,
`k-proj`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpo_exporter.plan.named import plan_layers
from mpo_exporter.plan.options import Options
from mpo_exporter.terms import operator
from mpo_formats import (
    Architecture,
    Dense,
    FileSpec,
    LinearSpec,
    ModelSpec,
    MpoWriter,
    Provenance,
    Quantized,
    Rope,
    Term,
    Transform,
    VectorSpec,
)
from mpo_formats.architecture import EMBEDDING
from mpo_formats.layout import TensorSpec
from mpo_runtime.loading import open_weights
from mpo_runtime.weights.checkpoint import EMBEDDED

# hidden, MLP, blocks, heads, key-value heads, head size
SIZES = {
    "8b": (4096, 12800, 40, 32, 8, 128),
    "2b": (2048, 8192, 40, 32, 8, 64),
    "tiny": (256, 768, 4, 4, 2, 64),
}
VOCABULARY = 49159
NOISE = 1 << 22
# Inputs that are transformed together, and the first of the layers that read the same input.
BLOCK = 128
FIRST = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True, slots=True)
class SyntheticPlan:
    """What every matrix of the blocks becomes; blocks take the widths in turn."""

    widths: tuple[int, ...]
    chi: int = 0
    transform: str = ""
    named: str = ""

    @classmethod
    def parse(cls, text: str) -> SyntheticPlan:
        """Reads `4`, `2,3,4`, `dense`, each perhaps with `+chi32` and `+h` or `+t`; or a named plan, perhaps with a χ."""
        if found := re.fullmatch(r"(int4|paper|k-proj)(?:\+chi(\d+))?", text):
            return cls((), int(found[2] or 0), named=found[1])
        found = re.fullmatch(r"(dense|[2-8](?:,[2-8])*)(?:\+chi(\d+))?(?:\+([ht]))?", text)
        if not found:
            raise SystemExit(f"--plan {text}: expected a width, widths with commas, dense or a named plan")
        widths = () if found[1] == "dense" else tuple(map(int, found[1].split(",")))
        return cls(widths, int(found[2] or 0), found[3] or "")

    def terms(self, name: str, rows: int, columns: int) -> tuple[Term, ...]:
        """The terms of one layer."""
        if not self.widths:
            return (Dense("bf16"),)
        if name == EMBEDDING:
            return (Quantized(max(6, min(self.widths)), 32, False),)
        bits = self.widths[int(name.split(".")[2]) % len(self.widths)]
        base = Quantized(bits, 32 if bits >= 4 else 64, False)
        cores = (operator((rows, 1), (1, columns), self.chi, "int8"),) if self.chi else ()
        return (base, *cores)

    def layer(self, name: str, rows: int, columns: int) -> LinearSpec:
        """One layer; those that read the same input share a stored transform, under the name of the first."""
        found = LinearSpec(name, rows, columns, None, self.terms(name, rows, columns))
        if self.transform == "h":
            return replace(found, hadamard=BLOCK)
        if self.transform == "t":
            module, _, kind = name.rpartition(".")
            first = ".".join(filter(None, (module, FIRST.get(kind, kind))))
            return replace(found, transform=Transform(first, BLOCK, 1, Quantized(4, 64, False)))
        return found


def granite(size: str) -> Architecture:
    """Granite 3.3's architecture at `size`: 8b, 2b, or a tiny one for a quick try."""
    hidden, inner, blocks, heads, keys, head = SIZES[size]
    return Architecture(
        model_type="granite",
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=head,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope=Rope(1e7, "default", 1.0, 0.0, 0.0, 0),
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=1 / head,
        logits_scaling=16.0 if size == "8b" else 8.0,
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_ids=(),
        pad_token_id=None,
    )


def synthetic_linears(size: str, plan: SyntheticPlan) -> tuple[LinearSpec, ...]:
    """The layers of a plan."""
    if plan.named:
        dense = synthetic_spec(size, synthetic_linears(size, SyntheticPlan(())), {})
        return plan_layers(dense, Options(plan.named, plan.chi or None))
    return tuple(plan.layer(name, rows, columns) for name, rows, columns, _ in granite(size).linear_sizes())


def text_files(model: Path | None) -> dict[str, bytes]:
    """The files about text of a model in any form, for `write_layers`."""
    if model is None:
        return {}
    weights = open_weights(model)
    found = {name: weights.file(name) for name in EMBEDDED}
    return {name: content for name, content in found.items() if content is not None}


def synthetic_spec(size: str, linears: tuple[LinearSpec, ...], files: Mapping[str, bytes]) -> ModelSpec:
    """The header of the file to write."""
    architecture = granite(size)
    vectors = tuple(VectorSpec(name, size, "bf16") for name, size in architecture.vector_sizes())
    provenance = Provenance(
        source=f"synthetic-{size}",
        revision=None,
        source_sha256="0" * 64,
        exporter="benchmarks/synthetic.py",
        options={"weights": "random"},
        calibration_sha256=None,
    )
    embedded = tuple(FileSpec(name, len(content)) for name, content in files.items())
    return ModelSpec(architecture, linears, vectors, embedded, provenance)


class Noise:
    """Random tensors cut from one buffer, so that gigabytes are written as fast as the disk takes them."""

    def __init__(self, seed: int) -> None:
        self.bytes = np.random.default_rng(seed).integers(0, 256, NOISE, np.uint8)
        gaussian = np.random.default_rng(seed).standard_normal(NOISE // 4).astype(np.float32)
        self.gaussian = gaussian

    def tensor(self, tensor: TensorSpec, columns: int) -> NDArray[np.generic]:
        """Codes are uniform, scales such that a product keeps the size of its input, norms 1."""
        count = int(np.prod(tensor.shape))
        deviation = columns**-0.5
        if tensor.dtype == "u8":
            return np.resize(self.bytes, count).reshape(tensor.shape)
        if len(tensor.shape) == 1:
            return np.full(tensor.shape, 0x3F80, np.uint16)  # 1 in bf16
        if tensor.name.endswith(".scale"):
            width = 256 if ".core" in tensor.name else 8
            return np.full(tensor.shape, 3.4 * deviation / width, np.float16)
        wide = np.resize(self.gaussian * np.float32(deviation), count)
        if tensor.dtype == "f16":
            return wide.astype(np.float16).reshape(tensor.shape)
        return (wide.view(np.uint32) >> 16).astype(np.uint16).reshape(tensor.shape)


def write_synthetic(size: str, plan: SyntheticPlan, path: Path, seed: int = 0, tokenizer: Path | None = None) -> None:
    """Writes the file of a plan; an existing one is replaced."""
    write_layers(size, synthetic_linears(size, plan), path, seed, tokenizer)


def write_layers(
    size: str, linears: tuple[LinearSpec, ...], path: Path, seed: int = 0, tokenizer: Path | None = None
) -> None:
    """Writes a file of these layers; an existing one is replaced."""
    files = text_files(tokenizer)
    spec = synthetic_spec(size, linears, files)
    columns = {linear.name: linear.in_features for linear in spec.linears}
    noise = Noise(seed)
    with MpoWriter(path, spec, force=True) as writer:
        for tensor in writer.pending():
            name = tensor.name.removeprefix("file.")
            if name in files:
                writer.write(tensor.name, np.frombuffer(files[name], np.uint8))
                continue
            layer = re.sub(r"\.(\d+|transform)\.(weight|q\d|scale|core\d.*)$", "", tensor.name)
            writer.write(tensor.name, noise.tensor(tensor, columns.get(layer, 1)))
        writer.commit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="2b")
    parser.add_argument("--plan", default="4")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="a model whose tokenizer is taken, as servers need one")
    arguments = parser.parse_args()
    write_synthetic(arguments.size, SyntheticPlan.parse(arguments.plan), arguments.out, tokenizer=arguments.tokenizer)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
