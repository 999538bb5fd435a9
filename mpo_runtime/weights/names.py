"""Names of tensors in the checkpoints of families that do not name them as SPEC.md does, and matrices stored as one."""

from __future__ import annotations

import re
from collections.abc import Callable

from mpo_formats.architecture import EMBEDDING, FINAL_NORM, POSITIONS, ModelType

# GPT-Neo: what its checkpoints call the modules of the model and of a block.
NEO = {"wte": EMBEDDING, "wpe": POSITIONS, "ln_f": FINAL_NORM}
NEO_BLOCK = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    **{f"attn.attention.{part}_proj": f"self_attn.{part}_proj" for part in "qkv"},
    "attn.attention.out_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
NEO_MODULE = re.compile(r"(?:transformer\.)?(?:(wte|wpe|ln_f)|h\.(\d+)\.(.+))\.(weight|bias)")
# Dense Granite 4: its one MLP is the shared one beside experts that it does not have.
SHARED_MLP = re.compile(r"(model\.layers\.\d+)\.shared_mlp\.(input|output)_linear\.weight")


def gpt_neo(name: str) -> tuple[str, ...]:
    """SPEC.md's name of a GPT-Neo tensor."""
    found = NEO_MODULE.fullmatch(name)
    if not found:
        return (name,)
    whole, block, inner, kind = found.groups()
    if not whole and inner not in NEO_BLOCK:
        return (name,)
    module = NEO[whole] if whole else f"model.layers.{block}.{NEO_BLOCK[inner]}"
    return (f"{module}_bias.weight" if kind == "bias" and "norm" in module else f"{module}.{kind}",)


def granitemoehybrid(name: str) -> tuple[str, ...]:
    """SPEC.md's names of a tensor of a dense Granite 4; its gate and up projections are one matrix, rows after rows."""
    found = SHARED_MLP.fullmatch(name)
    if not found:
        return (name,)
    parts = ("gate", "up") if found[2] == "input" else ("down",)
    return tuple(f"{found[1]}.mlp.{part}_proj.weight" for part in parts)


RENAMED: dict[ModelType, Callable[[str], tuple[str, ...]]] = {
    "gpt_neo": gpt_neo,
    "granitemoehybrid": granitemoehybrid,
}


def spec_names(kind: ModelType, name: str) -> tuple[str, ...]:
    """SPEC.md's name of a tensor of a checkpoint, or the names of the parts that its rows are divided into equally.

    A name that the family does not have comes back as it is.
    """
    return RENAMED[kind](name) if kind in RENAMED else (name,)


NEO_STORED = {ours: f"transformer.{theirs}" for theirs, ours in NEO.items()}
NEO_BLOCK_STORED = {ours: theirs for theirs, ours in NEO_BLOCK.items()}
BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")


def checkpoint_name(kind: ModelType, name: str) -> str:
    """The name in a checkpoint of a tensor by SPEC.md's name; parts that a checkpoint holds as one matrix have the same.

    The inverse of `spec_names`; parts follow one another in the order in which that names them.
    """
    module, _, part = name.rpartition(".")
    block = BLOCK.fullmatch(module)
    if kind == "granitemoehybrid" and block and block[2].startswith("mlp."):
        inner = "output" if block[2] == "mlp.down_proj" else "input"
        return f"model.layers.{block[1]}.shared_mlp.{inner}_linear.{part}"
    if kind != "gpt_neo":
        return name
    if module.endswith("_bias"):  # of a norm
        module, part = module.removesuffix("_bias"), "bias"
        block = BLOCK.fullmatch(module)
    if block:
        return f"transformer.h.{block[1]}.{NEO_BLOCK_STORED[block[2]]}.{part}"
    return f"{NEO_STORED.get(module, module)}.{part}"
