from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest

from famexport.config import FamConfig, Llama3Scaling, preset
from famexport.errors import ConfigError, FamExportError, UnsupportedModelError
from famexport.hf_config import config_from_hf, config_to_hf, family_problem

FAM = {"block_size": 64, "memory_segments": 2, "fam_length": 8}
BASE = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "fam": FAM,
}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
TINY = preset("tiny")
OWN = {
    "llama": TINY,
    "llama-biases": replace(TINY, qkv_bias=True, out_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-llama3": replace(TINY, rope_scaling=Llama3Scaling(**LLAMA3), rope_theta=500000.0),
    "llama-previous": replace(TINY, fam_query_position="previous", fam_state_dtype="float16", activation="gelu_tanh"),
    "mistral": replace(TINY, model_type="mistral", head_dim=16),
    "qwen2": replace(TINY, model_type="qwen2", qkv_bias=True),
    "qwen3": replace(TINY, model_type="qwen3", qk_norm=True, head_dim=32, activation="gelu"),
    "qwen3-bias": replace(TINY, model_type="qwen3", qk_norm=True, qkv_bias=True, out_bias=True),
    "fam": replace(TINY, model_type="fam", norm="layernorm", gated_mlp=False, activation="relu", qkv_bias=True),
    "fam-llama3": replace(TINY, model_type="fam", rope_scaling=Llama3Scaling(**LLAMA3)),
}


def hf(family: str = "llama", **changed: Any) -> dict[str, Any]:
    head = {"architectures": [f"{CLASSES[family]}ForCausalLM"], "model_type": family}
    if family == "mistral":
        head["sliding_window"] = None
    return {**head, **BASE, **changed}


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("generation", ["older", "newer"])
def test_families(family, generation):
    rope = {"rope_theta": 7e4}
    if generation == "newer":
        rope = {"rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}}
    expected = FamConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128 if family == "qwen3" else 16,
        **FAM,
        model_type=family,
        norm_eps=1e-5,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rope_theta=7e4,
    )
    assert config_from_hf(hf(family, **rope)) == expected
    assert config_from_hf(hf(family, **rope, head_dim=32)) == replace(expected, head_dim=32)
    assert config_from_hf(hf(family, **rope, tie_word_embeddings=True)).tie_word_embeddings
    by_type = hf(family, **rope)
    del by_type["architectures"]
    assert config_from_hf(by_type) == expected


def test_defaults_are_each_familys_own():
    config = hf()
    del config["num_key_value_heads"], config["rms_norm_eps"]
    assert config_from_hf(config).num_key_value_heads == 4
    assert config_from_hf(config).norm_eps == 1e-6
    assert config_from_hf(config).rope_theta == 10000.0
    for family, heads in (("mistral", 8), ("qwen2", 32), ("qwen3", 32)):
        config = hf(family, num_attention_heads=64, hidden_size=128)
        del config["num_key_value_heads"]
        assert config_from_hf(config).num_key_value_heads == heads
        assert config_from_hf({**config, "num_key_value_heads": None}).num_key_value_heads == 64


def test_defaults_agree_with_transformers():
    transformers = pytest.importorskip("transformers")
    for family in CLASSES:
        config = hf(family, num_attention_heads=64, hidden_size=128)
        del config["num_key_value_heads"], config["rms_norm_eps"]
        theirs = transformers.AutoConfig.for_model(**{k: v for k, v in config.items() if k != "architectures"})
        ours = config_from_hf(config)
        assert ours.num_key_value_heads == theirs.num_key_value_heads
        assert ours.norm_eps == theirs.rms_norm_eps
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 2)
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.tie_word_embeddings == theirs.tie_word_embeddings
        if family == "mistral":  # a missing key is its 4096
            del config["sliding_window"]
            assert transformers.MistralConfig().sliding_window
            with pytest.raises(UnsupportedModelError, match="sliding-window"):
                config_from_hf(config)


def test_biases():
    both = config_from_hf(hf(attention_bias=True, mlp_bias=True))
    assert (both.qkv_bias, both.out_bias, both.mlp_bias) == (True, True, True)
    qwen3 = config_from_hf(hf("qwen3", attention_bias=True, mlp_bias=True))
    assert (qwen3.qkv_bias, qwen3.out_bias, qwen3.mlp_bias) == (True, True, False)
    for family, qkv in (("mistral", False), ("qwen2", True)):  # their own code reads neither key
        config = config_from_hf(hf(family, attention_bias=not qkv, mlp_bias=True))
        assert (config.qkv_bias, config.out_bias, config.mlp_bias) == (qkv, False, False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
    ],
)
def test_activations(name, expected):
    assert config_from_hf(hf(hidden_act=name)).activation == expected


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
    ],
)
def test_llama3_scaling(rope):
    config = config_from_hf(hf(**rope))
    assert config.rope_scaling == Llama3Scaling(**LLAMA3)
    assert config.rope_theta == 5e5


def test_llama3_scaling_that_is_wrong():
    for key in LLAMA3:
        rope = {"rope_type": "llama3", **LLAMA3}
        del rope[key]
        with pytest.raises(ConfigError, match=f"llama3 rope scaling lacks {key}"):
            config_from_hf(hf(rope_scaling=rope))
        for value in ("8", None, 0, -1.0, math.nan, math.inf, True, [1]):
            with pytest.raises(ConfigError, match=f"rope scaling {key} must be a positive number"):
                config_from_hf(hf(rope_scaling={**rope, key: value}))
    rope = {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}
    with pytest.raises(ConfigError, match="low_freq_factor must be below high_freq_factor"):
        config_from_hf(hf(rope_scaling=rope))


REFUSED = {
    "rope type 'linear'": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "rope type 'yarn'": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
    "rope type 'dynamic'": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "per layer type": {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
    "rope_interleaved=True": {"rope_interleaved": True},
    "partial_rotary_factor=0.5": {"partial_rotary_factor": 0.5},
    "quantization_config=": {"quantization_config": {"quant_method": "awq"}},
    "no_rope_layers=": {"no_rope_layers": [1, 0]},
    "attn_logit_softcapping=50.0": {"attn_logit_softcapping": 50.0},
    "final_logit_softcapping=30.0": {"final_logit_softcapping": 30.0},
    "sliding-window": {"sliding_window": 4096},
    "sliding-window layers": {"layer_types": ["full_attention", "sliding_attention"]},
    "hidden_act='tanh'": {"hidden_act": "tanh"},
    "pretraining_tp=2": {"pretraining_tp": 2},
}


@pytest.mark.parametrize("named", REFUSED)
def test_unsupported_options_are_named(named):
    with pytest.raises(UnsupportedModelError, match=named):
        config_from_hf(hf(**REFUSED[named]))


def test_unsupported_options_are_named_all_at_once():
    with pytest.raises(UnsupportedModelError, match=r"3 problems: .*rope_interleaved.*sliding.*pretraining_tp"):
        config_from_hf(hf(pretraining_tp=2, sliding_window=7, rope_interleaved=True))


def test_partial_rotary_in_either_place():
    for rope in (
        {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        {"rope_type": "default", "partial_rotary_factor": 0.25},
    ):
        with pytest.raises(UnsupportedModelError, match="partial_rotary_factor=0"):
            config_from_hf(hf(rope_parameters=rope))


def test_options_that_change_nothing_are_taken():
    neutral = {
        "rope_interleaved": False,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
        "pretraining_tp": 1,
    }
    assert config_from_hf(hf(**neutral, layer_types=["full_attention"] * 2)) == config_from_hf(hf())
    for family in ("qwen2", "qwen3"):
        config = hf(family, use_sliding_window=False, sliding_window=4096, max_window_layers=1)
        assert config_from_hf(config) == config_from_hf(hf(family))
        with pytest.raises(UnsupportedModelError, match="sliding-window"):
            config_from_hf({**config, "use_sliding_window": True})


def test_both_generations_at_once_must_agree():
    new = {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}
    old = {"rope_type": "llama3", **LLAMA3}
    assert config_from_hf(hf(rope_parameters=new, rope_scaling=old, rope_theta=5e5)).rope_scaling
    plain = {"rope_theta": 5e5, "rope_type": "default"}
    for scaling in ({"type": "linear", "factor": 2.0}, old, {**old, "factor": 9.0}):
        with pytest.raises(ConfigError, match="contradict each other"):
            config_from_hf(hf(rope_parameters=plain if scaling.get("factor") != 9.0 else new, rope_scaling=scaling))


@pytest.mark.parametrize("name", ["GemmaForCausalLM", "LlamaForSequenceClassification", "MixtralForCausalLM", "T5"])
def test_other_architectures_are_named(name):
    with pytest.raises(UnsupportedModelError, match=f"{name}.*expected one of LlamaForCausalLM, Mistral"):
        config_from_hf(hf(architectures=[name]))


def test_fam_values():
    assert config_from_hf(hf(), {"block_size": 32, "fam_length": None}).block_size == 32
    assert config_from_hf(hf(), {"fam_length": None}).fam_length == 8
    assert config_from_hf(hf(fam={**FAM, "fam_query_position": "previous"})).fam_query_position == "previous"
    assert config_from_hf(hf(fam={**FAM, "trained": True})) == config_from_hf(hf())
    assert config_from_hf(hf(fam=None), FAM) == config_from_hf(hf())
    with pytest.raises(ConfigError, match=r"missing key fam\.block_size; missing key fam\.memory_segments"):
        config_from_hf(hf(fam={"fam_length": 1}))
    with pytest.raises(ConfigError, match=r"unknown key fam\.blocks"):
        config_from_hf(hf(fam={**FAM, "blocks": 1}))
    with pytest.raises(ConfigError, match="must be an object, got list"):
        config_from_hf(hf(fam=[1]))
    with pytest.raises(ConfigError, match="must not exceed block_size"):
        config_from_hf(hf(), {"fam_length": 65})


def test_missing_keys_are_named_all_at_once():
    config = hf()
    del config["vocab_size"], config["hidden_size"], config["fam"]
    with pytest.raises(ConfigError, match="5 problems: .*block_size.*missing key vocab_size; missing key hidden_size"):
        config_from_hf(config)


@pytest.mark.parametrize("name", OWN)
def test_round_trip(name):
    config = OWN[name]
    assert family_problem(config) is None
    for trained in (True, False):
        data = config_to_hf(config, "float16", trained)
        assert config_from_hf(data) == config
        assert (data["dtype"], data["fam"]["trained"]) == ("float16", trained)


def test_what_a_family_cannot_have():
    for changed in ({"qk_norm": True}, {"out_bias": True}, {"norm": "layernorm"}, {"gated_mlp": False}):
        assert f"{next(iter(changed))}=" in str(family_problem(replace(TINY, **changed)))
        assert family_problem(replace(TINY, **changed, model_type="fam")) is None
    assert "qkv_bias=False" in str(family_problem(replace(TINY, model_type="qwen2")))


ODD: list[Any] = [None, "x", "", [], {}, [1], {"a": 1}, -1, 0, 1, 3.5, 1e400, math.nan, True, False, 2**70]


@pytest.mark.parametrize("name", OWN)
def test_odd_values_give_typed_errors_or_a_configuration(name):
    good = config_to_hf(OWN[name], "float32", False)
    extra = ["layer_types", "sliding_window", "quantization_config", "pretraining_tp", "no_rope_layers", "head_dim"]
    paths = [(key,) for key in [*good, *extra]] + [
        (k, inner) for k, v in good.items() if isinstance(v, dict) for inner in v
    ]
    taken = 0
    for path in paths:
        for value in ODD:
            data = copy.deepcopy(good)
            inner = data
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            try:
                config_from_hf(data)
                taken += 1
            except FamExportError:
                pass
    assert 0 < taken < len(paths) * len(ODD)
