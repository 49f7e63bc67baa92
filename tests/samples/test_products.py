"""``samples.products``: its products are those of a block, and its graphs compute them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from famexport.config import preset
from famexport.runtime import ort
from samples import products as module


@pytest.mark.parametrize(
    "changes", [{}, {"gated_mlp": False}, {"fam_length": 0}, {"num_key_value_heads": 4}, {"head_dim": 16}]
)
def test_shapes_are_those_of_the_model(changes: dict[str, int]) -> None:
    config = preset("tiny", **changes)
    attention = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    t, f, m = config.block_size, config.fam_length, config.memory_segments
    seen = t * (m * t + f + t) + f * (f + t)  # pairs of a row and a column
    flops = sum(2 * n * k * width for n, k, width in module.shapes(config))
    assert flops + attention * seen == config.block_flops(logits="all")


def test_it_prints_each_way_of_multiplying(capsys: pytest.CaptureFixture[str]) -> None:
    module.main(["tiny", "--runs", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"tiny: {len(module.shapes(preset('tiny')))} products, ")
    assert [line.partition("  ")[0].strip() for line in lines[1:]] == [
        "torch float32",
        "torch float32, packed",
        "torch bfloat16",
        "onnxruntime float32, packed",
        "onnxruntime float32",
        "onnxruntime int8",
    ]


@pytest.mark.parametrize(("int8", "overflow"), [(False, False), (True, False), (True, True)])
def test_onnxruntime_computes_them(monkeypatch: pytest.MonkeyPatch, int8: bool, overflow: bool) -> None:
    if int8 and not overflow and ort.signed_products_overflow():
        pytest.skip("only converted weights are right on this CPU")
    monkeypatch.setattr(ort, "signed_products_overflow", lambda: overflow)
    made: list[np.ndarray] = []
    real = np.random.default_rng

    class Noted:
        def __init__(self, seed: int) -> None:
            self.rng = real(seed)

        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any) -> np.ndarray:
                made.append(getattr(self.rng, name)(*arguments))
                return made[-1]

            return call

    monkeypatch.setattr(np.random, "default_rng", Noted)
    bindings: list[Any] = []
    session = module.import_onnxruntime().InferenceSession
    run = session.run_with_iobinding
    monkeypatch.setattr(session, "run_with_iobinding", lambda self, b: (bindings.append(b), run(self, b)))
    module.ort_products([(5, 16, 8), (5, 16, 24)], int8=int8)()
    first, second, x = made
    for got, weight in zip(bindings[0].copy_outputs_to_cpu(), (first, second), strict=True):
        wanted = (x.astype(np.int64) - 128) @ weight if int8 else x @ weight
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_packed_is_the_same_product() -> None:
    products = [(5, 16, 8), (5, 16, 24)]
    torch.manual_seed(0)
    plain = module.torch_products(products, torch.float32)()
    torch.manual_seed(0)
    packed = module.torch_products(products, torch.float32, packed=True)()
    for a, b in zip(plain, packed, strict=True):
        torch.testing.assert_close(a, b)
