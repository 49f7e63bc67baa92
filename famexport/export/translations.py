"""How the operators that matter most become ONNX primitives below opset 23, where ONNX has no operator of their own.

The exporter's own translations repeat keys and values for grouped heads, and take a reciprocal in RMSNorm that runtimes
do not recognise as a norm. These keep the patterns that ONNX Runtime and TensorRT look for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_ONNX_FLOAT, _ONNX_FLOAT16, _ONNX_BFLOAT16 = 1, 10, 16
_ONNX_BOOL = 9
_DEFAULT_EPS = torch.finfo(torch.float32).eps  # of torch.nn.RMSNorm, whatever the dtype
_LOWEST = {_ONNX_FLOAT: -3.0e38, _ONNX_FLOAT16: -65504.0, _ONNX_BFLOAT16: -3.0e38}


def primitive_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The table for ``torch.onnx.export(custom_translation_table=...)``: opset-20 primitives only."""
    from onnxscript import opset20 as op

    def constant(value: float, dtype: int) -> Any:
        """A scalar of an ONNX element type."""
        scalar = op.Constant(value_float=value)
        return scalar if dtype == _ONNX_FLOAT else op.Cast(scalar, to=dtype)

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        """Grouped heads fold into rows, so keys and values are never repeated; the scale goes before the product."""
        if dropout_p or is_causal:
            raise NotImplementedError("attention with dropout or is_causal is not exported; pass a mask")
        heads, rows, width = query.shape[1], query.shape[2], query.shape[3]
        kv_heads = key.shape[1]
        groups, dtype = heads // kv_heads, int(query.dtype)
        query = op.Mul(query, constant(scale or width**-0.5, dtype))
        if groups > 1:
            query = op.Reshape(query, op.Constant(value_ints=[0, kv_heads, groups * rows, width]))
        scores = op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2]))
        if attn_mask is not None:
            bias = attn_mask  # added to the scores, unless it says what may be seen
            if int(attn_mask.dtype) == _ONNX_BOOL:
                bias = op.Where(attn_mask, constant(0.0, dtype), constant(_LOWEST[dtype], dtype))
            scores = op.Add(scores, op.Concat(*[bias] * groups, axis=2) if groups > 1 else bias)
        out = op.MatMul(op.Softmax(scores, axis=-1), value)
        return op.Reshape(out, op.Constant(value_ints=[0, heads, rows, width])) if groups > 1 else out

    def rms_norm(x: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
        if len(normalized_shape) != 1:
            raise NotImplementedError("rms_norm is exported over the last axis only")
        dtype = int(x.dtype)
        mean = op.ReduceMean(op.Pow(x, constant(2.0, dtype)), op.Constant(value_ints=[-1]), keepdims=1)
        y = op.Div(x, op.Sqrt(op.Add(mean, constant(_DEFAULT_EPS if eps is None else eps, dtype))))
        return y if weight is None else op.Mul(y, weight)

    return {
        torch.ops.aten.scaled_dot_product_attention.default: attention,
        torch.ops.aten.rms_norm.default: rms_norm,
    }
