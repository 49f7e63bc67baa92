"""The operators of famexport's own kernel library, as nodes of a graph: what each takes, gives and is limited to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from famexport.config import FamConfig
from famexport.export.net import Net

DOMAIN = "famexport"
THIN_ROWS = 8  # that the operators for short chunks take, of the whole batch
_NORMED_BYTES = 44 * 1024  # of them in the weights' dtype, that norm_thin takes
_NORM_WIDTH = 12032  # that SkipNorm takes
_SLOTS = 32  # that the operators with slots take
_TOKEN_HEAD = 256  # width of a head that TokenAttention takes
_ACT = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}

Values = Sequence[ir.Value]


def takes_norms(config: FamConfig) -> bool:
    """Whether the operators take a model's rows: without them it has no fused graphs."""
    return config.hidden_size <= _NORM_WIDTH


@dataclass(frozen=True)
class Fused:
    """Emits them. Each value says its dtype, which ONNX Runtime cannot always infer for operators that are not its own.

    Args:
        type: of the weights, and of all values that are not said to be float32.
    """

    net: Net
    config: FamConfig
    type: ir.DataType

    @property
    def gates(self) -> bool:
        """Whether ``gated_act`` and its like take this model's feed-forward."""
        return self.config.intermediate_size % 8 == 0

    @property
    def packs(self) -> bool:
        """Whether ``block_memory`` takes this model's product of queries, keys and values."""
        c = self.config
        return not c.qk_norm and c.head_dim % 16 == 0 and c.memory_segments <= _SLOTS

    @property
    def packs_tokens(self) -> bool:
        """Whether ``token_attention`` does."""
        return self.packs and self.config.head_dim <= _TOKEN_HEAD

    def skip_norm(
        self,
        base: ir.Value,
        delta: ir.Value | None,
        weight: ir.Value,
        bias: ir.Value | None,
        fam_base: ir.Value | None,
        fam_next: ir.Value | None,
        *,
        apart: bool,
    ) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """base [b, n, D], float32, + delta -> the sum, float32, and its norm; with ``apart`` the sum's first F rows.

        Args:
            fam_base: float32 [b, F, D], which stands for the first F rows of ``base``.
            fam_next: likewise, normed in place of the sum's.
        """
        c, inputs = self.config, (base, weight, delta, fam_base, fam_next, bias)
        fam = c.fam_length if apart or fam_base or fam_next else 0
        attributes = {"fam": fam, "epsilon": c.norm_eps, "centered": int(c.norm == "layernorm")}
        total, normed, *first = self._ops("SkipNorm", *inputs, outputs=3 if apart else 2, **attributes)
        for value in (total, *first):
            value.dtype = ir.DataType.FLOAT
        return total, normed, first[0] if first else None

    def gated_act(self, gate_up: ir.Value) -> ir.Value:
        """gate_up [b, n, 2I] -> act(gate) * up [b, n, I]."""
        return self._ops("GatedAct", gate_up, act=_ACT[self.config.activation])[0]

    def block_memory(
        self, qkv: ir.Value, query: Values, columns: Values, slots: Values, *, split: bool
    ) -> tuple[ir.Value, ...]:
        """qkv [b, F+T, (H+2*Hkv)*Dh] and the slots -> key and value of the block as they are; query, keys and values,
        rotated, heads repeated. With ``split`` the query of the tokens, that of FAM, keys and values without the slots'
        FAM rows, and those that FAM sees.

        Args:
            query, columns: cos and sin, float32, of the rows and of the columns [slots; own].
            slots: of keys, oldest first, and of values.
        """
        heads = self._heads()
        kind, outputs = ("BlockMemorySplit", 8) if split else ("BlockMemory", 5)
        return tuple(self._ops(kind, qkv, *query, *columns, *slots, outputs=outputs, **heads))

    def token_attention(
        self,
        qkv: ir.Value,
        opened: ir.Value,
        length: ir.Value,
        token: Values,
        columns: Values,
        open_slots: Values,
        slots: Values,
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """qkv [b, c, (H+2*Hkv)*Dh] of a chunk -> heads [b, c, H*Dh], and the open block's slots with the chunk's rows.

        Args:
            opened, length: int64 [b], tokens of the open block before the chunk, and of the chunk.
            token, columns: cos and sin, float32, of the block's tokens and of the columns [slots; own].
            open_slots: key and value of the open block.
            slots: as for ``block_memory``.

        All but ``qkv`` must be inputs of the graph or constants: the kernel reads them before earlier nodes have ended.
        """
        assert all(value.producer() is None for value in (opened, length, *token, *columns, *open_slots, *slots))
        inputs = [qkv, opened, length, *token, *columns, *open_slots, *slots]
        heads, key, value, scratch = self._ops("TokenAttention", *inputs, outputs=4, **self._heads())
        scratch.dtype = ir.DataType.FLOAT
        return heads, key, value

    def takes_thin(self, weight: ir.Value) -> bool:
        """Whether ``thin_matmul`` and ``thin_gated`` take a weight [N, K]."""
        return weight.shape is not None and weight.shape.numpy()[1] % 8 == 0

    def thin_matmul(self, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        """x [b, c, K] times weight [N, K]."""
        return self._ops("ThinMatMul", x, weight, bias)[0]

    def thin_gated(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        """``gated_act`` of x [b, c, K] times weight [2I, K]."""
        return self._ops("ThinGated", x, weight, act=_ACT[self.config.activation])[0]

    def norms_thin(self, rows: int) -> bool:
        """Whether ``norm_thin`` takes this model's norms, of so many rows in all."""
        width = self.config.hidden_size
        return self.config.norm == "rmsnorm" and width % 8 == 0 and rows * width * self.type.itemsize <= _NORMED_BYTES

    def norm_thin(
        self,
        base: ir.Value,
        delta: ir.Value | None,
        norm: ir.Value,
        weight: ir.Value,
        bias: ir.Value | None,
        *,
        gate: bool,
    ) -> tuple[ir.Value, ir.Value]:
        """``skip_norm`` without FAM, and ``thin_matmul`` of its norm, or with ``gate`` ``thin_gated``."""
        kind, attributes = "NormThinMatMul", {}
        if gate:
            kind, attributes = "NormThinGated", {"act": _ACT[self.config.activation]}
        inputs = base, norm, weight, delta, bias
        total, y = self._ops(kind, *inputs, outputs=2, epsilon=self.config.norm_eps, **attributes)
        total.dtype = ir.DataType.FLOAT
        return total, y

    def _heads(self) -> dict[str, int]:
        c = self.config
        return {"heads": c.num_attention_heads, "kv_heads": c.num_key_value_heads, "fam": c.fam_length}

    def _ops(self, kind: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: Any) -> Sequence[ir.Value]:
        given = list(inputs)
        while given[-1] is None:  # optional ones that are absent, in the end: not even an empty name
            given.pop()
        values = self.net.ops(kind, *given, domain=DOMAIN, outputs=outputs, **attributes)
        for value in values:
            value.dtype = self.type
        return values
