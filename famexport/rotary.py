"""Rotary embedding with constant tables: positions count from the open block's first token, so no angle ever grows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from famexport.config import FamConfig

Rotary = tuple[Tensor, Tensor]  # cos and sin, [positions, Dh/2]


class Rope(nn.Module):
    """Constant rotary tables. Positions count from the first token of the open block, so they never grow."""

    def __init__(self, config: FamConfig) -> None:
        super().__init__()
        self.block_size = config.block_size
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
    def column(self) -> Rotary:
        """Keys of a step: [FAM; past blocks; tokens]."""
        return self._table("column")

    @property
    def prompt(self) -> Rotary:
        """The F summary embeddings before the stream's start."""
        return self._table("prompt")

    @property
    def token(self) -> Rotary:
        """The T tokens of the open block as queries."""
        return self._table("token")

    @property
    def fam_query(self) -> Rotary:
        """F_{tau-1} as the query that compresses block tau."""
        return self._table("fam_query")

    def at(self, positions: Tensor) -> Rotary:
        """Rows of ``token`` for positions in the open block: int64 [b, n] -> cos and sin [b, 1, n, Dh/2]."""
        cos, sin = self.token
        return cos[positions][:, None], sin[positions][:, None]


def rotate(x: Tensor, table: Rotary) -> Tensor:
    """Rotary embedding of x [b, heads, n, Dh], pairs (i, i + Dh/2) as in Hugging Face's Llama."""
    cos, sin = (t.to(x.dtype) for t in table)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rotary_tables(config: FamConfig) -> dict[str, Rotary]:
    """The constant tables, computed in float64, given in float32, by the names of ``Rope``'s properties."""
    c, t, f = config, config.block_size, config.fam_length
    tokens = torch.arange(t)
    before, inside = torch.arange(-f, 0), torch.arange(t - f, t)
    fam_query = inside if c.fam_query_position == "current" else before
    positions = {
        "query": torch.cat([fam_query, tokens]),
        "fam_query": fam_query,
        "key": torch.cat([before, tokens]),
        "token": tokens,
        "column": torch.cat([before, torch.arange(-c.memory_segments * t, t)]),
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
