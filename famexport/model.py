"""The FAM block step in PyTorch: the maths of TransformerFAM (arXiv 2404.09173, Algorithms 1 and 2), and nothing else.

Shapes: b batch, T block_size, F fam_length, M memory_segments, D hidden_size, H heads, Hkv key/value heads,
Dh head_dim, V vocab_size. Parameter names are those of Hugging Face's Llama, plus ``model.fam_embeddings.weight``
[F, D].

The residual stream is float32 whatever the weights' dtype: FAM adds to itself at every block without decay, and norms
are computed in float32 anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from famexport.config import FamConfig
from famexport.contract import StepContract, contract_for

State = dict[str, Tensor]
Rotary = tuple[Tensor, Tensor]  # cos and sin, [positions, Dh/2]


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
        split = (*x.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(split)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(split)).transpose(1, 2)
        return q, k, self.v_proj(x).view(split).transpose(1, 2)

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


class Layer(nn.Module):
    def __init__(self, config: FamConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = Norm(config, config.hidden_size)
        self.post_attention_layernorm = Norm(config, config.hidden_size)

    def forward(
        self,
        x: Tensor,
        fam: Tensor | None,
        residual: Tensor | None,
        memory: tuple[Tensor, Tensor] | None,
        rope: Rope,
        mask: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """One block through one layer (Algorithm 2); columns in the order [past blocks; FAM; tokens].

        Args:
            x: token rows [b, T, D], float32.
            fam: F_{tau-1} of this layer [b, F, D], or None where F = 0.
            residual: ``fam``, but zeros in a stream's first block.
            memory: keys and values of the past M blocks, each [b, Hkv, M*T, Dh], not rotated; None where M = 0.
            mask: what a token row may see, bool [b, 1, T, M*T+F+T].
        Returns:
            token rows, F_tau, and the block's keys and values [b, Hkv, T, Dh], not rotated.
        """
        attn, f = self.self_attn, 0 if fam is None else fam.shape[1]
        rows = x if fam is None else torch.cat([fam, x], 1)
        q, k, v = attn.qkv(self.input_layernorm(rows))
        q, own = rotate(q, rope.query), rotate(k, rope.key)
        keys, values = own, v
        if memory is not None:
            keys = torch.cat([rotate(memory[0], rope.memory), own], 2)
            values = torch.cat([memory[1], v], 2)
        heads = attend(q[:, :, f:], keys, values, mask)
        if fam is not None and residual is not None:
            heads = torch.cat([attend(q[:, :, :f], own, v), heads], 2)  # FAM sees F_{tau-1} and the whole block
            rows = torch.cat([residual, x], 1)
        rows = rows + attn.out(heads)
        rows = rows + self.mlp(self.post_attention_layernorm(rows))
        return rows[:, f:], None if fam is None else rows[:, :f], k[:, :, f:], v[:, :, f:]


class Rope(nn.Module):
    """Constant rotary tables. Positions count from the first token of the open block, so they never grow."""

    def __init__(self, config: FamConfig) -> None:
        super().__init__()
        for name, (cos, sin) in rotary_tables(config).items():
            self.register_buffer(f"{name}_cos", cos, persistent=False)
            self.register_buffer(f"{name}_sin", sin, persistent=False)

    def _table(self, name: str) -> Rotary:
        return getattr(self, f"{name}_cos"), getattr(self, f"{name}_sin")

    @property
    def query(self) -> Rotary:
        """Rows [FAM; tokens] as queries."""
        return self._table("query")

    @property
    def key(self) -> Rotary:
        """Rows [FAM; tokens] as keys."""
        return self._table("key")

    @property
    def memory(self) -> Rotary:
        """Keys of past blocks."""
        return self._table("memory")

    @property
    def prompt(self) -> Rotary:
        """The F summary embeddings before the stream's start."""
        return self._table("prompt")


class Body(nn.Module):
    def __init__(self, config: FamConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.fam_length:
            self.fam_embeddings = nn.Embedding(config.fam_length, config.hidden_size)
        self.layers: Sequence[Layer] = nn.ModuleList(  # type: ignore[assignment]  # a ModuleList is one
            Layer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = Norm(config, config.hidden_size)


class FamModel(nn.Module):
    """A FAM language model. ``step`` is the exported function; ``fold_fam`` turns F_0 into a constant."""

    fam_init: Tensor | None  # F_0 of every layer [L, F, D] once folded

    def __init__(self, config: FamConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.rope = Rope(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("fam_init", None, persistent=False)

    def contract(self, precision: str = "fp32", batch: int | str = 1, **options: str) -> StepContract:
        """The step contract of this model at a precision and batch; options as in ``contract_for``."""
        return contract_for(self.config, precision, batch, **options)  # type: ignore[arg-type]

    def initial_fam(self) -> Tensor:
        """F_0 of every layer [L, F, D], float32: the summary embeddings sent up the stack, seeing only each other."""
        x, levels = self.model.fam_embeddings.weight[None].float(), []
        for layer in self.model.layers:
            levels.append(x[0])
            q, k, v = layer.self_attn.qkv(layer.input_layernorm(x))
            x = x + layer.self_attn.out(attend(rotate(q, self.rope.prompt), rotate(k, self.rope.prompt), v))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return torch.stack(levels)

    def fold_fam(self) -> None:
        """Keep F_0 as a constant from now on: right for inference, wrong while training."""
        if self.config.fam_length:
            with torch.no_grad():
                self.fam_init = self.initial_fam()

    def step(self, inputs: Tensor, state: State, logits: str = "all") -> tuple[Tensor, State]:
        """One block.

        Args:
            inputs: token ids int64 [b, T], or embeddings [b, T, D].
            state: ``past_*`` tensors as in the contract; all zeros is a fresh stream.
            logits: "all" gives every row, "last" the last only.
        Returns:
            logits float32 [b, T or 1, V] and the new state, under the same ``past_*`` names.
        """
        c, count = self.config, state["past_count"]
        started = (count > 0)[:, None, None]
        x = (self.model.embed_tokens(inputs) if inputs.dim() == 2 else inputs).float()
        mask = self._token_mask(count)
        first = self.initial_fam() if c.fam_length and self.fam_init is None else self.fam_init
        new: State = {"past_count": (count + 1).clamp(max=max(c.memory_segments, 1))}
        for i, layer in enumerate(self.model.layers):
            fam = residual = memory = None
            if first is not None:
                past = state[f"past_fam_{i:02d}"].float()
                fam = torch.where(started, past, first[i])
                residual = torch.where(started, past, torch.zeros_like(first[i]))
            if c.memory_segments:
                memory = state[f"past_key_{i:02d}"], state[f"past_value_{i:02d}"]
            x, fam, k, v = layer(x, fam, residual, memory, self.rope, mask)
            if fam is not None:
                new[f"past_fam_{i:02d}"] = fam.to(state[f"past_fam_{i:02d}"].dtype)
            if memory is not None:
                new[f"past_key_{i:02d}"] = torch.cat([memory[0][:, :, c.block_size :], k], 2)
                new[f"past_value_{i:02d}"] = torch.cat([memory[1][:, :, c.block_size :], v], 2)
        return self._logits(x[:, -1:] if logits == "last" else x), new

    forward = step

    def _logits(self, x: Tensor) -> Tensor:
        x = self.model.norm(x)
        return (F.linear(x, self.model.embed_tokens.weight) if self.lm_head is None else self.lm_head(x)).float()

    def _token_mask(self, count: Tensor) -> Tensor:
        """What a token row sees, bool [b, 1, T, M*T+F+T]: filled memory slots, all of FAM, its own block causally."""
        c, t, f = self.config, self.config.block_size, self.config.fam_length
        own = torch.ones(t, f + t, dtype=torch.bool, device=count.device).tril(f)
        own = own[None, None].expand(count.shape[0], 1, t, f + t)
        if not c.memory_segments:
            return own
        slots = torch.arange(c.memory_segments * t, device=count.device)
        filled = slots >= (c.memory_segments - count)[:, None] * t  # the oldest slots stay empty longest
        return torch.cat([filled[:, None, None].expand(-1, 1, t, -1), own], 3)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention with grouped key/value heads: q [b, H, n, Dh], k and v [b, Hkv, m, Dh]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def rotate(x: Tensor, table: Rotary) -> Tensor:
    """Rotary embedding of x [b, heads, n, Dh], pairs (i, i + Dh/2) as in Hugging Face's Llama."""
    cos, sin = (t.to(x.dtype) for t in table)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rotary_tables(config: FamConfig) -> dict[str, Rotary]:
    """The four constant tables, computed in float64, given in float32: query, key, memory, prompt."""
    c, t, f = config, config.block_size, config.fam_length
    tokens = torch.arange(t)
    before, inside = torch.arange(-f, 0), torch.arange(t - f, t)
    positions = {
        "query": torch.cat([inside if c.fam_query_position == "current" else before, tokens]),
        "key": torch.cat([before, tokens]),
        "memory": torch.arange(-c.memory_segments * t, 0),
        "prompt": before,
    }
    inverse = inverse_frequencies(config)
    angles = {name: p.double()[:, None] * inverse for name, p in positions.items()}
    return {name: (a.cos().float(), a.sin().float()) for name, a in angles.items()}


def inverse_frequencies(config: FamConfig) -> Tensor:
    """theta ** (-2i/Dh), float64 [Dh/2], with Llama 3's scaling of low frequencies where the base model has it."""
    inverse = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    s = config.rope_scaling
    if s is None:
        return inverse
    wavelength = 2 * math.pi / inverse
    turns = s.original_max_position_embeddings / wavelength
    smooth = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return inverse * (smooth + (1 - smooth) / s.factor)
