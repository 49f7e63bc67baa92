"""Model configurations: every problem at once, presets, and counts checked against what is counted."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from famexport.config import ACTIVATIONS, MODEL_TYPES, PRESETS, FamConfig, Llama3Scaling, preset
from famexport.contract import contract_for
from famexport.errors import ConfigError, UsageError
from famexport.model import FamModel

TINY = preset("tiny")
LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "plain mlp with biases": {"gated_mlp": False, "mlp_bias": True},
    "layernorm": {"norm": "layernorm"},
    "layernorm qk_norm": {"norm": "layernorm", "qk_norm": True},
    "qk_norm": {"qk_norm": True},
    "mqa": {"num_key_value_heads": 1},
    "mha": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 24},
    "no fam": {"fam_length": 0},
    "no memory": {"memory_segments": 0},
    "neither": {"fam_length": 0, "memory_segments": 0},
    "three layers": {"num_hidden_layers": 3},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_those_of_the_model(name: str) -> None:
    config = replace(TINY, **VARIANTS[name])
    with torch.device("meta"):
        model = FamModel(config)
    assert config.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "billions"), [("paper-1b", 1.25), ("paper-8b", 8.9), ("paper-24b", 25.0)])
def test_papers_presets_are_about_as_large_as_the_paper_says(name: str, billions: float) -> None:
    """By name they have 1B, 8B and 24B; the paper gives no vocabulary, here it is 32,000."""
    assert preset(name).parameters / 1e9 == pytest.approx(billions, rel=0.05)
    with torch.device("meta"):
        assert preset(name).parameters == sum(p.numel() for p in FamModel(preset(name)).parameters())


@pytest.mark.parametrize("logits", ["all", "last"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_block_flops_are_what_a_step_multiplies(
    monkeypatch: pytest.MonkeyPatch, name: str, batch: int, logits: str
) -> None:
    """Every product of a step, counted while it runs: 2 operations per multiply-add. Not those of FAM's rows with past
    blocks, which the mask hides."""
    config, counted = replace(TINY, **VARIANTS[name]), [0]
    model = FamModel(config).eval()
    model.fold_fam()
    linear, attention = F.linear, F.scaled_dot_product_attention

    def count_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        counted[0] += 2 * x.numel() * weight.shape[0]
        return linear(x, weight, bias)

    def count_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        b, heads, rows, width = q.shape
        hidden = config.fam_length * config.memory_segments * config.block_size
        assert not options["attn_mask"][:, :, : config.fam_length, config.fam_length : -config.block_size].any()
        counted[0] += 2 * b * heads * (rows * k.shape[2] - hidden) * (width + v.shape[3])
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "linear", count_linear)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: count_linear(x, self.weight, self.bias))
    monkeypatch.setattr(F, "scaled_dot_product_attention", count_attention)
    states = contract_for(config, batch=batch).states
    state = {s.name: torch.zeros(s.sized(batch), dtype=getattr(torch, s.dtype)) for s in states}
    with torch.no_grad():
        model.step(torch.zeros(batch, config.block_size, dtype=torch.int64), state, logits=logits)
    assert config.block_flops(batch, logits) == counted[0] > 0


# -- validation


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        replace(
            TINY,
            vocab_size=0,
            hidden_size=-1,
            num_hidden_layers=2.0,
            head_dim=True,
            memory_segments=-1,
            fam_length="4",
            norm_eps=0.0,
            rope_theta=float("nan"),
            norm="batchnorm",
            activation="tanh",
            model_type="gpt2",
            fam_query_position="next",
            fam_state_dtype="int8",
            gated_mlp="false",
            qk_norm=1,
        )
    text = str(caught.value)
    assert text.startswith("model configuration: 15 problems: ")
    for part in (
        "vocab_size must be a positive integer, got 0",
        "hidden_size must be a positive integer, got -1",
        "num_hidden_layers must be a positive integer, got 2.0",
        "head_dim must be a positive integer, got True",
        "memory_segments must be an integer of 0 or more, got -1",
        "fam_length must be an integer of 0 or more, got '4'",
        "norm_eps must be a positive number, got 0.0",
        "rope_theta must be a positive number, got nan",
        "norm must be one of rmsnorm, layernorm, got 'batchnorm'",
        "activation must be one of silu, gelu, gelu_tanh, relu, got 'tanh'",
        "model_type must be one of llama, mistral, qwen2, qwen3, fam, got 'gpt2'",
        "fam_query_position must be one of current, previous, got 'next'",
        "fam_state_dtype must be one of float32, float16, bfloat16, got 'int8'",
        "gated_mlp must be true or false, got 'false'",
        "qk_norm must be true or false, got 1",
    ):
        assert part in text


def test_fields_that_do_not_fit_together_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        replace(TINY, num_key_value_heads=3, head_dim=7, fam_length=9, num_hidden_layers=101)
    text = str(caught.value)
    assert text.startswith("model configuration: 4 problems: ")
    for part in (
        "num_attention_heads (4) must be a multiple of num_key_value_heads (3)",
        "head_dim must be even for rotary embedding, got 7",
        "fam_length (9) must not exceed block_size (8)",
        "num_hidden_layers must be at most 100, got 101",
    ):
        assert part in text
    assert replace(TINY, fam_length=8, num_hidden_layers=100).fam_length == 8  # the limits themselves are allowed


def test_sizes_that_no_weight_has_are_limited() -> None:
    """A file of any size may name them, and the rotary tables are as long as the memory."""
    with pytest.raises(
        ConfigError, match=rf"memory_segments \({2**31}\) of block_size \(8\) must hold at most {2**20}"
    ):
        replace(TINY, memory_segments=2**31)
    with pytest.raises(ConfigError, match=f"block_size must be at most {2**16}, got {2**16 + 1}"):
        replace(TINY, block_size=2**16 + 1, memory_segments=0)
    with pytest.raises(ConfigError, match="must hold at most"):
        replace(TINY, block_size=2**16, memory_segments=17)
    replace(TINY, block_size=2**16, memory_segments=16)  # the limits themselves are allowed
    FamModel(replace(TINY, block_size=1, fam_length=1, memory_segments=2**20))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1e-5, 0, "1e-5", None, True])
@pytest.mark.parametrize("field", ["norm_eps", "rope_theta"])
def test_numbers_must_be_positive_and_finite(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be a positive number, got"):
        replace(TINY, **{field: value})


@pytest.mark.parametrize(
    "config",
    [TINY, replace(TINY, rope_scaling=LLAMA3), replace(TINY, model_type="fam", norm="layernorm"), *PRESETS.values()],
)
def test_round_trip_through_json(config: FamConfig) -> None:
    again = FamConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1, "layers": 2}, "2 problems: unknown key 'colour'; unknown key 'layers'"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling must have the keys"),
        ({"rope_scaling": {}}, "rope_scaling must have the keys"),
        ({"rope_scaling": "llama3"}, "rope_scaling must have the keys"),
        ({"rope_scaling": {**asdict(LLAMA3), "type": "yarn"}}, "rope_scaling must have the keys"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, got None"),
        ({"norm": ["rmsnorm"]}, "norm must be one of"),
    ],
)
def test_json_of_another_form_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FamConfig.from_dict({**TINY.to_dict(), **changes})
    assert message in str(caught.value)


def test_a_missing_field_is_named() -> None:
    data = TINY.to_dict()
    del data["vocab_size"]
    with pytest.raises(ConfigError, match="vocab_size"):
        FamConfig.from_dict(data)


# -- presets


def test_presets_are_the_papers() -> None:
    assert list(PRESETS) == ["tiny", "edge", "paper-1b", "paper-8b", "paper-24b"]
    rows = {
        "paper-1b": (18, 1536, 12288, 12, 12),
        "paper-8b": (32, 4096, 16384, 32, 32),
        "paper-24b": (56, 4096, 32768, 32, 1),
    }
    for name, (layers, width, inner, heads, kv_heads) in rows.items():
        c = preset(name)
        assert (c.num_hidden_layers, c.hidden_size, c.intermediate_size) == (layers, width, inner)
        assert (c.num_attention_heads, c.num_key_value_heads, c.head_dim * heads) == (heads, kv_heads, width)
        assert (c.block_size, c.memory_segments, c.fam_length, c.gated_mlp) == (1024, 3, 64, True)


def test_preset_takes_changes_and_refuses_what_it_does_not_know() -> None:
    assert preset("tiny", block_size=16) == replace(PRESETS["tiny"], block_size=16)
    assert PRESETS["tiny"].block_size == 8
    with pytest.raises(UsageError, match="no preset 'huge'; expected one of tiny, edge, paper-1b"):
        preset("huge")
    with pytest.raises(ConfigError, match="fam_length"):
        preset("tiny", fam_length=9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_known_choices_are_accepted(model_type: str, activation: str) -> None:
    assert replace(TINY, model_type=model_type, activation=activation).activation == activation
