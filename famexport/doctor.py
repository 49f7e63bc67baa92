"""What this machine has, which backends work on it, and the command that adds what is missing."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from famexport.errors import FamExportError, MissingDependencyError, UntrustedError
from famexport.kernels.build import COMMAND
from famexport.kernels.library import find
from famexport.runtime.cuda import Cuda
from famexport.runtime.ort import import_onnxruntime
from famexport.runtime.process import device_facts
from famexport.runtime.tensorrt_api import MODULES, import_tensorrt

# package -> (extra that installs it, what it is for)
PARTS = {
    "onnxruntime": ("cpu", "running bundles on the CPU (backend ort-cpu)"),
    "tokenizers": ("text", "streaming text rather than token ids"),
    "jinja2": ("text", "chat templates"),
    "torch": ("export", "exporting, and the reference backend torch"),
    "onnx": ("export", "exporting"),
    "onnxscript": ("export", "exporting"),
    "onnx-ir": ("export", "exporting"),
    "polygraphy": ("export", "comparing backends"),
    "transformers": ("hf", "converting GGUF files with SentencePiece tokenizers"),
    "tensorrt": ("tensorrt", "building and running TensorRT engines on the device"),
    "tensorrt-rtx-cu13": ("rtx", "building TensorRT-RTX engines, without a GPU; running them"),
    "cuda-python": ("gpu", "state on CUDA devices (backends ort-cuda, tensorrt, tensorrt-rtx)"),
    "onnxruntime-gpu": ("gpu", "running bundles on NVIDIA GPUs (backend ort-cuda)"),
    "gguf": ("hf", "converting GGUF files"),
    "huggingface-hub": ("hf", "converting by hub id"),
    "plotly": ("report", "bench --html"),
}


def examine() -> dict[str, Any]:
    """Machine, packages and backends; each missing thing with the command that adds it."""
    packages = []
    for name, (extra, purpose) in PARTS.items():
        try:
            packages.append({"package": name, "version": version(name), "purpose": purpose, "add": None})
        except PackageNotFoundError:
            add = f"pip install 'famexport[{extra}]'"
            packages.append({"package": name, "version": None, "purpose": purpose, "add": add})
    cuda = _cuda_problem()
    backends = [
        _tensorrt("tensorrt", cuda),
        _tensorrt("tensorrt-rtx", cuda),
        _ort_cuda(cuda),
        _ort_gpu("ort-tensorrt", "Tensorrt", cuda),
        _ort_cpu(),
        *_torch(),
    ]
    return {"device": device_facts(), "packages": packages, "backends": backends}


def _cuda_problem() -> str | None:
    """Why no CUDA device can be used here; None where one can."""
    try:
        cuda = Cuda()
    except FamExportError as exc:
        return str(exc).partition(";")[0]
    cuda.close()
    return None


def _tensorrt(name: str, cuda: str | None) -> dict[str, Any]:
    module, extra = MODULES[name]
    try:
        trt = import_tensorrt(name)
    except FamExportError as exc:
        return _backend(name, False, str(exc).partition(";")[0], f"pip install 'famexport[{extra}]'")
    said = f"{module} {trt.__version__}"
    if cuda:
        builds = "builds engines here, and runs none: " if name == "tensorrt-rtx" else "runs no engines: "
        return _backend(name, False, f"{said} {builds}{cuda}", None)
    return _backend(name, True, f"{said}, for bundles with engines built here", None)


def _ort_gpu(name: str, provider: str, cuda: str | None) -> dict[str, Any]:
    try:
        onnxruntime = import_onnxruntime()
    except (MissingDependencyError, OSError) as exc:
        return _backend(name, False, f"{exc.__cause__ or exc}", "pip install 'famexport[gpu]'")
    if f"{provider}ExecutionProvider" not in onnxruntime.get_available_providers():
        add = "pip install 'famexport[gpu]'"
        return _backend(name, False, f"onnxruntime {onnxruntime.__version__} has no {provider} provider", add)
    return _backend(name, cuda is None, cuda or f"onnxruntime {onnxruntime.__version__}", None)


def _ort_cuda(cuda: str | None) -> dict[str, Any]:
    found = _ort_gpu("ort-cuda", "CUDA", cuda)
    works, built, said = _kernels()
    found["detail"] += f"; {said}"
    if found["works"]:  # else there is more to add first
        found.update(works=works, add=None if built else COMMAND)
    return found


def _kernels() -> tuple[bool, bool, str]:
    """Whether ort-cuda works with what is there of famexport's own kernels, whether it uses them, and what to say."""
    try:
        library = find()
    except FamExportError as exc:  # a library that nobody vouches for is not passed over: ort-cuda refuses to load
        return not isinstance(exc, UntrustedError), False, str(exc).partition(";")[0]
    return (True, True, "kernels built") if library else (True, False, "kernels not built, slower without")


def _ort_cpu() -> dict[str, Any]:
    try:
        onnxruntime = import_onnxruntime()
    except (MissingDependencyError, OSError) as exc:  # OSError: a shared library of its own is missing
        return _backend("ort-cpu", False, f"{exc.__cause__ or exc}", "pip install 'famexport[cpu]'")
    if "CPUExecutionProvider" not in onnxruntime.get_available_providers():
        return _backend("ort-cpu", False, f"onnxruntime {onnxruntime.__version__} has no CPU provider", None)
    return _backend("ort-cpu", True, f"onnxruntime {onnxruntime.__version__}", None)


def _torch() -> list[dict[str, Any]]:
    try:
        import torch
    except (ImportError, OSError) as exc:
        add = "pip install 'famexport[export]'"
        return [_backend(name, False, f"{exc}", add) for name in ("torch", "torch-compile")]
    on_gpu = torch.cuda.is_available()
    said = f"torch {torch.__version__}, on the CPU"
    eager = _backend("torch", True, f"{said}, and on the GPU as torch:cuda" if on_gpu else said, None)
    places = ["on the CPU"] if shutil.which(os.environ.get("CXX") or "g++") else []  # which it compiles for with that
    places += ["on the GPU as torch-compile:cuda"] if on_gpu and find_spec("triton") else []
    if not places:
        missing = f"torch {torch.__version__}, but no C++ compiler for it"
        return [eager, _backend("torch-compile", False, missing, "sudo apt-get install g++")]
    return [eager, _backend("torch-compile", True, f"torch {torch.__version__}, {', and '.join(places)}", None)]


def _backend(name: str, works: bool, detail: str, add: str | None) -> dict[str, Any]:
    return {"backend": name, "works": works, "detail": detail, "add": add}
