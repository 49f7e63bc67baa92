"""GGUF files of the Llama, Mistral, Qwen2 and Qwen3 families to checkpoints, a few rows in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from famexport.checkpoint import EMBED_WEIGHT, FAM_WEIGHT, check_tensors
from famexport.config import FamConfig
from famexport.convert.common import DEFAULTS, Options, cast, write_converted
from famexport.convert.gguf_file import GGUFFile, GGUFTensor, read_gguf
from famexport.convert.gguf_tokenizer import tokenizer_files
from famexport.errors import CheckpointError, UnsupportedModelError, UsageError, raise_problems
from famexport.hf_config import family_problem
from famexport.tensorfile import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # "llama" is Mistral's as well
CHUNK_BYTES = 4 * 2**20  # of float32, dequantised at once
_KEPT = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NAMES = {
    "token_embd.weight": EMBED_WEIGHT,
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Keys below "<architecture>.", and the values under which they change nothing. Everything else is refused by name.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.attn_factor": (0, 1),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "logit_scale": (0, 1),
    "expert_count": (0,),
    "use_parallel_residual": (False,),
    "nextn_predict_layers": (0,),
}


def convert_gguf(source: Path, target: Path, options: Options) -> Path:
    """See ``famexport.convert.convert``."""
    try:
        file = read_gguf(source)
    except OSError as exc:
        raise UsageError(f"cannot read {source}: {exc.strerror}") from exc
    _check_kinds(file)
    config = gguf_config(file, options.fam_over({}))
    tensors = {_hf_name(name): tensor for name, tensor in file.tensors.items()}
    dtypes = {name: _KEPT.get(tensor.kind, "float16") for name, tensor in tensors.items()}
    entries = {name: TensorEntry(name, dtypes[name], tensor.shape) for name, tensor in tensors.items()}
    check_tensors(config, entries, str(source), optional=FAM_WEIGHT)
    interleaved = file.metadata["general.architecture"] == "llama"

    def load(name: str, dtype: str) -> Tensor:
        weight = read_tensor(file.path, tensors[name], dtype)
        if interleaved and (found := re.search(r"\.([qk])_proj\.", name)):
            heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
            return half_split(weight, heads)
        return weight

    extra = tokenizer_files(file, config.vocab_size)
    return write_converted(target, config, dtypes, load, options, extra=extra)


def gguf_config(file: GGUFFile, fam: Mapping[str, Any]) -> FamConfig:
    """The configuration of a GGUF file's model, FAM settings from ``fam`` or the defaults.

    Raises:
        UnsupportedModelError: names each option that famexport does not implement.
        CheckpointError: metadata that is missing.
    """
    meta, tensors, subject = file.metadata, file.tensors, file.path.name
    arch = meta.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        expected = ", ".join(ARCHITECTURES)
        raise UnsupportedModelError(
            f"{subject}: architecture {arch!r:.80} is not supported; expected one of {expected}"
        )
    values = {
        key.removeprefix(f"{arch}."): _uniform(value) for key, value in meta.items() if key.startswith(f"{arch}.")
    }
    raise_problems(UnsupportedModelError, f"{subject} ({arch})", _unsupported(file, values))
    needed = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "norm_eps": "attention.layer_norm_rms_epsilon",
    }
    problems = [f"missing metadata {arch}.{key}" for key in needed.values() if key not in values]
    problems += ["missing tensor token_embd.weight"] if "token_embd.weight" not in tensors else []
    raise_problems(CheckpointError, subject, problems)
    base = {name: values[key] for name, key in needed.items()}
    heads, width = base["num_attention_heads"], base["hidden_size"]
    sound = isinstance(heads, int) and isinstance(width, int) and heads > 0
    head_dim = values.get("attention.key_length", width // heads if sound else 0)
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.get(key, head_dim) != head_dim:
            raise UnsupportedModelError(f"{subject}: {key}={values[key]!r:.80} is not the head size {head_dim!r:.80}")
    config = FamConfig(
        **{**base, "norm_eps": _decimal(base["norm_eps"])},
        vocab_size=tensors["token_embd.weight"].shape[0],
        num_key_value_heads=values.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        **{**DEFAULTS, **fam},
        model_type=arch,
        qkv_bias=arch == "qwen2" or "blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        qk_norm=arch == "qwen3",
        tie_word_embeddings="output.weight" not in tensors,
        rope_theta=_decimal(values.get("rope.freq_base", 10000.0)),
    )
    return replace(config, model_type="fam") if family_problem(config) else config


def _unsupported(file: GGUFFile, values: Mapping[str, Any]) -> list[str]:
    found = []
    for key, allowed in _MUST_BE.items():
        if key in values and not any(values[key] == value for value in allowed):
            found.append(f"option {key}={values[key]!r:.80} is not supported")
    if "rope.scaling.type" not in values:  # llama.cpp takes a factor without a type for linear scaling
        for key in ("rope.scaling.factor", "rope.scale_linear"):
            if values.get(key, 0) not in (0, 1):
                found.append(f"option {key}={values[key]!r:.80} is not supported")
    found += [f"{key!r:.80} differs from layer to layer" for key, value in values.items() if isinstance(value, _Varied)]
    factors = [name for name in file.tensors if name.startswith("rope_")]
    if factors:
        found.append(
            f"rope scaling as a tensor ({factors!r:.200}) is not supported; convert the original model instead"
        )
    if (kind := _uniform(file.metadata.get("general.type", "model"))) != "model":
        found.append(f"general.type={kind!r:.80} is not a whole model")
    if _uniform(file.metadata.get("split.count", 1)) not in (0, 1):
        found.append("a model split into several files is not supported; merge them with llama-gguf-split --merge")
    return found


class _Varied(list[Any]):
    """Values of a per-layer array that are not all the same."""


def _uniform(value: Any) -> Any:
    """The value all layers share, where a key has one value per layer."""
    if not isinstance(value, (list, np.ndarray)):
        return value
    items = list(value) if isinstance(value, list) else value.tolist()
    return items[0] if items and all(item == items[0] for item in items) else _Varied(items)


def _decimal(value: Any) -> Any:
    """The decimal that a float32 was rounded from: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _hf_name(name: str) -> str:
    found = re.fullmatch(r"blk\.(0|[1-9][0-9]*)\.(\w+)\.(weight|bias)", name, re.ASCII)
    if found and found[2] in _PARTS:
        return f"model.layers.{found[1]}.{_PARTS[found[2]]}.{found[3]}"
    return _NAMES.get(name, name)


def _check_kinds(file: GGUFFile) -> None:
    """Refuse tensor types that the gguf package cannot dequantise, before anything is written."""
    import gguf

    problems = []
    for kind in sorted({tensor.kind for tensor in file.tensors.values()} - set(_KEPT)):
        quantisation = gguf.GGMLQuantizationType[kind]
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[quantisation][1]), np.uint8), quantisation)
        except NotImplementedError:
            problems.append(f"tensor type {kind} is not supported")
    raise_problems(UnsupportedModelError, file.path.name, problems)


def read_tensor(path: Path, tensor: GGUFTensor, dtype: str) -> Tensor:
    """One tensor in ``dtype``, dequantised a few rows at a time."""
    import torch

    result = torch.empty(tensor.shape, dtype=getattr(torch, dtype))
    rows = result.view(-1, tensor.shape[-1])
    done = 0
    for chunk in _chunks(path, tensor):
        rows[done : done + len(chunk)] = cast(tensor.name, chunk, dtype)
        done += len(chunk)
    return result


def _chunks(path: Path, tensor: GGUFTensor) -> Iterator[Tensor]:
    import gguf
    import torch

    columns = tensor.shape[-1]
    count = int(np.prod(tensor.shape[:-1], dtype=np.int64))
    row_bytes, step = tensor.nbytes // count, max(1, CHUNK_BYTES // (4 * columns))
    with open(path, "rb") as file:
        file.seek(tensor.offset)
        for start in range(0, count, step):
            rows = min(step, count - start)
            data = np.fromfile(file, np.uint8, rows * row_bytes)
            if data.size != rows * row_bytes:
                raise CheckpointError(f"{path.name}: {tensor.name} ends early: the file was cut while it was read")
            if tensor.kind in _KEPT:
                yield torch.from_numpy(data).view(getattr(torch, _KEPT[tensor.kind])).view(rows, columns)
            else:
                values = gguf.dequantize(data.reshape(rows, row_bytes), gguf.GGMLQuantizationType[tensor.kind])
                yield torch.from_numpy(values)


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of query and key rows: pairs (2i, 2i + 1) of a head become (i, i + Dh/2)."""
    return weight.view(heads, weight.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
