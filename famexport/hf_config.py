"""Hugging Face ``config.json`` <-> FamConfig, for the base families famexport implements exactly.

An option that would change the maths and is not implemented is refused by name, never approximated. Keys that the
family's own implementation does not read are ignored, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from famexport.config import FamConfig, Llama3Scaling
from famexport.errors import ConfigError, UnsupportedModelError, raise_problems

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "FamForCausalLM": "fam",
}
FAM_KEYS = ("block_size", "memory_segments", "fam_length", "fam_query_position", "fam_state_dtype", "trained")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}
_ACTIVATIONS |= {"gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh"}
_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}  # each family's default, where the key is missing
# An option, and the values under which it changes nothing. Everything else is refused by name.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "rope_interleaved": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "quantization_config": (None,),
    "no_rope_layers": (None, []),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
}


def config_from_hf(data: Mapping[str, Any], fam: Mapping[str, Any] | None = None) -> FamConfig:
    """The FamConfig of a Hugging Face configuration.

    Args:
        data: the parsed ``config.json``, of either generation (``rope_theta``/``rope_scaling`` or ``rope_parameters``).
        fam: values that replace those of the ``"fam"`` object; None values are passed over.
    Raises:
        UnsupportedModelError: names each architecture or option that famexport does not implement.
        ConfigError: missing or contradicting values.
    """
    family = _family(data)
    fam_object = data.get("fam") or {}
    if not isinstance(fam_object, Mapping):
        raise ConfigError(f'config.json: "fam" must be an object, got {type(fam_object).__name__}')
    merged = {**fam_object, **{k: v for k, v in (fam or {}).items() if v is not None}}
    merged.pop("trained", None)
    if family == "fam":
        return _checked(FamConfig.from_dict({**merged, "model_type": "fam"}))
    raise_problems(UnsupportedModelError, f"config.json ({family})", _unsupported(data, family))
    problems = [f"unknown key fam.{key}; expected {', '.join(FAM_KEYS)}" for key in merged if key not in FAM_KEYS]
    missing = [f"fam.{k}" for k in ("block_size", "memory_segments", "fam_length") if k not in merged]
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing += [key for key in needed if data.get(key) is None]
    problems += [f"missing key {key}" for key in missing]
    theta, scaling = _rope(data, problems)
    heads: Any = data.get("num_attention_heads")
    width: Any = data.get("hidden_size")
    if not missing and not (type(heads) is type(width) is int and heads > 0):
        problems.append(f"num_attention_heads={heads!r} and hidden_size={width!r} must be positive integers")
    raise_problems(ConfigError, f"config.json ({family})", problems)
    bias = bool(data.get("attention_bias", False))
    config = FamConfig(
        **{key: data[key] for key in needed},
        num_key_value_heads=data.get("num_key_value_heads", _KV_HEADS.get(family)) or heads,
        head_dim=data.get("head_dim") or (128 if family == "qwen3" else width // heads),
        **merged,
        model_type=family,
        norm_eps=data.get("rms_norm_eps", 1e-6),
        activation=_ACTIVATIONS[data.get("hidden_act", "silu")],
        qkv_bias=True if family == "qwen2" else bias and family in ("llama", "qwen3"),
        out_bias=bias and family in ("llama", "qwen3"),
        mlp_bias=bool(data.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        tie_word_embeddings=bool(data.get("tie_word_embeddings", False)),
        rope_theta=theta,
        rope_scaling=scaling,
    )
    return _checked(config)


def _checked(config: FamConfig) -> FamConfig:
    """``config``, its rope scaling checked: those values come from the file as they are."""
    scaling = vars(config.rope_scaling) if config.rope_scaling else {}
    problems = [
        f"rope scaling {key} must be a positive number, got {value!r}"
        for key, value in scaling.items()
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 2**53
    ]
    if scaling and not problems and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        problems.append("rope scaling low_freq_factor must be below high_freq_factor")
    raise_problems(ConfigError, "model configuration", problems)
    return config


def config_to_hf(config: FamConfig, dtype: str, fam_trained: bool) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint: the base family's own keys plus the ``"fam"`` object."""
    c = config
    fam: dict[str, Any] = {key: getattr(c, key) for key in FAM_KEYS if key != "trained"} | {"trained": fam_trained}
    architecture = {family: name for name, family in ARCHITECTURES.items()}[c.model_type]
    head = {"architectures": [architecture], "model_type": c.model_type, "dtype": dtype}
    if c.model_type == "fam":
        plain = c.to_dict()
        plain.pop("model_type")
        return {**head, "fam": plain | {"trained": fam_trained}}
    theta = {"rope_theta": c.rope_theta}
    rope = theta | {"rope_type": "default"}
    if c.rope_scaling:
        rope = theta | {"rope_type": "llama3"} | vars(c.rope_scaling)
    base = {
        **head,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(c.activation, c.activation),
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_word_embeddings,
        "rope_parameters": rope,
        "rope_theta": c.rope_theta,  # the older generation of readers
        "rope_scaling": None if not c.rope_scaling else {k: v for k, v in rope.items() if k != "rope_theta"},
        "max_position_embeddings": (c.memory_segments + 1) * c.block_size,
        "fam": fam,
    }
    if c.model_type == "mistral":
        base["sliding_window"] = None  # a missing key means 4096
    if c.model_type in ("llama", "qwen3"):
        base["attention_bias"] = c.qkv_bias
    if c.model_type == "llama":
        base["mlp_bias"] = c.mlp_bias
    return base


def family_problem(config: FamConfig) -> str | None:
    """Why ``config`` cannot be written as its own ``model_type``, or None."""
    c, family = config, config.model_type
    if family == "fam":
        return None
    want = {"norm": "rmsnorm", "gated_mlp": True, "qk_norm": family == "qwen3"}
    if family in ("mistral", "qwen2"):
        want |= {"qkv_bias": family == "qwen2", "out_bias": False, "mlp_bias": False}
    else:
        want |= {"out_bias": c.qkv_bias} | ({"mlp_bias": False} if family == "qwen3" else {})
    wrong = [f"{key}={getattr(c, key)!r}" for key, value in want.items() if getattr(c, key) != value]
    return f"a {family} checkpoint cannot have {', '.join(wrong)}; use model_type='fam'" if wrong else None


def _family(data: Mapping[str, Any]) -> str:
    names = data.get("architectures") or []
    if not isinstance(names, list) or any(not isinstance(name, str) for name in names):
        raise ConfigError(f"config.json: architectures must be a list of names, got {names!r:.200}")
    known = ", ".join(a for a in ARCHITECTURES if a != "FamForCausalLM")
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    if not names and data.get("model_type") in ARCHITECTURES.values():
        return str(data["model_type"])
    got = names or data.get("model_type")
    raise UnsupportedModelError(f"config.json: architecture {got!r} is not supported; expected one of {known}")


def _unsupported(data: Mapping[str, Any], family: str) -> list[str]:
    found = []
    for key, allowed in _MUST_BE.items():
        value = data.get(key)
        if not any(value is a or (a is not None and type(value) is type(a) and value == a) for a in allowed):
            found.append(f"option {key}={value!r} is not supported")
    sliding = data.get("sliding_window", 4096 if family == "mistral" else None) is not None
    if family in ("qwen2", "qwen3"):
        sliding = bool(data.get("use_sliding_window"))
    kinds = data.get("layer_types") or []
    if sliding or not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        found.append(
            "sliding-window layers are not supported (sliding_window, use_sliding_window or layer_types); "
            "convert a checkpoint whose layers use full attention"
        )
    act = data.get("hidden_act", "silu")
    if not isinstance(act, str) or act not in _ACTIVATIONS:
        found.append(f"hidden_act={act!r} is not supported; expected one of {', '.join(_ACTIVATIONS)}")
    if data.get("pretraining_tp", 1) not in (None, 1):
        found.append(f"pretraining_tp={data['pretraining_tp']!r} is not supported")
    return found


def _rope(data: Mapping[str, Any], problems: list[str]) -> tuple[float, Llama3Scaling | None]:
    """Base and scaling from either generation of config: ``rope_parameters``, or ``rope_theta`` + ``rope_scaling``."""
    new, old = _rope_object(data, "rope_parameters"), _rope_object(data, "rope_scaling")
    rope = new or old
    if new and any(new.get(key, value) != value for key, value in old.items()):
        raise ConfigError(
            f"config.json: rope_parameters={new!r:.200} and rope_scaling={old!r:.200} contradict each other"
        )
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UnsupportedModelError("config.json: rope parameters per layer type are not supported")
    theta = rope.get("rope_theta", data.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"config.json: partial_rotary_factor={rope['partial_rotary_factor']} is not supported"
        )
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UnsupportedModelError(f"config.json: rope type {kind!r} is not supported; expected default or llama3")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [key for key in keys if key not in rope]:
        problems.append(f"llama3 rope scaling lacks {', '.join(missing)}")
        return theta, None
    return theta, Llama3Scaling(**{key: rope[key] for key in keys})


def _rope_object(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    rope = data.get(key) or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"config.json: {key} must be an object, got {rope!r:.200}")
    kind = rope.get("rope_type", rope.get("type", "default"))  # "type" is the older name
    return {**{k: v for k, v in rope.items() if k != "type"}, "rope_type": kind} if rope else {}
