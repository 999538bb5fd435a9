"""Grows a trained small model into a wider and deeper one that computes the same function, so that training goes on.

Hidden width is doubled by copying every channel; what read a channel reads both copies at half weight (Net2Net, Chen et
al. 2016, arXiv 1511.05641; HyperCloning, Samragh et al. 2024, arXiv 2409.12903). Halves that would stay equal are
told apart by noise that cancels. New blocks start as copies whose outputs are zero.
"""

from __future__ import annotations

import torch
from network import Nano, NanoConfig
from torch import Tensor

NOISE = 0.3  # of the standard deviation of the matrix that is split


def split_columns(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """[O, I] to [O, 2I] with the same product for an input that is repeated twice."""
    noise = torch.randn(matrix.shape, generator=generator) * (NOISE * float(matrix.std()) / 2)
    return torch.cat((matrix / 2 + noise, matrix / 2 - noise), dim=1)


def split_rows_and_columns(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """[O, I] to [2O, 2I]: repeated input, repeated output."""
    return torch.cat((split_columns(matrix, generator), split_columns(matrix, generator)))


def merge(matrix: Tensor, sources: Tensor, generator: torch.Generator) -> Tensor:
    """[O, I] to [O, sources]: inputs that are copies of inputs `sources`; the copies share the weight, unevenly."""
    counts = torch.bincount(sources, minlength=matrix.shape[1])
    merged = (matrix / counts)[:, sources]
    for source in torch.nonzero(counts == 2).flatten().tolist():
        first, second = torch.nonzero(sources == source).flatten().tolist()
        noise = torch.randn(matrix.shape[0], generator=generator) * (NOISE * float(matrix.std()) / 2)
        merged[:, first] += noise
        merged[:, second] -= noise
    return merged


def grown_block(state: dict[str, Tensor], small: NanoConfig, large: NanoConfig, seed: int) -> dict[str, Tensor]:
    """One block's tensors at the large sizes; heads are doubled within their key-value group."""
    generator = torch.Generator().manual_seed(seed)
    group, per_head = small.num_attention_heads // small.num_key_value_heads, small.head_dim
    heads = [
        first + member
        for first in range(0, small.num_attention_heads, group)
        for _ in range(2)
        for member in range(group)
    ]
    channels = (torch.tensor(heads)[:, None] * per_head + torch.arange(per_head)).flatten()
    neurons = torch.arange(large.intermediate_size) % small.intermediate_size
    out_twice = {
        "o_proj.weight": merge(state["o_proj.weight"], channels, generator),
        "down_proj.weight": merge(state["down_proj.weight"], neurons, generator),
    }
    grown = {name: torch.cat((matrix, matrix)) for name, matrix in out_twice.items()}
    grown["q_proj.weight"] = split_columns(state["q_proj.weight"][channels], generator)
    for name in ("k_proj.weight", "v_proj.weight"):
        grown[name] = split_columns(state[name], generator)
    for name in ("gate_proj.weight", "up_proj.weight"):
        grown[name] = split_columns(state[name][neurons], generator)
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        grown[name] = state[name].repeat(2)
    return grown


def grow(state: dict[str, Tensor], small: NanoConfig, large: NanoConfig, seed: int) -> Nano:
    """The model of `large` that computes what the weights `state` of `small` compute.

    Needs twice the hidden size and heads, the same key-value heads, at most twice the inner size, logits_scaling
    doubled (both copies of a channel add to a logit).
    """
    if (large.hidden_size, large.num_attention_heads, large.num_key_value_heads, large.logits_scaling) != (
        2 * small.hidden_size,
        2 * small.num_attention_heads,
        small.num_key_value_heads,
        2 * small.logits_scaling,
    ):
        raise ValueError("growth doubles hidden size, heads and logits scaling, and keeps the key-value heads")
    model = Nano(large)
    with torch.no_grad():
        model.embed_tokens.weight.copy_(state["embed_tokens.weight"].repeat(1, 2))
        model.norm.weight.copy_(state["norm.weight"].repeat(2))
        for index, block in enumerate(model.layers):
            source = index * small.num_hidden_layers // large.num_hidden_layers
            prefix = f"layers.{source}."
            part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            block.load_state_dict(grown_block(part, small, large, seed + index))
            if index and source == (index - 1) * small.num_hidden_layers // large.num_hidden_layers:
                block.o_proj.weight.zero_()
                block.down_proj.weight.zero_()
    return model
