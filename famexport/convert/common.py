"""What both converters share: the options, casting that never makes an infinity, and the write itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from famexport.checkpoint import EMBED_WEIGHT, FAM_WEIGHT, sampled_fam_embeddings, write_checkpoint
from famexport.config import FamConfig
from famexport.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from famexport.convert.lora_file import Adapter

DEFAULT_BLOCK_SIZE = 128
DEFAULT_MEMORY_SEGMENTS = 3
DEFAULT_FAM_LENGTH = 16
DEFAULTS = {
    "block_size": DEFAULT_BLOCK_SIZE,
    "memory_segments": DEFAULT_MEMORY_SEGMENTS,
    "fam_length": DEFAULT_FAM_LENGTH,
}
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Options:
    """How to convert. ``fam`` holds only the FAM settings that were asked for."""

    fam: Mapping[str, Any]
    dtype: str | None = None
    seed: int = 0
    progress: Callable[[int, int], None] | None = None
    lora: Adapter | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def fam_over(self, source: Mapping[str, Any]) -> dict[str, Any]:
        """The FAM settings that go before the ``source``'s own: those of a LoRA adapter, then those asked for."""
        if self.lora is None:
            return dict(self.fam)
        from famexport.convert.lora import fam_settings

        return fam_settings(self.lora, source, self.fam)

    @property
    def brings_embeddings(self) -> bool:
        """Whether the prompt embeddings are those of a LoRA adapter, trained with it."""
        return self.lora is not None and self.lora.embeddings is not None


def write_converted(
    target: Path,
    config: FamConfig,
    dtypes: Mapping[str, str],
    load: Callable[[str, str], Tensor],
    options: Options,
    *,
    fam_trained: bool = False,
    extra: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a checkpoint, a LoRA adapter merged in, sampling the prompt embeddings where there are none.

    Args:
        dtypes: each of the source's weights and the dtype it has, or takes where the options name none.
        load: gives one weight by name in a dtype.
    """
    if options.lora:
        from famexport.convert.lora import merged

        dtypes, load = merged(options.lora, config, dtypes, load)
    wanted = {name: options.dtype or dtype for name, dtype in dtypes.items()}
    sampled: dict[str, Tensor] = {}
    if config.fam_length and FAM_WEIGHT not in dtypes:
        embeddings = load(EMBED_WEIGHT, wanted[EMBED_WEIGHT])
        sampled[FAM_WEIGHT] = sampled_fam_embeddings(embeddings, config.fam_length, options.seed)
        del embeddings  # the largest tensor of all, before it is loaded again to be written

    def weight(name: str) -> Tensor:
        return sampled[name] if name in sampled else load(name, wanted[name])

    fam_trained = fam_trained or options.brings_embeddings
    return write_checkpoint(
        target, config, wanted, weight, fam_trained=fam_trained, extra=extra, progress=options.progress
    )


def cast(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """``tensor`` in ``dtype``.

    Raises:
        CheckpointError: NaN or infinite values, there already or made by the cast.
    """
    import torch

    low, high = (float(edge) for edge in torch.aminmax(tensor))  # a NaN anywhere makes both NaN
    largest = max(abs(low), abs(high))
    if not largest < float("inf"):
        raise CheckpointError(f"{name} holds NaN or infinite values; the source is damaged, get it again")
    wanted: torch.dtype = getattr(torch, dtype)
    if largest > torch.finfo(wanted).max:
        raise CheckpointError(
            f"{name} holds values up to {largest:.4g}, which {dtype} cannot hold; take float32 or bfloat16"
        )
    return tensor.to(wanted)
