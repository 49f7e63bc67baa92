"""With F = 0 and memory for the whole sequence a FAM model is its base model: compared with ``transformers`` itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from famexport.hf_config import config_from_hf
from famexport.model import FamModel

transformers = pytest.importorskip("transformers")

BLOCKS, BLOCK_SIZE = 6, 8
TOLERANCE = 1e-4  # absolute, float32, logits of order 1; measured: 5e-6, and 1.4e-5 where tied logits are larger
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 0.03,  # far from every default
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,  # at head_dim 8 one wavelength falls into the interpolated range
}
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama_llama3_scaling": ("Llama", {"rope_parameters": LLAMA3}),
    "llama_biases_head_dim_mqa": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "num_key_value_heads": 1},
    ),
    "llama_gelu_tanh": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_head_dim": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_biases": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads only cost time at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def peer_model(name: str) -> Any:
    """A base model with random weights, uneven attention, and norms and biases that are not their initial values."""
    family, options = PEERS[name]
    config = getattr(transformers, f"{family}Config")(
        **{**SIZES, **options}, architectures=[f"{family}ForCausalLM"], attn_implementation="eager"
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if "norm" in key:
            value = 1 + 0.3 * value
        elif key.endswith("bias"):
            value = 0.3 * value
        elif "embed" in key:
            value = 0.4 * value
        else:
            value *= (1.5 if "q_proj" in key or "k_proj" in key else 0.9) / math.sqrt(parameter.shape[1])
        parameter.copy_(value)
    return model


@pytest.mark.parametrize("name", PEERS)
def test_streaming_without_fam_equals_the_base_model(name: str) -> None:
    peer = peer_model(name)
    fam = {"block_size": BLOCK_SIZE, "memory_segments": BLOCKS - 1, "fam_length": 0}
    config = config_from_hf(peer.config.to_dict(), fam=fam)
    model = FamModel(config).requires_grad_(False)
    weights = peer.state_dict()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]  # the same tensor as the embeddings, under a second name
    model.load_state_dict(weights, strict=True)

    tokens = torch.randint(config.vocab_size, (2, BLOCKS * BLOCK_SIZE), generator=torch.Generator().manual_seed(1))
    want = peer(tokens, use_cache=False).logits
    specs = model.contract(batch=2).states
    state = {spec.name: torch.zeros(spec.sized(2), dtype=getattr(torch, spec.dtype)) for spec in specs}
    rows = []
    for block in tokens.split(BLOCK_SIZE, dim=1):
        logits, state = model.step(block, state)
        rows.append(logits)
    got = torch.cat(rows, 1)

    assert want.std() > 0.3
    assert (got - want).abs().max() < TOLERANCE
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    # The comparison is of attention across blocks, not only of what happens to one token.
    assert (model.step(tokens[:, -BLOCK_SIZE:], {k: 0 * v for k, v in state.items()})[0] - rows[-1]).abs().max() > 0.1
