"""The torch backends: options in names, compiled equal to eager, and the check for NaN that GPUs use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import random_input

import famexport as fx
from famexport.errors import IncompatibleError, UsageError
from famexport.runtime.torch_reference import parse_name


def test_names() -> None:
    assert parse_name("torch") == ("torch", set())
    assert parse_name("torch-compile:cuda,max-autotune") == ("torch-compile", {"cuda", "max-autotune"})


@pytest.mark.parametrize("name", ["torch:gpu", "torch:", "torch:max-autotune", "torch:cpu,cuda", "torch:tf32"])
def test_wrong_options(name: str, bundles: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="has no option|contradict"):
        fx.load(bundles("plain"), name)
    with pytest.raises(UsageError, match="no backend 'ort-cpu:cuda'"):
        fx.load(bundles("plain"), "ort-cpu:cuda")


def test_no_gpu_is_said(bundles: Callable[[str], Path]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(IncompatibleError, match="sees no CUDA device"):
        fx.load(bundles("plain"), "torch:cuda")


@pytest.mark.parametrize("name", ["all_rows", "all_bf16"])
@pytest.mark.parametrize("value", [None, np.nan, np.inf, -np.inf])
def test_norms_see_what_is_not_finite(sessions: Callable[..., Any], name: str, value: float | None) -> None:
    session = sessions(name, "torch")
    with session.stream() as stream:
        loop = stream._loop
        out = np.zeros(session.contract.outputs[0].sized(loop.batch), np.float32)
        loop.advance(random_input(session.contract, 8, batch=loop.batch), out)
        assert bool(loop._norms_are_finite())
        assert loop.bad_rows(out) == []
        if value is not None:
            loop._new["past_key_00"] = loop._new["past_key_00"].clone()  # an inference tensor cannot be written to
            loop._new["past_key_00"][-1, 0, 3, 1] = value
            assert not bool(loop._norms_are_finite())
            assert loop.bad_rows(out) == [loop.batch - 1]


@pytest.mark.slow
def test_compiled_is_eager(bundles: Callable[[str], Path]) -> None:
    with fx.load(bundles("all"), "torch") as eager, fx.load(bundles("all"), "torch-compile") as compiled:
        assert compiled.info()["backend"] == "torch-compile"
        with eager.stream() as a, compiled.stream() as b:
            for i, n in enumerate((8, 8, 8, 3, 5, 8)):
                fed = [random_input(eager.contract, n, seed=i)]
                for x, y in zip(a.feed(fed), b.feed(fed), strict=True):
                    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
            for name, value in a.state().items():
                np.testing.assert_allclose(value, b.state()[name], rtol=1e-4, atol=1e-4)
