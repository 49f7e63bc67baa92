"""Small models of every family, as transformers makes them, and as GGUF files the way llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from famexport.checkpoint import open_checkpoint
from famexport.model import FamModel

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_model() -> Callable[..., Any]:
    def make(family: str, **options: Any) -> Any:
        import transformers

        if family == "mistral":
            options = {"sliding_window": None} | options
        if family == "qwen3":
            options = {"head_dim": 32} | options
        config = transformers.AutoConfig.for_model(family, **SIZES | options)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():  # biases and norms that a mistake would show in
                if weight.dim() == 1:
                    weight.copy_(torch.randn(weight.shape) * 0.1 + (0 if name.endswith("bias") else 1))
        return model

    return make


@pytest.fixture
def logits_of() -> Callable[[Path, torch.Tensor], torch.Tensor]:
    """Logits [1, n, V] of a checkpoint with F = 0, its memory longer than the n tokens."""

    def run(path: Path, ids: torch.Tensor) -> torch.Tensor:
        checkpoint = open_checkpoint(path)
        model = FamModel(checkpoint.config).eval()
        model.load_state_dict({name: checkpoint.tensor(name) for name in checkpoint.tensors})
        size = checkpoint.config.block_size
        states = model.contract().states
        state = {s.name: torch.zeros([int(n) for n in s.shape], dtype=getattr(torch, s.dtype)) for s in states}
        rows = []
        with torch.no_grad():
            for i in range(0, ids.shape[1], size):
                logits, state = model.step(ids[:, i : i + size], state)
                rows.append(logits)
        return torch.cat(rows, 1)

    return run


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of query and key rows: (i, i + Dh/2) of a head become neighbours."""
    out = torch.empty_like(weight)
    size = weight.shape[0] // heads
    for row in range(weight.shape[0]):
        head, i = divmod(row, size)
        out[head * size + (2 * i if i < size // 2 else 2 * (i - size // 2) + 1)] = weight[row]
    return out


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{suffix}"
    return f"{NAMES[stem]}.{suffix}"


@pytest.fixture
def write_gguf() -> Callable[..., Path]:
    def write(
        path: Path,
        model: Any,
        arch: str,
        kind: str = "F32",
        meta: Callable[[Any], None] | None = None,
        skip: tuple[str, ...] = (),
        tensors: dict[str, np.ndarray] | None = None,
    ) -> Path:
        """Metadata keys in ``skip`` are left out; ``meta`` adds more through the writer; ``tensors`` are added."""
        import gguf

        config, quantisation = model.config, gguf.GGMLQuantizationType[kind]
        writer = gguf.GGUFWriter(path, arch)
        keys: dict[str, tuple[Any, Any]] = {
            "block_count": (writer.add_uint32, config.num_hidden_layers),
            "context_length": (writer.add_uint32, 256),
            "embedding_length": (writer.add_uint32, config.hidden_size),
            "feed_forward_length": (writer.add_uint32, config.intermediate_size),
            "attention.head_count": (writer.add_uint32, config.num_attention_heads),
            "attention.head_count_kv": (writer.add_uint32, config.num_key_value_heads),
            "attention.layer_norm_rms_epsilon": (writer.add_float32, config.rms_norm_eps),
            "rope.freq_base": (writer.add_float32, config.rope_parameters["rope_theta"]),
            "vocab_size": (writer.add_uint32, config.vocab_size),
        }
        if arch == "qwen3":
            keys["attention.key_length"] = keys["attention.value_length"] = (writer.add_uint32, config.head_dim)
        for key, (add, value) in keys.items():
            if key not in skip:
                add(f"{arch}.{key}", value)
        if meta is None:  # transformers wants a vocabulary
            writer.add_tokenizer_model("none")
            writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
        else:
            meta(writer)
        for name, weight in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            if arch == "llama" and ".q_proj." in name:
                weight = interleave(weight, config.num_attention_heads)
            if arch == "llama" and ".k_proj." in name:
                weight = interleave(weight, config.num_key_value_heads)
            data = weight.contiguous().numpy()
            if data.ndim == 1 or kind == "F32":
                writer.add_tensor(gguf_name(name), data)
            else:
                writer.add_tensor(gguf_name(name), gguf.quantize(data, quantisation), raw_dtype=quantisation)
        for name, data in (tensors or {}).items():
            writer.add_tensor(name, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
