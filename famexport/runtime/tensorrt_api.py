"""The one place that imports TensorRT: ``tensorrt`` (10.x, 11.x) and ``tensorrt_rtx`` (1.x) share the API used here."""

from __future__ import annotations

import platform
from typing import Any

from famexport.errors import IncompatibleError, MissingDependencyError, first_line

MODULES = {"tensorrt": ("tensorrt", "tensorrt"), "tensorrt-rtx": ("tensorrt_rtx", "rtx")}
# TensorRT's names of dtypes, by the contract's
DTYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "bool": "BOOL",
}
_KEPT = 20  # messages of a logger


def import_tensorrt(engine: str) -> Any:
    """The module of ``engine``.

    Raises:
        MissingDependencyError: it is not installed.
        IncompatibleError: it is there, and does not load.
    """
    name, extra = MODULES[engine]
    try:
        if engine == "tensorrt":
            import tensorrt

            return tensorrt
        import tensorrt_rtx

        return tensorrt_rtx
    except ModuleNotFoundError as exc:
        raise MissingDependencyError(name.replace("_", "-"), extra, f"the engine {engine}") from exc
    except (ImportError, OSError, RuntimeError) as exc:
        raise IncompatibleError(f"{name} is installed and does not load: {first_line(exc, 300)}") from exc


def new_logger(trt: Any) -> Any:
    """A logger that keeps the newest errors and warnings, as ``errors`` and ``warnings``, and prints nothing."""

    class Quiet(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            kinds = trt.ILogger.Severity
            if severity in (kinds.ERROR, kinds.INTERNAL_ERROR):
                self.errors = [*self.errors, message][-_KEPT:]
            elif severity == kinds.WARNING:
                self.warnings = [*self.warnings, message][-_KEPT:]

    return Quiet()


def host_facts() -> tuple[str, str]:
    """(operating system, processor) as device tuples name them."""
    return platform.system().lower(), platform.machine().lower()
