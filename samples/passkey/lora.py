"""LoRA on a FAM model while it is trained, and its adapter in PEFT's form, as ``famexport convert --lora`` takes it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import famexport.model
from famexport.checkpoint import FAM_WEIGHT
from famexport.model import FamModel

PREFIX, ADAPTER, CONFIG = "base_model.model.", "adapter_model.safetensors", "adapter_config.json"


class LowRank(nn.Module):
    """(W + alpha / r * B A) x, W frozen (Hu et al. 2021)."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.weight, self.bias, self.scaling = linear.weight, linear.bias, alpha / rank
        self.a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.a, 5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.scaling * F.linear(F.linear(x, self.a), self.b)


def attach(model: FamModel, rank: int, alpha: float) -> dict[str, LowRank]:
    """Freeze the model but for its prompt embeddings, and adapt every projection of its layers."""
    for name, p in model.named_parameters():
        p.requires_grad_(name == FAM_WEIGHT)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("model.layers.")}
    adapted = {name: LowRank(module, rank, alpha) for name, module in linear.items()}
    for name, module in adapted.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return adapted


def copy_grouped_heads() -> None:
    """Attention in training with a copy of keys and values for each query head: not every fused kernel of torch takes
    grouped heads beside a mask, and without one all scores would be written out."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    famexport.model.attend = attend


def tensors(model: FamModel, adapted: dict[str, LowRank]) -> dict[str, nn.Parameter]:
    """What is learnt, by the names of the adapter file."""
    named = {f"{PREFIX}{FAM_WEIGHT}": model.model.fam_embeddings.weight}
    for name, pair in adapted.items():
        named |= {f"{PREFIX}{name}.lora_A.weight": pair.a, f"{PREFIX}{name}.lora_B.weight": pair.b}
    return named


def save(folder: Path, model: FamModel, adapted: dict[str, LowRank], rank: int, alpha: float) -> None:
    """Write ``adapter_model.safetensors`` (float16) and ``adapter_config.json``."""
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
    half = {name: p.detach().half().cpu().contiguous() for name, p in tensors(model, adapted).items()}
    save_file(half, folder / ADAPTER)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def load(folder: Path, model: FamModel, adapted: dict[str, LowRank]) -> None:
    """Go on from an adapter that ``save`` wrote, of the same rank."""
    found = load_file(folder / ADAPTER)
    for name, p in tensors(model, adapted).items():
        if found[name].shape != p.shape:
            raise SystemExit(f"{folder}: {name} is {tuple(found[name].shape)}, --lora makes it {tuple(p.shape)}")
        p.data = found[name].to(p)
