"""The FAM block step in PyTorch: the maths of TransformerFAM (arXiv 2404.09173, Algorithms 1 and 2), and nothing else.

``FamModel.step`` takes a whole block. ``append`` takes some tokens of a block, and ``commit`` ends it: the same maths
cut in two, for token rows and for FAM rows (specification, "Between block boundaries").

Shapes: b batch, T block_size, F fam_length, M memory_segments, D hidden_size, H heads, Hkv key/value heads,
Dh head_dim, V vocab_size. Parameter names are those of Hugging Face's Llama, plus ``model.fam_embeddings.weight``
[F, D].

The residual stream is float32 whatever the weights' dtype: FAM adds to itself at every block without decay, and norms
are computed in float32 anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from famexport.config import FamConfig
from famexport.contract import StepContract, contract_for
from famexport.layers import KV, Attention, FeedForward, Norm, attend
from famexport.rotary import Rope, rotate

State = dict[str, Tensor]


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
        memory: KV | None,
        rope: Rope,
        mask: Tensor,
    ) -> tuple[Tensor, Tensor | None, KV | None]:
        """One block through one layer (Algorithm 2): rows [FAM; tokens] attend to columns [FAM; past blocks; tokens].

        Past blocks lie between, so that keys are rotated in one piece, and what is kept is the end of that piece.

        Args:
            x: token rows [b, T, D], float32.
            fam: F_{tau-1} of this layer [b, F, D], or None where F = 0.
            residual: ``fam``, but zeros in a stream's first block.
            memory: keys and values of the past M blocks, each [b, Hkv, M*T, Dh], not rotated; None where M = 0.
            mask: what each row may see, bool [b, 1, F+T, F+M*T+T].
        Returns:
            token rows, F_tau, and the new ``memory``.
        """
        attn, f = self.self_attn, 0 if fam is None else fam.shape[1]
        rows = x if fam is None else torch.cat([fam, x], 1)
        q, k, v = attn.qkv(self.input_layernorm(rows))
        if memory is not None:
            past = memory[0].shape[2]
            k, v = (_joined(own[:, :, :f], old, own[:, :, f:]) for old, own in zip(memory, (k, v), strict=True))
            memory = k[:, :, -past:], v[:, :, -past:]
        heads = attend(rotate(q, rope.query), rotate(k, rope.column), v, mask)
        if residual is not None:
            rows = torch.cat([residual, x], 1)
        rows = self._finish(rows, heads)
        return rows[:, f:], None if fam is None else rows[:, :f], memory

    def append(
        self, x: Tensor, fam: Tensor | None, memory: KV | None, opened: KV, place: Place, rope: Rope, mask: Tensor
    ) -> tuple[Tensor, KV]:
        """The token rows of ``forward`` for some tokens of an open block; columns [FAM; past blocks; open block].

        Args:
            x: token rows [b, c, D], float32.
            opened: the open block's keys and values, each [b, Hkv, T, Dh].
            place: where the tokens stand in the open block.
            mask: what they may see, bool [b, 1, c, F+M*T+T].
        Returns:
            token rows, and the open block's keys and values with those of ``x``.
        """
        attn, f = self.self_attn, 0 if fam is None else fam.shape[1]
        normed = self.input_layernorm(x if fam is None else torch.cat([fam, x], 1))
        k, v = attn.kv(normed)
        opened = place.write(opened[0], k[:, :, f:]), place.write(opened[1], v[:, :, f:])
        past = (k[:, :, :0], v[:, :, :0]) if memory is None else memory
        keys, values = (_joined(own[:, :, :f], old, now) for own, old, now in zip((k, v), past, opened, strict=True))
        q = rotate(attn.q(normed[:, f:]), place.rotary)
        return self._finish(x, attend(q, rotate(keys, rope.column), values, mask)), opened

    def commit(self, fam: Tensor, residual: Tensor, opened: KV, rope: Rope) -> Tensor:
        """The FAM rows of ``forward`` over a full open block: F_tau [b, F, D]."""
        q, k, v = self.self_attn.qkv(self.input_layernorm(fam))
        keys, values = _joined(k, opened[0]), _joined(v, opened[1])
        return self._finish(residual, attend(rotate(q, rope.fam_query), rotate(keys, rope.key), values))

    def _finish(self, rows: Tensor, heads: Tensor) -> Tensor:
        """What follows attention: residuals, output projection, feed-forward."""
        rows = rows + self.self_attn.out(heads)
        finished: Tensor = rows + self.mlp(self.post_attention_layernorm(rows))
        return finished


def _joined(*parts: Tensor) -> Tensor:
    """Keys or values side by side, without those that the model does not have: an empty one is still an operator."""
    parts = tuple(part for part in parts if part.shape[2])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


class Place:
    """Where the tokens of a chunk stand in each row's open block.

    Args:
        opened: positions the block has already, int64 [b].
        length: positions of the chunk that count, int64 [b]; the rest is padding and leaves no trace.
        chunk: c.
    """

    def __init__(self, opened: Tensor, length: Tensor, chunk: int, rope: Rope) -> None:
        size = rope.block_size
        slots, steps = torch.arange(size, device=opened.device), torch.arange(chunk, device=opened.device)
        self.positions = (opened[:, None] + steps).clamp(max=size - 1)  # [b, c]; only padding reaches the limit
        self.rotary = rope.at(self.positions)
        counts = steps < length[:, None]  # [b, c]
        hits = (slots[:, None] == self.positions[:, None]) & counts[:, None]  # [b, T, c]
        self._counts, self._hits, self._chunk = counts[:, None, :, None], hits[:, None], chunk
        self._hit = self._hits.any(-1, keepdim=True)
        self.seen = slots <= self.positions[..., None]  # the open block causally, [b, c, T]

    def write(self, old: Tensor, new: Tensor) -> Tensor:
        """``old`` [b, Hkv, T, Dh] with the rows of ``new`` [b, Hkv, c, Dh] in their places."""
        if self._chunk > 1:
            new = torch.where(self._counts, new, new.new_zeros(()))  # NaN in padding would spread in the product
            new = self._hits.to(new.dtype) @ new  # one-hot, so exact
        return torch.where(self._hit, new, old)


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

    def contract(self, precision: str = "fp32", batch: int | str = 1, **options: Any) -> StepContract:
        """The step contract of this model at a precision and batch; options as in ``contract_for``."""
        return contract_for(self.config, precision, batch, **options)

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

    def step(self, inputs: Tensor, state: State, logits: str | Tensor = "all") -> tuple[Tensor, State]:
        """One block.

        Args:
            inputs: token ids int64 [b, T], or embeddings [b, T, D].
            state: ``past_*`` tensors as in the contract; all zeros is a fresh stream.
            logits: "all" gives every row, "last" the last only; positions int64 [b, n] those, for training.
        Returns:
            logits float32 [b, T, 1 or n, V] and the new state, under the same ``past_*`` names.
        """
        c, count = self.config, state["past_count"]
        x, mask = self._embed(inputs), self._mask(count)
        new: State = {"past_count": self._next_count(count)}
        for i, (layer, (fam, residual, memory)) in enumerate(zip(self.model.layers, self._past(state), strict=True)):
            x, fam, memory = layer(x, fam, residual, memory, self.rope, mask)
            if fam is not None:
                new[f"past_fam_{i:02d}"] = fam.to(state[f"past_fam_{i:02d}"].dtype)
            if memory is not None:
                new[f"past_key_{i:02d}"], new[f"past_value_{i:02d}"] = memory
        if isinstance(logits, Tensor):
            x = x.gather(1, logits[..., None].expand(-1, -1, c.hidden_size))
        elif logits == "last":
            x = x[:, -1:]
        return self._logits(x), new

    forward = step

    def append(self, inputs: Tensor, length: Tensor, state: State, logits: str = "all") -> tuple[Tensor, State]:
        """Some tokens of an open block, which must have room for them.

        Args:
            inputs: token ids int64 [b, c], or embeddings [b, c, D].
            length: positions of each row that count, int64 [b], from 0 (an idle row) to c; the rest is padding.
            state: ``past_*`` tensors, those of the open block too.
            logits: "all" gives every row, "last" that of each row's last position that counts.
        Returns:
            logits float32 [b, c or 1, V] and the open block's new state.
        """
        c, count, opened = self.config, state["past_count"], state["past_open_length"]
        place = Place(opened, length, inputs.shape[1], self.rope)
        x, mask = self._embed(inputs), self._visible(count, place.seen)
        new: State = {"past_open_length": opened + length}
        for i, (layer, (fam, _, memory)) in enumerate(zip(self.model.layers, self._past(state), strict=True)):
            kv = state[f"past_open_key_{i:02d}"], state[f"past_open_value_{i:02d}"]
            x, (new[f"past_open_key_{i:02d}"], new[f"past_open_value_{i:02d}"]) = layer.append(
                x, fam, memory, kv, place, self.rope, mask
            )
        if logits == "last":
            x = x.gather(1, (length - 1).clamp(min=0)[:, None, None].expand(-1, 1, c.hidden_size))
        return self._logits(x), new

    def commit(self, state: State) -> State:
        """End each row's open block if it is full: FAM reads it, memory takes it, and an empty one is opened."""
        c, count = self.config, state["past_count"]
        full = state["past_open_length"] == c.block_size
        new: State = {
            "past_count": torch.where(full, self._next_count(count), count),
            "past_open_length": torch.where(full, 0, state["past_open_length"]),
        }
        full = full[:, None, None]
        for i, (layer, (fam, residual, memory)) in enumerate(zip(self.model.layers, self._past(state), strict=True)):
            opened = state[f"past_open_key_{i:02d}"], state[f"past_open_value_{i:02d}"]
            if fam is not None and residual is not None:
                past = state[f"past_fam_{i:02d}"]
                new[f"past_fam_{i:02d}"] = torch.where(
                    full, layer.commit(fam, residual, opened, self.rope).to(past.dtype), past
                )
            for j, kv in enumerate(("key", "value")):
                if memory is not None:
                    moved = torch.cat([memory[j][:, :, c.block_size :], opened[j]], 2)
                    new[f"past_{kv}_{i:02d}"] = torch.where(full[..., None], moved, memory[j])
                new[f"past_open_{kv}_{i:02d}"] = torch.where(full[..., None], opened[j].new_zeros(()), opened[j])
        return new

    def _embed(self, inputs: Tensor) -> Tensor:
        return (self.model.embed_tokens(inputs) if inputs.dim() == 2 else inputs).float()

    def _next_count(self, count: Tensor) -> Tensor:
        return (count + 1).clamp(max=max(self.config.memory_segments, 1))

    def _past(self, state: State) -> Iterator[tuple[Tensor | None, Tensor | None, KV | None]]:
        """Of each layer: F_{tau-1} and its residual (F_0 and zeros in a stream's first block), and the past blocks."""
        started = (state["past_count"] > 0)[:, None, None]
        first = self.initial_fam() if self.config.fam_length and self.fam_init is None else self.fam_init
        for i in range(self.config.num_hidden_layers):
            fam = residual = memory = None
            if first is not None:
                past = state[f"past_fam_{i:02d}"].float()
                fam = torch.where(started, past, first[i])
                residual = torch.where(started, past, past.new_zeros(()))
            if self.config.memory_segments:
                memory = state[f"past_key_{i:02d}"], state[f"past_value_{i:02d}"]
            yield fam, residual, memory

    def _logits(self, x: Tensor) -> Tensor:
        x = self.model.norm(x)
        return (F.linear(x, self.model.embed_tokens.weight) if self.lm_head is None else self.lm_head(x)).float()

    def _mask(self, count: Tensor) -> Tensor:
        """What a row of a block sees, bool [b, 1, F+T, F+M*T+T]: tokens see what came before them and themselves, FAM
        sees itself and the whole block."""
        c, t, device = self.config, self.config.block_size, count.device
        own = torch.ones(t, t, dtype=torch.bool, device=device).tril()
        tokens = self._visible(count, own.expand(count.shape[0], t, t))
        if not c.fam_length:
            return tokens
        columns = torch.arange(tokens.shape[-1], device=device)
        fam = (columns < c.fam_length) | (columns >= tokens.shape[-1] - t)
        return torch.cat([fam.expand(count.shape[0], 1, c.fam_length, -1), tokens], 2)

    def _visible(self, count: Tensor, own: Tensor) -> Tensor:
        """All of FAM, filled memory slots, and ``own`` [b, n, T] of the block: bool [b, 1, n, F+M*T+T]."""
        c, (b, n, t) = self.config, own.shape
        slots = torch.arange(c.memory_segments * t, device=count.device)
        filled = slots >= (c.memory_segments - count)[:, None] * t  # the oldest slots stay empty longest
        seen = [own.new_ones(b, n, c.fam_length), filled[:, None].expand(b, n, -1), own]
        return torch.cat([columns for columns in seen if columns.shape[-1]], 2)[:, None]
