"""What a FAM layer shares with any Llama layer: norm, projections, feed-forward, attention. Hugging Face's names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from famexport.config import FamConfig

KV = tuple[Tensor, Tensor]  # keys and values [b, Hkv, n, Dh], not rotated


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis: computed in float32, given in the weight's dtype."""

    def __init__(self, config: FamConfig, width: int) -> None:
        super().__init__()
        self.eps, self.width = config.norm_eps, width
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if config.norm == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float()
        if self.bias is None:
            y = F.rms_norm(x.float(), (self.width,), weight, self.eps)
        else:
            y = F.layer_norm(x.float(), (self.width,), weight, self.bias.float(), self.eps)
        return y.to(self.weight.dtype)


class Attention(nn.Module):
    """Projections of one layer, shared by token rows and FAM rows."""

    def __init__(self, config: FamConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        width, q, kv = config.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(width, q, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q, width, bias=config.out_bias)
        self.q_norm = Norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = Norm(config, self.head_dim) if config.qk_norm else nn.Identity()

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[b, n, D] -> q [b, H, n, Dh], k and v [b, Hkv, n, Dh], not rotated."""
        return (self.q(x), *self.kv(x))

    def q(self, x: Tensor) -> Tensor:
        heads: Tensor = self.q_norm(self._split(self.q_proj(x))).transpose(1, 2)
        return heads

    def kv(self, x: Tensor) -> KV:
        return self.k_norm(self._split(self.k_proj(x))).transpose(1, 2), self._split(self.v_proj(x)).transpose(1, 2)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim)

    def out(self, heads: Tensor) -> Tensor:
        """[b, H, n, Dh] -> [b, n, D], float32."""
        b, _, n, _ = heads.shape
        rows: Tensor = self.o_proj(heads.transpose(1, 2).reshape(b, n, self.heads * self.head_dim))
        return rows.float()


class FeedForward(nn.Module):
    def __init__(self, config: FamConfig) -> None:
        super().__init__()
        width, inner, self.activation = config.hidden_size, config.intermediate_size, config.activation
        self.gate_proj = nn.Linear(width, inner, bias=config.mlp_bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(width, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, width, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        hidden = self._act(up) if self.gate_proj is None else self._act(self.gate_proj(x)) * up
        rows: Tensor = self.down_proj(hidden)
        return rows.float()

    def _act(self, x: Tensor) -> Tensor:
        if self.activation == "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        if self.activation == "gelu":
            return F.gelu(x)
        return F.relu(x) if self.activation == "relu" else F.silu(x)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention with grouped key/value heads: q [b, H, n, Dh], k and v [b, Hkv, m, Dh]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
