"""The specification of the FAM block step, taken literally: slow, float64, numpy only, one stream at a time.

Written from the specification and sharing no code with ``famexport.model``, so that agreement of the two means
something. It differs from the model in every choice that the model makes for speed: positions are absolute and grow
with the stream, every block ever seen is kept and the last M are looked at, each row collects the keys it may see in a
list, and there is no mask, no batch and no saturating count.

Symbols: T block_size, F fam_length, M memory_segments, D hidden_size, H heads, Hkv key/value heads, Dh head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray
Weights = Mapping[str, Array]


class LiteralStream:
    """One stream.

    Args:
        config: anything with the fields of a FamConfig.
        weights: name -> float64 array, named as in the checkpoint.
        origin: absolute position of the stream's first token. The mathematics says that it does not matter.
    """

    def __init__(self, config: Any, weights: Weights, origin: int = 0) -> None:
        self.config, self.weights, self.origin = config, weights, origin
        self.blocks = 0  # seen so far
        self.fam = initial_fam(config, weights, origin)  # F_{tau-1} of each layer, [F, D]
        # Of each layer, each block ever seen: its unrotated keys and its values [T, Hkv, Dh].
        self.past: list[list[tuple[Array, Array]]] = [[] for _ in range(config.num_hidden_layers)]

    def block(self, tokens: Array) -> Array:
        """Logits [T, V] of the next block, given as token ids [T] or as embeddings [T, D]."""
        c, size = self.config, self.config.block_size
        x = embed(self.weights, tokens)
        assert len(x) == size
        for layer in range(c.num_hidden_layers):
            x = self._layer(layer, x)
        self.blocks += 1
        return logits(c, self.weights, x)

    def _layer(self, layer: int, x: Array) -> Array:
        c, w, name = self.config, self.weights, f"model.layers.{layer}"
        start = self.origin + self.blocks * c.block_size  # position of this block's first token
        fam = self.fam[layer]
        q, k, v = qkv(c, w, name, x)
        fam_q, fam_k, fam_v = qkv(c, w, name, fam)

        past = []  # (rotated key, value) of every token of the last M blocks
        visible = range(max(0, self.blocks - c.memory_segments), self.blocks)
        for index in visible:
            keys, values = self.past[layer][index]
            first = self.origin + index * c.block_size
            past += [(rotate(c, keys[i], first + i), values[i]) for i in range(c.block_size)]
        of_fam = [(rotate(c, fam_k[i], start - c.fam_length + i), fam_v[i]) for i in range(c.fam_length)]
        own = [(rotate(c, k[t], start + t), v[t]) for t in range(c.block_size)]

        out = []
        for t in range(c.block_size):
            heads = attend(c, rotate(c, q[t], start + t), past + of_fam + own[: t + 1])
            out.append(rest_of_layer(c, w, name, x[t], heads))

        first_query = start - c.fam_length
        if c.fam_query_position == "current":
            first_query += c.block_size
        updated = []
        for i in range(c.fam_length):
            heads = attend(c, rotate(c, fam_q[i], first_query + i), of_fam + own)
            residual = np.zeros_like(fam[i]) if self.blocks == 0 else fam[i]
            updated.append(rest_of_layer(c, w, name, residual, heads))

        self.fam[layer] = np.array(updated).reshape(fam.shape)
        self.past[layer].append((k, v))
        return np.array(out)


def whole_sequence(config: Any, weights: Weights, tokens: Array) -> Array:
    """Logits [n*T, V] of n blocks from the whole sequence at once: in each layer, one attention under one mask.

    The rows are [FAM; block 0; FAM; block 1; ...], the FAM rows before block tau being F_{tau-1}. With F = 0 each layer
    is one pass of banded causal attention. With F > 0 one pass is not enough, and no mask can make it so: what the FAM
    rows of block tau put into a layer is what that same layer gave for those of block tau-1. Hence the pass over the
    whole sequence is repeated, fed its own output; each settles one more block, so n passes settle all of them.
    """
    c, size, fam = config, config.block_size, config.fam_length
    count = len(tokens) // size
    assert count * size == len(tokens)
    index = [(block, i) for block in range(count) for i in range(-fam, size)]  # i < 0 are FAM rows
    mask = np.array([[_sees(c, row, column) for column in index] for row in index])
    key_at = [block * size + i for block, i in index]
    shift = size if c.fam_query_position == "current" else 0
    query_at = [at + shift if i < 0 else at for at, (_, i) in zip(key_at, index, strict=True)]
    is_fam = np.array([i < 0 for _, i in index])
    is_first = np.array([block == 0 for block, _ in index])
    is_last = np.array([block == count - 1 for block, _ in index])

    x = embed(weights, tokens)
    start = initial_fam(c, weights, 0)
    for layer in range(c.num_hidden_layers):
        rows = np.zeros((len(index), c.hidden_size))
        rows[~is_fam] = x
        rows[is_fam & is_first] = start[layer]
        for _ in range(count if fam else 1):
            out = _pass(c, weights, f"model.layers.{layer}", rows, is_fam & is_first, mask, query_at, key_at)
            rows[is_fam & ~is_first] = out[is_fam & ~is_last]
        again = _pass(c, weights, f"model.layers.{layer}", rows, is_fam & is_first, mask, query_at, key_at)
        assert np.array_equal(again, out)  # settled
        x = out[~is_fam]
    return logits(c, weights, x)


def _sees(c: Any, row: tuple[int, int], column: tuple[int, int]) -> bool:
    (block, i), (other, j) = row, column
    if block == other:
        return i < 0 or j < 0 or j <= i  # FAM rows see all of the block; all see FAM; tokens are causal
    return i >= 0 and j >= 0 and 0 < block - other <= c.memory_segments


def _pass(
    c: Any, w: Weights, name: str, rows: Array, no_residual: Array, mask: Array, query_at: list[int], key_at: list[int]
) -> Array:
    q, k, v = qkv(c, w, name, rows)
    q = np.array([rotate(c, row, at) for row, at in zip(q, query_at, strict=True)])
    k = np.array([rotate(c, row, at) for row, at in zip(k, key_at, strict=True)])
    k, v = (np.repeat(x, c.num_attention_heads // c.num_key_value_heads, axis=1) for x in (k, v))
    scores = np.einsum("nhd,mhd->hnm", q, k) / math.sqrt(c.head_dim)
    heads = np.einsum("hnm,mhd->nhd", softmax(np.where(mask, scores, -np.inf)), v)
    residual = np.where(no_residual[:, None], 0.0, rows)
    return rest_of_layer(c, w, name, residual, heads.reshape(len(rows), -1))


def initial_fam(c: Any, w: Weights, origin: int) -> list[Array]:
    """F_0 of every layer: the prompt embeddings sent up the stack just before the stream, seeing only each other."""
    if c.fam_length == 0:
        return [np.zeros((0, c.hidden_size)) for _ in range(c.num_hidden_layers)]
    x, levels = w["model.fam_embeddings.weight"], []
    assert x.shape == (c.fam_length, c.hidden_size)
    for layer in range(c.num_hidden_layers):
        levels.append(x)
        name = f"model.layers.{layer}"
        q, k, v = qkv(c, w, name, x)
        positions = [origin - c.fam_length + i for i in range(c.fam_length)]
        seen = [(rotate(c, k[i], at), v[i]) for i, at in enumerate(positions)]
        heads = [attend(c, rotate(c, q[i], at), seen) for i, at in enumerate(positions)]
        x = np.array([rest_of_layer(c, w, name, row, head) for row, head in zip(x, heads, strict=True)])
    return levels


def embed(w: Weights, tokens: Array) -> Array:
    tokens = np.asarray(tokens)
    return w["model.embed_tokens.weight"][tokens] if tokens.ndim == 1 else tokens.astype(np.float64)


def logits(c: Any, w: Weights, x: Array) -> Array:
    head = "model.embed_tokens" if c.tie_word_embeddings else "lm_head"
    return norm(c, w, "model.norm", x) @ w[f"{head}.weight"].T


def qkv(c: Any, w: Weights, name: str, x: Array) -> tuple[Array, Array, Array]:
    """Rows [n, D] before the layer's first norm -> unrotated q [n, H, Dh], k and v [n, Hkv, Dh]."""
    x, attn = norm(c, w, f"{name}.input_layernorm", x), f"{name}.self_attn"
    q = linear(w, f"{attn}.q_proj", x, c.qkv_bias).reshape(len(x), c.num_attention_heads, c.head_dim)
    k = linear(w, f"{attn}.k_proj", x, c.qkv_bias).reshape(len(x), c.num_key_value_heads, c.head_dim)
    v = linear(w, f"{attn}.v_proj", x, c.qkv_bias).reshape(len(x), c.num_key_value_heads, c.head_dim)
    if c.qk_norm:
        q, k = norm(c, w, f"{attn}.q_norm", q), norm(c, w, f"{attn}.k_norm", k)
    return q, k, v


def attend(c: Any, query: Array, seen: list[tuple[Array, Array]]) -> Array:
    """One row: rotated query [H, Dh] over the (rotated key, value) pairs it may see -> [H*Dh]."""
    group, out = c.num_attention_heads // c.num_key_value_heads, []
    for head in range(c.num_attention_heads):
        scores = np.array([key[head // group] @ query[head] for key, _ in seen]) / math.sqrt(c.head_dim)
        weights = softmax(scores)
        out.append(sum(p * value[head // group] for p, (_, value) in zip(weights, seen, strict=True)))
    return np.concatenate(out)


def rest_of_layer(c: Any, w: Weights, name: str, residual: Array, heads: Array) -> Array:
    """Output projection, both residual additions and the feed-forward, for one row or for many."""
    a = residual + linear(w, f"{name}.self_attn.o_proj", heads, c.out_bias)
    h, mlp = norm(c, w, f"{name}.post_attention_layernorm", a), f"{name}.mlp"
    inner = linear(w, f"{mlp}.up_proj", h, c.mlp_bias)
    if c.gated_mlp:
        inner = activate(c.activation, linear(w, f"{mlp}.gate_proj", h, c.mlp_bias)) * inner
    else:
        inner = activate(c.activation, inner)
    return a + linear(w, f"{mlp}.down_proj", inner, c.mlp_bias)


def linear(w: Weights, name: str, x: Array, bias: bool) -> Array:
    # The bias is asked for by the config and not by its presence: a missing one must not go unnoticed.
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if bias else y


def norm(c: Any, w: Weights, name: str, x: Array) -> Array:
    if c.norm == "rmsnorm":
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + c.norm_eps) * w[f"{name}.weight"]
    centred = x - np.mean(x, -1, keepdims=True)
    scale = np.sqrt(np.mean(centred**2, -1, keepdims=True) + c.norm_eps)
    return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]


def activate(name: str, x: Array) -> Array:
    if name == "relu":
        return np.maximum(x, 0.0)
    if name == "silu":
        return x / (1.0 + np.exp(-x))
    if name == "gelu":
        return 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))
    assert name == "gelu_tanh"
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def softmax(scores: Array) -> Array:
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotate(c: Any, x: Array, position: int) -> Array:
    """Rotary embedding of x [heads, Dh]: the pair (i, i + Dh/2) is a complex number, turned by position * frequency."""
    half = c.head_dim // 2
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * position * frequencies(c))
    return np.concatenate([turned.real, turned.imag], -1)


def frequencies(c: Any) -> Array:
    """theta ** (-2i/Dh), with Llama 3.1's rule for long wavelengths where the config has it."""
    plain = [c.rope_theta ** (-2 * i / c.head_dim) for i in range(c.head_dim // 2)]
    s = c.rope_scaling
    if s is None:
        return np.array(plain)
    scaled, length = [], s.original_max_position_embeddings
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength < length / s.high_freq_factor:
            scaled.append(frequency)
        elif wavelength > length / s.low_freq_factor:
            scaled.append(frequency / s.factor)
        else:
            smooth = (length / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
            scaled.append((1 - smooth) * frequency / s.factor + smooth * frequency)
    return np.array(scaled)
