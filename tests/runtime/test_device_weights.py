"""Where weights lie in device memory: each tensor once, whichever graphs take it alone or packed with others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_cuda import FakeCuda, view
from safetensors.numpy import save_file

from famexport.errors import BundleError
from famexport.runtime.device_weights import DeviceWeights, parts

MLP, ATTENTION = "model.layers.0.mlp", "model.layers.0.self_attn"
GATE_UP, GATE, UP = (f"{MLP}.{kind}_proj.weight" for kind in ("gate_up", "gate", "up"))


def written(folder: Path, width: int) -> dict[str, np.ndarray]:
    """A weight file, with gate and up weights of ``width`` x 16 floats; what it holds."""
    rng = np.random.default_rng(0)
    shapes = {GATE: (width, 16), UP: (width, 16), f"{MLP}.gate_proj.bias": (width,), f"{MLP}.up_proj.bias": (width,)}
    shapes |= {f"{ATTENTION}.{kind}_proj.weight": (rows, 16) for kind, rows in (("q", 8), ("k", 3), ("v", 3))}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "weights.safetensors")
    return tensors


def loaded(folder: Path, *names: str) -> tuple[DeviceWeights, FakeCuda]:
    cuda = FakeCuda()
    return DeviceWeights(folder / "weights.safetensors", names, cuda), cuda


def test_parts() -> None:
    assert parts(f"{MLP}.gate_up_proj.bias") == [f"{MLP}.gate_proj.bias", f"{MLP}.up_proj.bias"]
    assert parts(f"{ATTENTION}.qkv_proj.weight") == [f"{ATTENTION}.{kind}_proj.weight" for kind in "qkv"]
    for name in (UP, GATE, "gate_up_proj", "lm_head.weight"):
        assert parts(name) == [name]


@pytest.mark.parametrize("packed_first", [True, False])
def test_a_tensor_alone_lies_inside_the_packed_one(tmp_path: Path, packed_first: bool) -> None:
    tensors = written(tmp_path, 24)  # 1536 bytes each
    names = [GATE_UP, GATE, UP, f"{ATTENTION}.qkv_proj.weight"]
    weights, cuda = loaded(tmp_path, *(names if packed_first else reversed(names)))
    assert weights.nbytes == 2 * 1536 + 4 * 256  # 896 bytes of qkv
    assert weights.address[GATE] == weights.address[GATE_UP]
    assert weights.address[UP] == weights.address[GATE_UP] + 1536
    assert weights.sizes[UP] == weights.sizes[GATE_UP] // 2 == 1536
    assert cuda.calls == ["in"] * 5
    assert np.array_equal(view(weights.address[UP], np.float32, (24, 16)), tensors[UP])
    both = np.concatenate([tensors[GATE], tensors[UP]])
    assert np.array_equal(view(weights.address[GATE_UP], np.float32, (48, 16)), both)
    weights.close()
    assert not cuda.live


def test_a_tensor_that_is_not_aligned_there_is_a_copy(tmp_path: Path) -> None:
    tensors = written(tmp_path, 25)  # 1600 bytes each
    weights, _ = loaded(tmp_path, UP, GATE, GATE_UP)
    assert weights.address[GATE] == weights.address[GATE_UP]
    assert weights.address[UP] % 256 == 0
    assert weights.nbytes == 1792 + 3328
    for name in (UP, GATE):
        assert np.array_equal(view(weights.address[name], np.float32, (25, 16)), tensors[name])
    both = np.concatenate([tensors[GATE], tensors[UP]])
    assert np.array_equal(view(weights.address[GATE_UP], np.float32, (50, 16)), both)


@pytest.mark.parametrize("names", [(GATE_UP,), (GATE, UP)])
def test_one_form_alone(tmp_path: Path, names: tuple[str, ...]) -> None:
    tensors = written(tmp_path, 24)
    weights, _ = loaded(tmp_path, *names)
    assert weights.address.keys() == set(names)
    assert weights.nbytes == 3072
    for name in names:
        whole = np.concatenate([tensors[part] for part in parts(name)])
        assert np.array_equal(view(weights.address[name], np.float32, whole.shape), whole)


def test_a_part_that_is_not_there(tmp_path: Path) -> None:
    written(tmp_path, 24)
    with pytest.raises(BundleError, match=r"lacks model\.layers\.1\.mlp\.gate_proj\.weight, model\.layers\.1"):
        loaded(tmp_path, "model.layers.1.mlp.gate_up_proj.weight")
