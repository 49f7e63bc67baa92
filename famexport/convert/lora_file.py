"""A LoRA adapter's directory in PEFT's form, read with every size checked and every option known or refused.

``adapter_config.json`` is at most one MiB, ``adapter_model.safetensors`` has its header checked against the file before
a tensor is read, and pickled weights are not read at all. A key that famexport does not know must be unset: PEFT adds
options that change the maths with every release, and none of them may be passed over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from famexport.checkpoint import MAX_CONFIG_BYTES
from famexport.convert.common import DEFAULTS, DTYPES
from famexport.errors import CheckpointError, InvalidInputError, UsageError
from famexport.tensorfile import TensorEntry, read_header

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MAX_RANK, MAX_NAMES = 8192, 1000  # a model has at most 701 linear layers to name
_LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_FAM = re.compile(r"base_model\.model\.model\.fam_embeddings(?:\.modules_to_save)?(?:\.default)?\.weight")
_FAM_MODULES = ("fam_embeddings", "model.fam_embeddings")
_NAME = re.compile(r"\^?(?:\w|\\?\.)+\$?", re.ASCII)
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_rslora": (False, True, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # the others change the base's weights
}
# Read below, or of no meaning once training is over.
_KNOWN = """r lora_alpha rank_pattern alpha_pattern target_modules modules_to_save fam
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules inference_mode
    layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_core peft_version
    qalora_group_size revision runtime_config task_type"""


@dataclass(frozen=True)
class Adapter:
    """An adapter whose files are sound. ``problems`` speak against merging it; they wait for those of the model."""

    path: Path
    pairs: Mapping[str, Mapping[str, TensorEntry]]  # module -> "A" [r, in] and "B" [out, r]
    embeddings: TensorEntry | None  # prompt embeddings [F, D]
    targets: tuple[str, ...]  # names of modules, or the ends of names
    ranks: Mapping[str, int]  # by such names, "" for all others
    alphas: Mapping[str, float]
    rank_stabilised: bool
    fam: Mapping[str, int]  # FAM settings it was trained with; F is that of its embeddings where it has them
    problems: tuple[str, ...]


def read_adapter(path: Path) -> Adapter:
    """The configuration and the tensor names of the adapter in a directory.

    Raises:
        UsageError: no such directory, or files that may not be read.
        CheckpointError: files that are missing, pickled or damaged.
    """
    if not path.is_dir():
        raise UsageError(f"no such directory: {path}; expected a LoRA adapter as PEFT saves it: {CONFIG}, {WEIGHTS}")
    for name in (WEIGHTS, CONFIG):
        if not (path / name).is_file():
            hint = "expected a LoRA adapter as PEFT saves it"
            if name == WEIGHTS and (path / PICKLED).exists():
                hint = f"pickled weights ({PICKLED}) are not read: load the adapter with PEFT and save it again with "
                hint += "save_pretrained(DIR, safe_serialization=True)"
            raise CheckpointError(f"{path} has no {name}; {hint}")
    try:
        config, entries = _read_config(path / CONFIG), read_header(path / WEIGHTS)
    except OSError as exc:
        raise UsageError(f"cannot read the LoRA adapter {path}: {exc.strerror}") from exc
    except InvalidInputError as exc:
        raise CheckpointError(f"LoRA adapter {path}: {exc}") from exc
    problems = [
        f"option {_plain(key)}={config.get(key)!r:.80} is not supported"
        for key in dict.fromkeys((*_MUST_BE, *config))
        if (config.get(key) not in _MUST_BE[key] if key in _MUST_BE else key not in _KNOWN.split() and config[key])
    ]
    pairs, embeddings = _sorted_out(entries, problems)
    targets, saved = _names(config, "target_modules", problems), _names(config, "modules_to_save", problems)
    problems += [f"modules_to_save={n!r:.80} is not supported" for n in saved if n not in _FAM_MODULES]
    if embeddings is None and set(saved) & set(_FAM_MODULES):
        problems.append("modules_to_save names fam_embeddings, of which there is no tensor")
    fam = _fam(config.get("fam") or {}, embeddings, problems)
    ranks = _numbers(config, "r", "rank_pattern", problems)
    alphas = _numbers(config, "lora_alpha", "alpha_pattern", problems)
    stabilised = bool(config.get("use_rslora"))
    return Adapter(path, pairs, embeddings, targets, ranks, alphas, stabilised, fam, tuple(problems))


def _read_config(file: Path) -> dict[str, Any]:
    def once(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(items)) != len(items):
            raise ValueError("a key is there twice")
        return found

    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{file.name} has {file.stat().st_size} bytes, expected at most {MAX_CONFIG_BYTES}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{file.name} is not valid JSON: {exc}") from exc
    if not isinstance(config, dict):
        raise CheckpointError(f"{file.name} holds {type(config).__name__}, expected an object")
    return config


def _plain(key: str) -> str:
    """A key as a message may show it: cut, and without what a terminal would take for a command."""
    return repr(key)[1:-1][:80]


def _sorted_out(
    entries: Mapping[str, TensorEntry], problems: list[str]
) -> tuple[dict[str, dict[str, TensorEntry]], TensorEntry | None]:
    pairs: dict[str, dict[str, TensorEntry]] = {}
    embeddings: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        found = _LORA.fullmatch(name)
        if not found and not _FAM.fullmatch(name):
            hint = ""
            if name.endswith(".base_layer.weight"):  # of a head or an embedding that is adapted itself
                hint = ": it is the base model's; save the adapter with save_embedding_layers=False"
            problems.append(f"{name!r:.120} is neither lora_A.weight nor lora_B.weight of a linear layer{hint}")
            continue
        place, part = (pairs.setdefault(found[1], {}), found[2]) if found else (embeddings, "")
        if part in place:
            problems.append(f"{name!r:.120} and {place[part].name!r:.120} are the same weight")
        if entry.dtype not in DTYPES:
            problems.append(f"{name!r:.120} is {entry.dtype}, expected {', '.join(DTYPES)}")
        place[part] = entry
    for module, pair in pairs.items():
        problems += [f"{module!r:.120} has no lora_{half}" for half in "AB" if half not in pair]
    if not entries:
        problems.append(f"{WEIGHTS} holds no tensors")
    return pairs, embeddings.get("")


def _names(config: Mapping[str, Any], key: str, problems: list[str]) -> tuple[str, ...]:
    names = config.get(key) or []
    if key == "target_modules" and isinstance(names, str):
        return ()  # a regular expression: the tensors say what it found
    if not isinstance(names, list) or len(names) > MAX_NAMES or not all(isinstance(name, str) for name in names):
        problems.append(f"{key} must be a list of at most {MAX_NAMES} names, got {names!r:.80}")
        return ()
    return tuple(names)


def _numbers(config: Mapping[str, Any], key: str, pattern: str, problems: list[str]) -> dict[str, Any]:
    """The numbers of ``pattern`` by name, last that of ``key`` for all others; a wrong one is noted and becomes 0."""
    named = config.get(pattern) or {}
    if not isinstance(named, dict) or len(named) > MAX_NAMES:
        problems.append(f"{pattern} must be an object of at most {MAX_NAMES} names, got {named!r:.80}")
        named = {}
    found: dict[str, Any] = {}
    for name, value in (*named.items(), (None, config.get(key))):
        where = key if name is None else f"{pattern} of {name!r:.80}"
        if name is not None and not _NAME.fullmatch(name):  # PEFT takes regular expressions; others' are not run here
            problems.append(f"{where} is not supported: expected the name of a module or the end of one")
        limit, kinds = (MAX_RANK, (int,)) if key == "r" else (2**53, (int, float))
        if type(value) not in kinds or not abs(value) <= limit or (key == "r" and value < 1):
            expected = f"a whole number from 1 to {MAX_RANK}" if key == "r" else "a number"
            problems.append(f"{where} must be {expected}, got {value!r:.80}")
            value = 0
        found.setdefault((name or "").removesuffix("$").replace("\\.", "."), value)
    return found


def _fam(given: Any, embeddings: TensorEntry | None, problems: list[str]) -> dict[str, int]:
    """FAM settings of the adapter: its ``"fam"`` object, and F of its embeddings."""
    if not isinstance(given, dict):
        problems.append(f"fam must be an object, got {given!r:.80}")
        given = {}
    problems += [
        f"unknown key fam.{_plain(key)}; expected {', '.join(DEFAULTS)}" for key in given if key not in DEFAULTS
    ]
    fam = {key: value for key, value in given.items() if key in DEFAULTS and type(value) is int}
    wrong = [key for key in given if key in DEFAULTS and key not in fam]
    problems += [f"fam.{key} must be a whole number, got {given[key]!r:.80}" for key in wrong]
    if embeddings and (len(embeddings.shape) != 2 or not embeddings.nbytes):
        problems.append(f"FAM embeddings have shape {list(embeddings.shape)!r:.80}, expected [F, D]")
    elif embeddings:
        length = embeddings.shape[0]
        if fam.get("fam_length", length) != length:
            problems.append(f"fam.fam_length is {fam['fam_length']}, but there are {length} FAM embeddings")
        fam["fam_length"] = length
    return fam
