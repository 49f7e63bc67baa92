"""An ONNX Runtime whose CUDA provider captures as the real one does, over its CPU provider and ``FakeCuda``."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from fake_cuda import FakeCuda, view

from famexport.kernels.library import FOLDER
from famexport.runtime.backend import STORAGE
from famexport.runtime.ort_io import DTYPES


class FakeSession:
    """CPU session under CUDA's name. With ``enable_cuda_graph`` it keeps, for each thread, what a number was first
    bound to, and replays that ever after; no number means 0, and -1 none (cuda_execution_provider.cc, cuda_graph.h)."""

    made: list[FakeSession]

    def __init__(self, file: str, options: Any, providers: list[tuple[str, dict[str, str]]]) -> None:
        self.options, self.provider = options, providers[0][1]
        self.capture, self.file = self.provider.get("enable_cuda_graph") == "1", Path(file).name
        self.numbers: list[str] = []  # of each run
        if self.capture and any(name in self.file for name in self.refuses):
            raise RuntimeError("This session cannot use the graph capture feature")
        own = onnxruntime.SessionOptions()
        own.log_severity_level = 3
        self.inner = onnxruntime.InferenceSession(file, own, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs = self.inner.get_inputs, self.inner.get_outputs
        self.contexts: dict[int, dict[str, dict[str, int]]] = {}
        self.made.append(self)

    refuses: tuple[str, ...] = ()  # parts of names of files: what cannot be captured is known when it is loaded
    breaks: tuple[str, ...] = ()  # only in a run
    fails: tuple[str, ...] = ()  # captured or not

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider"]

    def io_binding(self) -> Any:
        binding = type("Binding", (), {})()
        binding.addresses = {}

        def bind(name: str, device: str, index: int, dtype: Any, shape: Any, address: int) -> None:
            binding.addresses[name] = address

        binding.bind_input = binding.bind_output = bind
        return binding

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        addresses = binding.addresses
        if any(name in self.file for name in self.fails):
            raise RuntimeError("no kernel image is available")
        number = "0"
        if options is not None:
            try:
                number = options.get_run_config_entry("gpu_graph_id")
            except RuntimeError:
                number = "0"
        self.numbers.append(number)
        if self.capture:
            if number != "-1" and any(name in self.file for name in self.breaks):
                raise RuntimeError("operation not permitted when stream is capturing")
            if number != "-1":
                addresses = self.contexts.setdefault(threading.get_ident(), {}).setdefault(number, addresses)
        taken = {v.name: view(addresses[v.name], STORAGE[DTYPES[v.type]], v.shape) for v in self.get_inputs()}
        for value, array in zip(self.get_outputs(), self.inner.run(None, taken), strict=True):
            view(addresses[value.name], array.dtype, array.shape)[...] = array


def install(monkeypatch: pytest.MonkeyPatch) -> type[FakeSession]:
    """OrtCudaRing itself, over the fake; what it gives is the class of its sessions."""
    made = type("Sessions", (FakeSession,), {"made": []})
    module = type("Ort", (), {})()
    module.__version__, module.SessionOptions = "fake", onnxruntime.SessionOptions
    module.InferenceSession, module.get_available_providers = made, lambda: ["CUDAExecutionProvider"]
    monkeypatch.setattr("famexport.runtime.ort_cuda.import_onnxruntime", lambda: module)
    monkeypatch.setattr("famexport.runtime.ort_cuda.Cuda", FakeCuda)
    monkeypatch.setenv(FOLDER, "/nowhere")  # this machine's own kernels are for the real one
    return made
