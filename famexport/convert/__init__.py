"""Existing models become checkpoints: a Hugging Face directory, a hub id or a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from famexport.convert.common import Options
from famexport.errors import UsageError

__all__ = ["convert"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    block_size: int | None = None,
    memory_segments: int | None = None,
    fam_length: int | None = None,
    fam_query_position: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    lora: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Make a checkpoint of an existing model, one tensor in memory at a time.

    Args:
        source: a Hugging Face directory, a ``*.gguf`` file, or a hub id ``owner/name``.
        target: the directory to publish.
        block_size, memory_segments, fam_length, fam_query_position: T, M, F and where FAM queries stand; None keeps
            what the source's ``"fam"`` object says, or takes the default.
        dtype: float32, float16 or bfloat16 for all weights; None keeps each tensor's (quantised ones become float16).
        seed: of the prompt embeddings, where the source has none.
        lora: a directory with a LoRA adapter in PEFT's form, merged into the weights. It may carry prompt embeddings,
            which replace the source's, and a ``"fam"`` object in its configuration: settings that are taken where
            none are given.
        progress: called with (bytes written, bytes in all).
    Returns:
        The path of the checkpoint.
    Raises:
        UsageError: no such source, or a target that would overwrite it.
        UnsupportedModelError: an architecture or option that famexport does not implement.
        CheckpointError: damaged weights or tokenizer, or an adapter that cannot be merged.
    """
    fam = {
        "block_size": block_size,
        "memory_segments": memory_segments,
        "fam_length": fam_length,
        "fam_query_position": fam_query_position,
    }
    adapter = None
    if lora is not None:
        from famexport.convert.lora_file import read_adapter

        adapter = read_adapter(Path(lora))
    options = Options({k: v for k, v in fam.items() if v is not None}, dtype, seed, progress, adapter)
    path, target = Path(source), Path(target)
    if not path.exists():
        path = _from_hub(str(source))
    for origin in (path, *([adapter.path] if adapter else [])):
        here = origin.resolve()
        if target.resolve() in (here, *here.parents):
            raise UsageError(
                f"the checkpoint {target} would replace its own source {origin}; give another path with -o"
            )
    if path.is_dir():
        from famexport.convert.hf import convert_directory

        return convert_directory(path, target, options)
    if path.suffix == ".gguf" or _is_gguf(path):
        from famexport.convert.gguf import convert_gguf

        return convert_gguf(path, target, options)
    raise UsageError(f"{path} is not a model; expected a Hugging Face directory, a .gguf file or a hub id owner/name")


def _is_gguf(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return path.is_file() and file.read(4) == b"GGUF"
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}") from exc


def _from_hub(source: str) -> Path:
    # A misspelt local path such as "models/lama" must not turn into a network request.
    local = source.endswith(".gguf") or Path(source).parent.exists()
    if local or not _HUB_ID.fullmatch(source):
        raise UsageError(
            f"no such path: {source}; expected a Hugging Face directory, a .gguf file or a hub id owner/name"
        )
    from famexport.convert.hf import download

    return download(source)
