"""famexport: put a TransformerFAM model on a device. One block step as an ONNX graph, looped in constant memory.

    import famexport as fx

    bundle = fx.export_bundle("checkpoints/model", "out/model")  # needs famexport[export]
    with fx.load("out/model") as session, session.stream() as stream:
        logits = stream.step(tokens)

Everything is imported when it is first used, so that a device without torch pays for none of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from famexport.bundle import Bundle, open_bundle
    from famexport.checkpoint import init_checkpoint, open_checkpoint
    from famexport.config import FamConfig, preset
    from famexport.contract import StepContract, TensorSpec
    from famexport.convert import convert as convert_checkpoint
    from famexport.errors import FamExportError
    from famexport.export.pipeline import export_bundle
    from famexport.runtime.pool import Pool
    from famexport.runtime.session import Session, load
    from famexport.runtime.snapshot import Snapshot
    from famexport.runtime.stream import Stream

__version__ = "0.1.0"

_HOMES = {
    "Bundle": "famexport.bundle",
    "FamConfig": "famexport.config",
    "FamExportError": "famexport.errors",
    "Pool": "famexport.runtime.pool",
    "Session": "famexport.runtime.session",
    "Snapshot": "famexport.runtime.snapshot",
    "StepContract": "famexport.contract",
    "Stream": "famexport.runtime.stream",
    "TensorSpec": "famexport.contract",
    "convert_checkpoint": "famexport.convert",
    "export_bundle": "famexport.export.pipeline",
    "init_checkpoint": "famexport.checkpoint",
    "load": "famexport.runtime.session",
    "open_bundle": "famexport.bundle",
    "open_checkpoint": "famexport.checkpoint",
    "preset": "famexport.config",
}
_NAMES = {"convert_checkpoint": "convert"}  # a submodule has the plain name
__all__ = [
    "Bundle",
    "FamConfig",
    "FamExportError",
    "Pool",
    "Session",
    "Snapshot",
    "StepContract",
    "Stream",
    "TensorSpec",
    "__version__",
    "convert_checkpoint",
    "export_bundle",
    "init_checkpoint",
    "load",
    "open_bundle",
    "open_checkpoint",
    "preset",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), _NAMES.get(name, name))
    raise AttributeError(f"module 'famexport' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
