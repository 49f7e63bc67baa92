"""The products of one block alone, on CPUs: what no graph around them can go below.

    python -m samples.products edge

Each weight is another one, as in a model, so none is in a cache when its turn comes. The same shapes as products of
torch (eager float32, float32 packed for oneDNN as torch.compile can have it, bfloat16) and of ONNX Runtime (float32
packed, as in a bundle of one graph; unpacked, as where several graphs share the weights; int8). Prints the median and
the least of the runs in ms.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from famexport.config import PRESETS, FamConfig, preset
from famexport.errors import exit_on_error
from famexport.export.passes import MS, serialize
from famexport.runtime.ort import add_int8_options, import_onnxruntime

Shape = tuple[int, int, int]  # rows, inputs, outputs


def shapes(c: FamConfig) -> list[Shape]:
    """The products with weights of a block: rows are FAM's and the tokens; of the head the tokens'."""
    rows, q, kv = c.fam_length + c.block_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    ups = [c.intermediate_size] * (2 if c.gated_mlp else 1)
    layer = [(rows, c.hidden_size, width) for width in (q, kv, kv, *ups)]
    layer += [(rows, q, c.hidden_size), (rows, c.intermediate_size, c.hidden_size)]
    return layer * c.num_hidden_layers + [(c.block_size, c.hidden_size, c.vocab_size)]


def torch_products(products: list[Shape], dtype: torch.dtype, *, packed: bool = False) -> Callable[[], Any]:
    inputs = {(n, k): torch.randn(n, k).to(dtype) for n, k, _ in products}
    pairs = [(inputs[n, k], torch.randn(m, k).to(dtype)) for n, k, m in products]
    if not packed:
        return lambda: [torch.nn.functional.linear(x, w) for x, w in pairs]
    ops = torch.ops.mkldnn
    pairs = [(x, ops._reorder_linear_weight(w, len(x))) for x, w in pairs]
    return lambda: [ops._linear_pointwise(x, w, None, "none", [], "") for x, w in pairs]


def ort_products(products: list[Shape], *, packed: bool = True, int8: bool = False) -> Callable[[], Any]:
    rng, ort = np.random.default_rng(0), import_onnxruntime()
    dtype, kind = (ir.DataType.UINT8, np.int8) if int8 else (ir.DataType.FLOAT, np.float32)
    inputs = {
        (n, k): ir.Value(name=f"x{n}_{k}", shape=ir.Shape((n, k)), type=ir.TensorType(dtype)) for n, k, _ in products
    }
    weights, nodes = [], []

    def constant(name: str, array: np.ndarray) -> ir.Value:
        weights.append(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
        return weights[-1]

    for i, (n, k, m) in enumerate(products):
        random = rng.integers(-127, 128, (k, m)) if int8 else rng.standard_normal((k, m), np.float32)
        given = [inputs[n, k], constant(f"w{i}", random.astype(kind))]
        if int8:
            scales = np.float32(1), np.ones(m, np.float32), np.uint8(128), np.int8(0)
            given += [constant(f"{name}{i}", array) for name, array in zip("asbz", scales, strict=True)]
        nodes.append(ir.node("MatMulIntegerToFloat" if int8 else "MatMul", given, domain=MS if int8 else ""))
        result = nodes[-1].outputs[0]
        result.name, result.type, result.shape = f"y{i}", ir.TensorType(ir.DataType.FLOAT), ir.Shape((n, m))
    results = [node.outputs[0] for node in nodes]
    graph = ir.Graph(
        [*inputs.values()], results, nodes=nodes, initializers=weights, opset_imports={"": 20, MS: 1}, name="products"
    )
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", str(int(not packed)))
    if int8:
        add_int8_options(options)
    session = ort.InferenceSession(serialize(ir.Model(graph, ir_version=10)), options, ["CPUExecutionProvider"])
    binding = session.io_binding()
    for (n, k), value in inputs.items():
        x = rng.integers(0, 256, (n, k)).astype(np.uint8) if int8 else rng.standard_normal((n, k), np.float32)
        binding.bind_cpu_input(value.name, x)
    for value in results:
        binding.bind_output(value.name, "cpu")
    return lambda: session.run_with_iobinding(binding)


def measured(products: list[Shape], runs: int) -> Iterator[tuple[str, float, float]]:
    """What was measured, the median and the least in ms; one set of weights in memory at a time."""
    made: dict[str, Callable[[], Callable[[], Any]]] = {
        "torch float32": lambda: torch_products(products, torch.float32),
        "torch float32, packed": lambda: torch_products(products, torch.float32, packed=True),
        "torch bfloat16": lambda: torch_products(products, torch.bfloat16),
        "onnxruntime float32, packed": lambda: ort_products(products),
        "onnxruntime float32": lambda: ort_products(products, packed=False),
        "onnxruntime int8": lambda: ort_products(products, int8=True),
    }
    for name, make in made.items():
        run, times = make(), []
        with torch.inference_mode():
            for i in range(runs + 3):
                start = time.perf_counter()
                run()
                if i >= 3:
                    times.append((time.perf_counter() - start) * 1e3)
        yield name, median(times), min(times)
        del run


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args(words)
    products = shapes(preset(options.preset))
    gflop = sum(2 * n * k * m for n, k, m in products) / 1e9
    print(f"{options.preset}: {len(products)} products, {gflop:.3g} GFLOP")
    for name, middle, least in measured(products, options.runs):
        print(f"{name:28} p50 {middle:8.2f} ms, least {least:8.2f} ms", flush=True)


if __name__ == "__main__":
    with exit_on_error():
        main()
