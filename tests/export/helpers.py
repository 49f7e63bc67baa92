"""Small models whose weights matter, and what each of them is exported as.

The weights are large: queries and keys give uneven attention, norms are not one and biases not zero. Under small weights
attention is nearly uniform, and an error in scores, positions or masks would hardly show.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from famexport.bundle import Bundle
from famexport.checkpoint import EMBED_WEIGHT, parameter_shapes, write_checkpoint
from famexport.config import FamConfig, Llama3Scaling
from famexport.model import FamModel, State

BASE = FamConfig(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,  # not hidden_size / heads
    block_size=4,
    memory_segments=2,
    fam_length=3,
)
# At head_dim 8 these put one wavelength in each of the rule's three ranges.
LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128)
ALL_BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}


@dataclass(frozen=True)
class Case:
    """``config`` changes BASE, ``options`` are export_bundle's; ``peak`` scales queries and keys.

    Feedback may amplify a rounding from block to block, until two roll-outs have nothing in common however right the
    graph is. These seeds give weights that do not; for the half precisions the queries and keys are smaller, too.
    """

    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    peak: float = 1.5
    seed: int = 4


def half(options: dict[str, Any], config: dict[str, Any] | None = None, seed: int = 4) -> Case:
    return Case(config or {}, options, peak=1.0, seed=seed)


CASES: dict[str, Case] = {
    "base": Case(),
    "no_fam": Case(
        {
            "fam_length": 0,
            "num_key_value_heads": 1,
            "model_type": "qwen2",
            "qkv_bias": True,
            "tie_word_embeddings": True,
        },
        {"batch": 3},
    ),
    "no_memory": Case({"memory_segments": 0, "mlp_bias": True}, {"batch": 3}),
    "no_fam_no_memory": Case({"fam_length": 0, "memory_segments": 0}, {"batch": "dynamic", "opset": 23}),
    "llama3": Case({"rope_scaling": LLAMA3, "num_key_value_heads": 4}, {"batch": 3}),
    "fam_family": Case(
        {
            "num_hidden_layers": 1,  # a dynamic batch takes long to trace
            "model_type": "fam",
            "norm": "layernorm",
            "gated_mlp": False,
            "activation": "gelu_tanh",
            **ALL_BIASES,
        },
        {"batch": "dynamic", "inputs": "inputs_embeds", "logits": "last"},
    ),
    "opset23": Case(
        {"model_type": "qwen3", "qk_norm": True, "fam_query_position": "previous"}, {"batch": 3, "opset": 23}
    ),
    "fp16": half({"precision": "fp16"}),
    "bf16": half({"precision": "bf16", "batch": 3}),
    "fp16_opset23": half({"precision": "fp16", "batch": 3, "opset": 23}),
    "bf16_opset23": half({"precision": "bf16", "opset": 23}, {"num_key_value_heads": 1}, seed=5),
}


@dataclass(frozen=True)
class Export:
    """One exported case: the weights as they were made, where the checkpoint lies, and the bundle."""

    case: Case
    config: FamConfig
    weights: Mapping[str, Tensor]
    checkpoint: Path
    bundle: Bundle
    reports: list[tuple[str, int, int]]

    @property
    def precision(self) -> str:
        return str(self.case.options.get("precision", "fp32"))

    @property
    def opset(self) -> int:
        return int(self.case.options.get("opset", 20))

    @property
    def graphs(self) -> list[Path]:
        """Those for every runtime, and for CPUs; CUDA's own have tests of their own."""
        return sorted(path for path in self.bundle.path.glob("*.onnx") if "ort-cuda" not in path.name)


def random_weights(config: FamConfig, seed: int = 4, peak: float = 1.5) -> dict[str, Tensor]:
    """Weights by name; each depends on the seed and its own name only."""
    weights = {}
    for name, shape in parameter_shapes(config).items():
        seeds = list(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8])
        value = np.random.default_rng(seeds).standard_normal(shape)
        if name.endswith("bias"):
            value = 0.3 * value
        elif len(shape) == 1:
            value = 1 + 0.3 * value
        elif "embed" in name:
            value = 0.8 * value
        else:
            value *= (peak if "q_proj" in name or "k_proj" in name else 0.9) / np.sqrt(shape[1])
        weights[name] = torch.from_numpy(value.astype(np.float32))
    return weights


def save(target: Path, config: FamConfig, weights: Mapping[str, Tensor]) -> Path:
    return write_checkpoint(target, config, {EMBED_WEIGHT: "float32"}, weights.__getitem__, fam_trained=False)


def reference_model(config: FamConfig, weights: Mapping[str, Tensor]) -> FamModel:
    """The float32 model, made here and not by the exporter."""
    model = FamModel(config).eval()
    model.load_state_dict(dict(weights), strict=True)
    model.fold_fam()
    return model.requires_grad_(False)


def zero_state(model: FamModel, batch: int) -> State:
    states = model.contract("fp32", batch).states
    return {spec.name: torch.zeros(spec.sized(batch), dtype=getattr(torch, spec.dtype)) for spec in states}


def config_of(name: str) -> FamConfig:
    return replace(BASE, **CASES[name].config)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
