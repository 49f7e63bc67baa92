"""LoRA on a FAM model while it is trained, and its adapter in PEFT's form, as ``famexport convert --lora`` takes it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from famexport.checkpoint import FAM_WEIGHT
from famexport.model import FamModel


class LowRank(nn.Module):
    """W + alpha / r * B @ A, W frozen (Hu et al. 2021)."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.scaling = alpha / rank
        self.a = nn.Parameter(torch.empty(rank, weight.shape[1]))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.a, 5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scaling * (self.b @ self.a)


def attach(model: FamModel, rank: int, alpha: float) -> dict[str, LowRank]:
    """Freeze the model but for its prompt embeddings, and adapt every projection of its layers."""
    for name, p in model.named_parameters():
        p.requires_grad_(name == FAM_WEIGHT)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("model.layers.")}
    adapted = {}
    for name, module in linear.items():
        adapted[name] = LowRank(module.weight, rank, alpha)
        parametrize.register_parametrization(module, "weight", adapted[name])
    return adapted


def save(folder: Path, model: FamModel, adapted: dict[str, LowRank], rank: int, alpha: float) -> None:
    """Write ``adapter_model.safetensors`` (float16) and ``adapter_config.json``."""
    tensors = {"base_model.model.model.fam_embeddings.weight": model.model.fam_embeddings.weight}
    for name, pair in adapted.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = pair.a
        tensors[f"base_model.model.{name}.lora_B.weight"] = pair.b
    c = model.config
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in adapted}),
        "modules_to_save": ["fam_embeddings"],
        "fam": {"block_size": c.block_size, "memory_segments": c.memory_segments, "fam_length": c.fam_length},
    }
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: t.detach().half().cpu().contiguous() for name, t in tensors.items()}
    save_file(half, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
