"""The graphs made for CUDA on the CPU: ONNX Runtime's CPU sessions over a CUDA layer that is host memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from famexport.runtime.backend import STORAGE, Backend, Loop
from famexport.runtime.device import DeviceLoop
from famexport.runtime.device_weights import DeviceWeights
from famexport.runtime.layout import ring_layout
from famexport.runtime.ort_io import DTYPES
from famexport.runtime.ort_ring import RingEnqueuer, ring_files
from famexport.runtime.session import Session
from tests.runtime.fake_cuda import FakeCuda, view


class CpuRing(RingEnqueuer):
    """The same graphs by onnxruntime's CPU sessions, on raw addresses."""

    capturable = True
    spoil = -1

    def __init__(self, backend: Any, batch: int) -> None:
        super().__init__(backend.contract, batch, backend.sessions, backend.layout, backend.weights, None)
        self.cuda, self.used = backend.cuda, []

    def enqueue(self, graph: str, addresses: Mapping[str, int], stream: int) -> None:
        self.cuda.submit(lambda: self.compute(graph, {**self._weights.address, **addresses}))

    def compute(self, graph: str, addresses: Mapping[str, int]) -> None:
        session = self._sessions[graph]
        self.used.append(graph)
        taken = {v.name: view(addresses[v.name], STORAGE[DTYPES[v.type]], v.shape) for v in session.get_inputs()}
        for value, array in zip(session.get_outputs(), session.run(None, taken), strict=True):
            view(addresses[value.name], array.dtype, array.shape)[...] = array
            if self.spoil >= 0 and value.name.startswith(("present_key", "present_open_key")):
                view(addresses[value.name], array.dtype, array.shape)[self.spoil, -1, -1] = np.inf


class CpuRingBackend(Backend):
    """``library``: of the fused operators, built for the CPU; with it the fused graphs are run."""

    name, provider, device = "ring", "fake", "fake"

    def __init__(self, session: Session, library: Path | None = None) -> None:
        import onnxruntime as ort

        super().__init__(session.contract, session.backend.precision)
        bundle, contract = session.bundle, session.contract
        self.layout = ring_layout(contract, contract.fam_length + contract.block_size)
        self.cuda, options = FakeCuda(), ort.SessionOptions()
        options.log_severity_level = 3
        if library is not None:
            options.register_custom_ops_library(str(library))
        files = ring_files(bundle, fused=library is not None)
        assert files
        self.sessions = {
            graph: ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            for graph, file in files.items()
        }
        stepped = {s.name for io in self.layout.graphs.values() for s in io.inputs}
        stepped |= {name for stored in self.layout.stored.values() for name in stored.names}
        taken = [v.name for s in self.sessions.values() for v in s.get_inputs() if v.name not in stepped]
        self.weights = DeviceWeights(bundle.file("weights.safetensors"), dict.fromkeys(taken), self.cuda)

    def _open(self, batch: int) -> Loop:
        self.engine = CpuRing(self, batch)
        return DeviceLoop(self.contract, batch, self.engine, self.cuda, layout=self.layout)


RingBackend = Callable[[Session], CpuRingBackend]
