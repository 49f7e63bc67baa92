"""Full attention at a preset's sizes: a decoder whose cache of keys and values grows, a block of tokens at a time.

A fair opponent: rotated keys in the cache, q, k and v in one product and gate and up in another, grouped heads as they
are, the last token's logits alone, residuals in the weights' dtype, and torch's flash attention aligned to the last key
without a mask. (cuDNN's is quicker but built anew for every length.) The cache grows by 8 blocks at a time, which is a
copy: at 1e9 parameters and 3 TB/s those take 0.3 s in all on the way to 258,000 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from famexport.config import FamConfig
from famexport.contract import PRECISION_DTYPE
from samples.scale.meter import Phases, machine, memory, say, stream

GROWTH = 8  # blocks
STD = 0.02


class Weights(NamedTuple):
    """Of one layer, [out, in]; norms [D]."""

    norm: Tensor
    qkv: Tensor
    out: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Decoder:
    """``step`` takes the next tokens [1, T] and gives the last one's logits [V]."""

    def __init__(self, config: FamConfig, dtype: torch.dtype, device: str, compiled: bool = False) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        c, self.at = config, 0
        self.q, self.kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.layers = [
            Weights(
                torch.ones(c.hidden_size, dtype=dtype, device=device),
                self._random(self.q + 2 * self.kv, c.hidden_size),
                self._random(c.hidden_size, self.q),
                torch.ones(c.hidden_size, dtype=dtype, device=device),
                self._random(2 * c.intermediate_size, c.hidden_size),
                self._random(c.hidden_size, c.intermediate_size),
            )
            for _ in range(c.num_hidden_layers)
        ]
        self.table, self.head = (self._random(c.vocab_size, c.hidden_size) for _ in range(2))
        self.caches = [self._cache(0) for _ in self.layers]
        steps = torch.arange(0, c.head_dim, 2, device=device) / c.head_dim
        self.frequencies = 1 / c.rope_theta**steps
        wrap: Callable[[Any], Any] = torch.compile(fullgraph=True, dynamic=False) if compiled else lambda f: f
        self._before, self._after = wrap(self._before_attention), wrap(self._after_attention)
        self.flash: Callable[[], AbstractContextManager[Any]] = nullcontext
        if device == "cuda":  # any other kernel would write the mask out
            self.flash = lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)

    def _random(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(std=STD)

    def _cache(self, tokens: int) -> Tensor:
        shape = (2, tokens, self.config.num_key_value_heads, self.config.head_dim)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        count = tokens.shape[1]
        end = self.at + count
        if end > self.caches[0].shape[1]:
            self._grow(GROWTH * count)
        angles = torch.arange(self.at, end, device=self.device)[:, None] * self.frequencies
        cos, sin = (f(torch.cat([angles, angles], -1))[:, None].to(self.dtype) for f in (torch.cos, torch.sin))
        x = F.embedding(tokens[0], self.table)
        for weights, cache in zip(self.layers, self.caches, strict=True):
            q, cache[0, self.at : end], cache[1, self.at : end] = self._before(x, weights, cos, sin)
            x = self._after(x, self._attend(q, cache[:, :end]), weights)
        self.at = end
        return F.linear(F.rms_norm(x[-1:], x.shape[-1:], eps=self.config.norm_eps), self.head)[0].float()

    def _grow(self, tokens: int) -> None:
        """Room for ``tokens`` more, a layer at a time."""
        more = self._cache(tokens)
        for i in range(len(self.caches)):
            self.caches[i] = torch.cat([self.caches[i], more], 1)
        del more
        if self.device == "cuda":
            torch.cuda.empty_cache()  # of the old ones, which fit no longer

    def _before_attention(self, x: Tensor, w: Weights, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [T, D] -> q [T, H, Dh], k and v [T, Hkv, Dh], rotated."""
        h = F.rms_norm(x, x.shape[-1:], w.norm, self.config.norm_eps)
        parts = F.linear(h, w.qkv).split([self.q, self.kv, self.kv], -1)
        q, k, v = (part.unflatten(-1, (-1, self.config.head_dim)) for part in parts)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _attend(self, q: Tensor, cache: Tensor) -> Tensor:
        """Every token sees all up to itself: [T, H, Dh]."""
        q, k, v = (rows[None].transpose(1, 2) for rows in (q, cache[0], cache[1]))
        with self.flash():
            causal = causal_lower_right(q.shape[2], k.shape[2])
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=self.q != self.kv)
        return heads[0].transpose(0, 1)

    def _after_attention(self, x: Tensor, heads: Tensor, w: Weights) -> Tensor:
        x = x + F.linear(heads.flatten(1), w.out)
        h = F.rms_norm(x, x.shape[-1:], w.post_norm, self.config.norm_eps)
        gate, up = F.linear(h, w.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, w.down)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def measure(config: FamConfig, options: argparse.Namespace) -> dict[str, Any]:
    """The report of one preset, up to the longest of ``options.lengths`` or to the end of memory."""
    phases, device, size = Phases(), options.device, config.block_size
    torch.manual_seed(0)
    with phases("weights"):
        decoder = Decoder(config, getattr(torch, PRECISION_DTYPE[options.precision]), device, options.compile)
        tokens = torch.randint(0, config.vocab_size, (1, size), device=device)
    with phases("warm up"):
        for _ in range(2):
            decoder.step(tokens).cpu()
        decoder.at = 0
    cached = decoder.caches[0][:, :1].nbytes * config.num_hidden_layers
    say(f"  the cache has {cached} bytes a token; {memory(device)['used_bytes'] / 1e9:.2f} GB in use")
    with phases("stream"):
        measured = stream(
            lambda: decoder.step(tokens).cpu(),
            blocks=round(max(options.lengths) / size),
            block_size=size,
            lengths=options.lengths,
            device=device,
        )
    report = {
        "mode": "attention",
        "preset": options.preset,
        "precision": options.precision,
        "compiled": options.compile,
    }
    report |= {"config": config.to_dict(), "cache_bytes_per_token": cached, "phases_s": phases.seconds}
    return report | measured | machine(device)
