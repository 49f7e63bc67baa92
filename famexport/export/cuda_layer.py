"""The parts of a layer, each made of ONNX Runtime's operators or of famexport's own, and the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from famexport.export.cuda_net import Step
from famexport.export.passes import MS


@dataclass(frozen=True)
class Residual:
    """Rows of the residual stream [b, n, D], float32, and what a fused operator is still to do with them.

    Args:
        delta: to be added, in the weights' dtype.
        fam: [b, F, D], which stands for the first F rows of ``base``.
    """

    base: ir.Value
    delta: ir.Value | None = None
    fam: ir.Value | None = None


class LayerStep(Step):
    """What the steps do with rows, attention apart."""

    def _qkv(self, i: int, z: ir.Value) -> ir.Value:
        """[b, n, D] -> queries, keys and values side by side [b, n, (H+2*Hkv)*Dh]."""
        name, width, bias = self._qkv_proj(i)
        return self._linear(z, name, self.c.hidden_size, width, bias)

    def _qkv_proj(self, i: int) -> tuple[str, int, bool]:
        """Its name, its width, and whether it has a bias."""
        c = self.c
        width = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        return f"model.layers.{i}.self_attn.qkv_proj", width, c.qkv_bias

    def _heads(self, i: int, qkv: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """q [b, n, H*Dh], k and v [b, n, Hkv*Dh], not rotated."""
        c, net, name = self.c, self.net, f"model.layers.{i}.self_attn"
        q_width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        q, k, v = net.ops("Split", qkv, net.ints(q_width, kv_width, kv_width), outputs=3, axis=2)
        if c.qk_norm:
            q, k = self._head_norm(q, f"{name}.q_norm"), self._head_norm(k, f"{name}.k_norm")
        return q, k, v

    def _slots(self, i: int) -> list[list[ir.Value]]:
        """M slots of keys, and M of values, oldest first."""
        return [
            [self.net.input(f"past_{kind}_{i:02d}.{j}", self.type, self._slot_shape) for j in range(m)]
            for kind in ("key", "value")
            if (m := self.c.memory_segments)
        ]

    def _memory(self, i: int, own: Sequence[ir.Value]) -> Sequence[ir.Value]:
        """Keys and values [b, columns, Hkv*Dh] of the slots, followed by those of the open block."""
        pairs = zip(self._slots(i), own, strict=False)
        return [self._join(*past, value) for past, value in pairs] or own

    @property
    def _slot_shape(self) -> tuple[int, int, int]:
        return self.plan.batch, self.plan.rows, self.c.num_key_value_heads * self.c.head_dim

    def _open_slot(self, i: int, kind: str) -> ir.Value:
        return self.net.input(f"past_open_{kind}_{i:02d}", self.type, self._slot_shape)

    def _attend(self, q: ir.Value, keys: ir.Value, values: ir.Value, columns: int, bias: ir.Value | None) -> ir.Value:
        return self._attention(q, self._repeat(keys, columns), self._repeat(values, columns), bias)

    def _attention(
        self, q: ir.Value, keys: ir.Value, values: ir.Value, bias: ir.Value | None = None, **attributes: int
    ) -> ir.Value:
        inputs: list[ir.Value | None] = [q, keys, values]
        inputs += [] if bias is None else [None, None, bias]
        return self.net.op("MultiHeadAttention", *inputs, domain=MS, num_heads=self.c.num_attention_heads, **attributes)

    def _finish(self, i: int, x: Residual, heads: ir.Value) -> Residual:
        """What follows attention: output projection, feed-forward, residuals."""
        c, name = self.c, f"model.layers.{i}"
        width = c.num_attention_heads * c.head_dim
        attended = self._linear(heads, f"{name}.self_attn.o_proj", width, c.hidden_size, c.out_bias)
        x, inner = self._inner(self._add(x, attended), f"{name}.post_attention_layernorm", f"{name}.mlp")
        down = self._linear(inner, f"{name}.mlp.down_proj", c.intermediate_size, c.hidden_size, c.mlp_bias)
        return self._add(x, down)

    def _add(self, x: Residual, delta: ir.Value) -> Residual:
        return replace(x, delta=delta) if self.fused else Residual(self._sum(x.base, delta))

    def _sum(self, base: ir.Value, delta: ir.Value) -> ir.Value:
        return self.net.op("Add", base, self._float(delta))

    def _skip_norm(
        self, x: Residual, name: str, fam: tuple[ir.Value, ir.Value] | None = None, *, apart: bool = False
    ) -> tuple[ir.Value | None, Residual, ir.Value]:
        """With ``apart`` the first F rows as they were left; the residual from here; and the normed rows, in the
        weights' dtype.

        Args:
            fam: as ``_fam`` gives it: what from here stands for the first F rows.
        """
        if self.fused:
            scale, bias = self._norm_weights(name, self.c.hidden_size)
            state = None if fam is None else fam[0]
            whole, normed, left = self.kernels.skip_norm(x.base, x.delta, scale, bias, x.fam, state, apart=apart)
            return left, Residual(whole, fam=state), normed
        if fam is None:
            return None, x, self._norm(x.base, name, self.c.hidden_size)
        left = self._slice(x.base, 0, self.c.fam_length) if apart else None
        rows = residual = self._over(fam[0], x.base)
        if fam[1] is not fam[0]:
            residual = self._over(fam[1], x.base)
        return left, Residual(residual), self._norm(rows, name, self.c.hidden_size)

    def _head(
        self, x: Residual, rows: int, pick: Callable[[ir.Value], ir.Value], *, apart: bool = False
    ) -> ir.Value | None:
        """Logits of the rows that ``pick`` gives, the first output. Returns with ``apart`` the first F rows as the last
        layer left them."""
        c, net, weight, left = self.c, self.net, self.embed, None
        if self.fused:
            left, _, normed = self._skip_norm(x, "model.norm", apart=apart)
            normed = pick(normed)
        else:
            if apart:
                left = self._slice(x.base, 0, c.fam_length)
            normed = self._norm(pick(x.base), "model.norm", c.hidden_size)
        if weight is None or not c.tie_word_embeddings:
            weight = net.input("lm_head.weight", self.type, (c.vocab_size, c.hidden_size))
        logits = self._float(self._product(normed, weight, None))
        self.outputs.insert(0, net.output(logits, "logits", ir.DataType.FLOAT, (self.plan.batch, rows, c.vocab_size)))
        return left

    def _give_fam(self, i: int, fam: ir.Value | None) -> None:
        if fam is not None:
            self.outputs.append(self.net.output(fam, f"present_fam_{i:02d}", ir.DataType.FLOAT, self._fam_shape))

    def _repeat(self, x: ir.Value, columns: int) -> ir.Value:
        """Key/value heads once for each query head of their group."""
        c, net, b = self.c, self.net, self.plan.batch
        groups = c.num_attention_heads // c.num_key_value_heads
        if groups == 1:
            return x
        x = net.op("Reshape", x, net.ints(b, columns, c.num_key_value_heads, 1, c.head_dim))
        x = net.op("Expand", x, net.ints(b, columns, c.num_key_value_heads, groups, c.head_dim))
        return net.op("Reshape", x, net.ints(b, columns, c.num_attention_heads * c.head_dim))

    def _inner(self, x: Residual, norm: str, name: str) -> tuple[Residual, ir.Value]:
        """The norm of the rows and the feed-forward to its inner width, [b, n, I]."""
        c, d, inner = self.c, self.c.hidden_size, self.c.intermediate_size
        if not c.gated_mlp:
            x, up = self._normed_linear(x, norm, f"{name}.up_proj", inner, c.mlp_bias)
            return x, self._act(up)
        if self.fused and self.kernels.gates:
            return self._normed_linear(x, norm, f"{name}.gate_up_proj", 2 * inner, c.mlp_bias, gate=True)
        _, x, z = self._skip_norm(x, norm)
        up = self._linear(z, f"{name}.up_proj", d, inner, c.mlp_bias)
        return x, self.net.op("Mul", self._act(self._linear(z, f"{name}.gate_proj", d, inner, c.mlp_bias)), up)

    def _normed_linear(
        self, x: Residual, norm: str, name: str, out: int, bias: bool, *, gate: bool = False
    ) -> tuple[Residual, ir.Value]:
        """The norm of the rows times a weight [out, D]; with ``gate`` the gate applied to its second half."""
        d, thin = self.c.hidden_size, self.thin_rows > 0 and not (gate and bias)
        if thin and self.kernels.norms_thin(self.thin_rows):
            scale, _ = self._norm_weights(norm, d)
            whole, y = self.kernels.norm_thin(x.base, x.delta, scale, *self._weights(name, d, out, bias), gate=gate)
            return Residual(whole), y
        _, x, z = self._skip_norm(x, norm)
        weight, shift = self._weights(name, d, out, bias)
        if gate and thin and self._is_thin(weight):
            return x, self.kernels.thin_gated(z, weight)
        y = self._product(z, weight, shift)
        return x, self.kernels.gated_act(y) if gate else y

    def _act(self, x: ir.Value) -> ir.Value:
        kind = self.c.activation
        if kind == "silu":
            return self.net.op("QuickGelu", x, domain=MS, alpha=1.0)
        if kind == "gelu_tanh":
            return self.net.op("FastGelu", x, domain=MS)
        return self.net.op("Gelu", x, domain=MS) if kind == "gelu" else self.net.op("Relu", x)
