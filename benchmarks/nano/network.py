"""The Granite architecture in plain torch, for training only: the runtime has its own code and is tested against it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class NanoConfig:
    """The sizes and multipliers of granite-nano, named as in config.json."""

    vocab_size: int = 4096
    hidden_size: int = 512
    intermediate_size: int = 1280
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    embedding_multiplier: float = 12.0
    residual_multiplier: float = 0.22
    attention_multiplier: float = 1 / 64
    logits_scaling: float = 8.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def hugging_face(self) -> dict[str, object]:
        """The content of config.json."""
        return {
            "architectures": ["GraniteForCausalLM"],
            "model_type": "granite",
            **asdict(self),
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "rope_scaling": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding on [B, H, S, D] (Su et al. 2021), halves rotated as in Hugging Face's layout."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q [B, H, S, D] to k and v [B, H/group, S, D]; q is scaled already.

    Two plain products, the heads of a group as rows of one: three times as fast on a CPU as torch's fused attention.
    """
    batch, heads, length, width = q.shape
    groups = k.shape[1]
    q = q.reshape(batch * groups, -1, width)  # [B·groups, H/groups·S, D]
    scores = torch.bmm(q, k.reshape(batch * groups, length, width).transpose(1, 2))
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    scores = scores.view(batch * groups, -1, length, length).masked_fill(hidden, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype).view(batch * groups, -1, length)
    return torch.bmm(weights, v.reshape(batch * groups, length, width)).view(batch, heads, length, width)


class Block(nn.Module):
    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.config = config
        hidden, inner = config.hidden_size, config.intermediate_size
        keys = config.num_key_value_heads * config.head_dim
        self.input_layernorm = nn.RMSNorm(hidden, config.rms_norm_eps)
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, keys, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(hidden, config.rms_norm_eps)
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        config = self.config
        batch, length, _ = x.shape
        h = self.input_layernorm(x)
        split = (batch, length, -1, config.head_dim)
        q = rotate(self.q_proj(h).view(split).transpose(1, 2), cosine, sine)  # [B, H, S, D]
        k = rotate(self.k_proj(h).view(split).transpose(1, 2), cosine, sine)
        v = self.v_proj(h).view(split).transpose(1, 2)
        y = attend(q.to(v.dtype) * config.attention_multiplier, k.to(v.dtype), v)  # the rotation ran in fp32
        x = x + config.residual_multiplier * self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
        h = self.post_attention_layernorm(x)
        return x + config.residual_multiplier * self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Nano(nn.Module):
    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # Unit residual stream after the embedding multiplier; queries and keys wider because their product is
                # scaled by 1/head_dim and not by its root: without that, attention stays uniform for a million tokens.
                std = 1 / config.embedding_multiplier if "embed" in name else parameter.shape[1] ** -0.5
                if "q_proj" in name or "k_proj" in name:
                    std *= config.head_dim**0.25
                nn.init.normal_(parameter, std=std)

    def forward(self, ids: Tensor) -> Tensor:
        """Maps ids [B, S] to the final normed hidden states [B, S, hidden]."""
        config = self.config
        positions = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
        exponents = torch.arange(0, config.head_dim, 2, device=ids.device, dtype=torch.float32) / config.head_dim
        angles = positions[:, None] * config.rope_theta**-exponents
        cosine, sine = angles.cos(), angles.sin()
        x = self.embed_tokens(ids) * config.embedding_multiplier
        for layer in self.layers:
            x = layer(x, cosine, sine)
        return self.norm(x)

    def loss(self, ids: Tensor, reduction: str = "mean") -> Tensor:
        """Cross entropy in nats of each next token of ids [B, S+1]."""
        hidden = self(ids[:, :-1]) / self.config.logits_scaling  # a power of two: the same logits, one pass less
        logits = F.linear(hidden, self.embed_tokens.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)

    def hugging_face_state(self) -> dict[str, Tensor]:
        """The weights under Hugging Face's names, in bf16."""
        state = {}
        for name, value in self.state_dict().items():
            for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
                name = name.replace(f".{part}", f".self_attn.{part}")
            for part in ("gate_proj", "up_proj", "down_proj"):
                name = name.replace(f".{part}", f".mlp.{part}")
            state[f"model.{name}"] = value.detach().to("cpu", torch.bfloat16).contiguous()
        return state
