"""Checkpoints: a Hugging Face directory (``config.json``, ``*.safetensors``, ``tokenizer.json``) with FAM's additions.

Weights are never pickled and never held all at once: a tensor is mapped when it is asked for and unmapped when it is
dropped, and a checkpoint is written one tensor at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from famexport.config import FamConfig
from famexport.errors import (
    CheckpointError,
    ConfigError,
    FamExportError,
    InvalidInputError,
    UsageError,
    first_line,
    raise_problems,
)
from famexport.hf_config import config_from_hf, config_to_hf, family_problem
from famexport.publish import staged_directory
from famexport.tensorfile import TensorEntry, read_header, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

MAX_CONFIG_BYTES = 2**20
MAX_INDEX_BYTES = 16 * 2**20
FAM_WEIGHT = "model.fam_embeddings.weight"
EMBED_WEIGHT = "model.embed_tokens.weight"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. ``tensors`` maps the name of every weight the model needs to where it lies."""

    path: Path
    config: FamConfig
    fam_trained: bool
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, Path]  # tensor name -> the file that holds it

    def tensor(self, name: str) -> Tensor:
        """The weight ``name``, memory-mapped: it costs memory as it is read, until it is dropped.

        Raises:
            CheckpointError: the safetensors package refuses the file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.files[name], framework="pt") as file:
                weight: Tensor = file.get_tensor(name)
                return weight
        except SafetensorError as exc:
            raise CheckpointError(f"{self.files[name]} cannot be read: {exc!s:.200}; copy it again") from exc

    @property
    def dtype(self) -> str:
        """The dtype of the token embeddings, which stands for the checkpoint's."""
        return self.tensors[EMBED_WEIGHT].dtype

    @property
    def tokenizer(self) -> Path | None:
        path = self.path / "tokenizer.json"
        return path if path.is_file() else None

    def tokenizer_files(self) -> dict[str, bytes]:
        """``tokenizer.json``, and what goes with it: chat template, special tokens. None of them without the first."""
        if self.tokenizer is None:
            return {}
        return {name: (self.path / name).read_bytes() for name in TOKENIZER_FILES if (self.path / name).is_file()}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint that carries a ``"fam"`` object, and check that every weight is there in its shape.

    Raises:
        UsageError: no such directory.
        UnsupportedModelError, ConfigError: the configuration is not one famexport implements.
        CheckpointError: missing, unexpected, misshapen or truncated weights, all named at once.
    """
    path = Path(path)
    data = read_hf_config(path)
    if not isinstance(data.get("fam"), dict):
        raise CheckpointError(
            f'{path}: config.json has no "fam" object, so this is a plain Hugging Face checkpoint; '
            f"make it one of famexport's with: famexport convert {path} -o CHECKPOINT"
        )
    config = config_from_hf(data)
    files, tensors = tensor_files(path)
    check_tensors(config, tensors, str(path))
    used = parameter_shapes(config)
    return Checkpoint(
        path=path,
        config=config,
        fam_trained=bool(data["fam"].get("trained", False)),
        tensors={name: tensors[name] for name in used},
        files={name: files[name] for name in used},
    )


def read_hf_config(path: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a Hugging Face directory."""
    if not path.exists():
        raise UsageError(f"no such path: {path}")
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path} has no config.json; expected a directory in the Hugging Face form")
    return _read_json(file, MAX_CONFIG_BYTES)


def _read_json(file: Path, max_bytes: int) -> dict[str, Any]:
    if file.stat().st_size > max_bytes:
        raise CheckpointError(f"{file} has {file.stat().st_size} bytes, expected at most {max_bytes}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{file} is not valid JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} holds {type(data).__name__}, expected an object")
    return data


def tensor_files(path: Path) -> tuple[dict[str, Path], dict[str, TensorEntry]]:
    """Every tensor in the directory's safetensors files: the file it lies in, and its entry there."""
    found = _weight_files(path)
    if not found:
        hint = ""
        if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
            hint = "; pickled weights are not read: save the model again with safe_serialization=True"
        raise CheckpointError(f"{path} has no *.safetensors file{hint}")
    files: dict[str, Path] = {}
    tensors: dict[str, TensorEntry] = {}
    for file in found:
        try:
            entries = read_header(file)
        except InvalidInputError as exc:
            raise CheckpointError(f"{path}: {exc}") from exc
        for name, entry in entries.items():
            if name in files:
                raise CheckpointError(f"{path}: {name!r:.100} is in both {files[name].name} and {file.name}")
            files[name], tensors[name] = file, entry
    return files, tensors


def _weight_files(path: Path) -> list[Path]:
    """``model.safetensors``, or the shards in its index: a hub directory may hold the same weights in more files."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return sorted(path.glob("*.safetensors"))
    shards = _read_json(index, MAX_INDEX_BYTES).get("weight_map")
    names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
    problems = [] if names else ["no weight_map"]
    problems += [
        f"{name!r:.100} is not a file name" for name in names if not name or "\0" in name or Path(name).name != name
    ]
    problems = problems or [f"{name!r:.100} is missing; copy it again" for name in names if not (path / name).is_file()]
    raise_problems(CheckpointError, str(index), problems)
    return [path / name for name in names]


def parameter_shapes(config: FamConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of the model, as the model itself declares them."""
    import torch

    from famexport.model import FamModel

    try:
        with torch.device("meta"):
            return {name: tuple(p.shape) for name, p in FamModel(config).named_parameters()}
    except (RuntimeError, OverflowError, TypeError) as exc:  # sizes whose product is beyond 64 bits
        raise ConfigError(f"the model's sizes are too large: {first_line(exc, 200)}") from exc


def check_tensors(config: FamConfig, tensors: Mapping[str, TensorEntry], subject: str, optional: str = "") -> None:
    """Raise one CheckpointError for all missing, unexpected and misshapen weights; ``optional`` may be missing."""
    expected = parameter_shapes(config)
    problems = [f"missing {name}" for name in expected if name not in tensors and name != optional]
    for name, entry in tensors.items():
        if name in expected:
            if entry.shape != expected[name]:
                problems.append(f"{name} has shape {list(entry.shape)}, expected {list(expected[name])}")
            elif entry.dtype not in ("float32", "float16", "bfloat16"):
                problems.append(f"{name} is {entry.dtype}, expected float32, float16 or bfloat16")
        elif not name.endswith(_IGNORED_SUFFIXES) and not (name == "lm_head.weight" and config.tie_word_embeddings):
            problems.append(f"unexpected {name!r:.100}")
    if len(problems) > 20:
        problems = [*problems[:20], f"and {len(problems) - 20} more"]
    raise_problems(CheckpointError, f"{subject}: weights do not fit config.json", problems)


def write_checkpoint(
    target: str | Path,
    config: FamConfig,
    dtypes: Mapping[str, str],
    load: Callable[[str], Tensor],
    *,
    fam_trained: bool,
    extra: Mapping[str, bytes] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a checkpoint directory, published by rename when it is complete.

    Args:
        dtypes: dtype of each weight to be written; names not in it take the embeddings' dtype.
        load: gives one weight, of any float dtype.
        extra: further files, such as ``tokenizer.json``.
    Raises:
        CheckpointError: the configuration does not fit its ``model_type``.
    """
    import torch

    target = Path(target)
    if problem := family_problem(config):
        raise CheckpointError(problem)
    default = dtypes[EMBED_WEIGHT]
    entries = [TensorEntry(name, dtypes.get(name, default), shape) for name, shape in parameter_shapes(config).items()]
    wanted = {e.name: getattr(torch, e.dtype) for e in entries}

    def raw(name: str) -> Any:
        return tensor_bytes(load(name).to(wanted[name]))

    text = json.dumps(config_to_hf(config, default, fam_trained), indent=2) + "\n"
    with staged_directory(target, is_checkpoint, "checkpoint") as temp:
        for name, content in (extra or {}).items():
            (temp / name).write_bytes(content)
        write_tensors(temp / "model.safetensors", entries, raw, metadata={"format": "pt"}, progress=progress)
        (temp / "config.json").write_text(text, encoding="utf-8")
    return target


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is one of famexport's own, which may be replaced; anyone's Hugging Face model may not."""
    try:
        return isinstance(read_hf_config(path).get("fam"), dict) and (path / "model.safetensors").is_file()
    except (FamExportError, OSError):
        return False


def tensor_bytes(tensor: Tensor) -> Any:
    """A numpy view of a CPU tensor's bytes, row-major."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def init_checkpoint(
    target: str | Path,
    config: FamConfig,
    *,
    seed: int = 0,
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """A random checkpoint: each weight depends on the seed and its own name only, so any order gives the same bytes."""
    shapes = parameter_shapes(config)
    return write_checkpoint(
        target,
        config,
        {EMBED_WEIGHT: dtype},
        lambda name: random_weight(name, shapes[name], seed, config.num_hidden_layers),
        fam_trained=False,
        progress=progress,
    )


def random_weight(name: str, shape: tuple[int, ...], seed: int, layers: int) -> Tensor:
    """Normal with standard deviation 0.02, smaller where a residual branch ends (GPT-2); norms one, biases zero."""
    import torch

    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    std = 0.02 / math.sqrt(2 * layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
    return torch.randn(shape, generator=seeded(f"{seed}/{name}")).mul_(std)


def seeded(text: str) -> Any:
    """A torch generator whose seed is the digest of ``text``."""
    import torch

    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1)


def sampled_fam_embeddings(embeddings: Tensor, fam_length: int, seed: int = 0) -> Tensor:
    """Untrained prompt embeddings [F, D]: rows of the vocabulary drawn at random (Lester et al. 2021, section 3.2)."""
    import torch

    rows = torch.randperm(embeddings.shape[0], generator=seeded(f"{seed}/{FAM_WEIGHT}"))[:fam_length]
    if fam_length > embeddings.shape[0]:
        rows = torch.randint(embeddings.shape[0], (fam_length,), generator=seeded(f"{seed}/{FAM_WEIGHT}"))
    return embeddings[rows].clone()
