"""ONNX Runtime's CUDA provider with the graphs made for it: one copy of the weights, a ring of states, captured steps.

ONNX Runtime itself captures each turn of the ring as a CUDA graph, which it can since every node runs on the device:
the first run of a set of addresses computes uncaptured, captures and replays. A graph that it cannot capture runs as
it is, and a loop's ``info`` says so. It keeps what it captured, with contexts of CUDA's libraries, for each thread
that ever ran a session: a stream that a new thread drives for every request captures again and its memory grows.
Drive it from few threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, cast

from famexport.bundle import Bundle
from famexport.contract import ITEM_BYTES, GraphIO, StepContract
from famexport.errors import BundleError, FamExportError, IncompatibleError, raise_problems
from famexport.kernels.build import file_hash
from famexport.runtime.device import DeviceLoop
from famexport.runtime.device_weights import DeviceWeights
from famexport.runtime.enqueue import CudaLayer
from famexport.runtime.layout import START, Layout, ring_layout
from famexport.runtime.ort_cuda import OrtCuda, OrtEnqueuer
from famexport.runtime.ort_io import DTYPES, ONNX_TYPES

Call = tuple[str, tuple[int, ...]]  # a graph and the addresses of what it takes and gives


def ring_files(bundle: Bundle, *, fused: bool = False) -> dict[str, Path]:
    """The graphs made for CUDA, as ``OrtCudaRing`` takes them; none where a bundle has none.

    Args:
        fused: steady graphs with the operators of ``famexport.kernels``; start graphs have none.
    """
    own = {name: graph.variants for name, graph in bundle.manifest.graphs.items()}
    steady, start = "ort-cuda-fused" if fused else "ort-cuda", "ort-cuda-start"
    if not all({steady, start} <= set(variants) for variants in own.values()):
        return {}
    return {
        name + suffix: bundle.file(variants[key])
        for name, variants in own.items()
        for suffix, key in (("", steady), (START, start))
    }


class OrtCudaRing(OrtCuda):
    """The backend ort-cuda for bundles that have graphs of its own; arguments as for ``OrtCpu``.

    Args:
        graphs: each graph of the contract, and its ``layout.START`` one.
        capture: let ONNX Runtime capture what it runs.
        library: of the operators that fused graphs have.
    """

    def __init__(
        self,
        contract: StepContract,
        precision: str,
        graphs: Mapping[str, Path],
        weights: Path,
        threads: int | None = None,
        *,
        capture: bool = True,
        library: Path | None = None,
    ) -> None:
        self.weights: DeviceWeights | None = None
        self.uncaptured_graphs: dict[str, str] = {}  # each with the reason
        self.library, self.kernels = library, "fused" if library else None
        self._capture = capture
        self._numbers: dict[Call, int] = {}
        self._hashes: dict[str, str] = {}  # of the graphs as they were loaded
        self._regions: KeptRegions | None = None
        self.layout = ring_layout(contract, contract.fam_length + contract.block_size)
        super().__init__(contract, precision, graphs, weights, threads)
        assert self._cuda is not None
        self._regions = KeptRegions(self._cuda)
        try:
            self.weights = DeviceWeights(weights, self._weight_names(), self._cuda)
        except BaseException:
            self.close()
            raise

    def _load(self, name: str) -> Any:
        self._hashes[name] = file_hash(self._files[name])
        if not self._capture:
            return self._session(name)
        try:
            return self._session(name, {"enable_cuda_graph": "1"})
        except IncompatibleError as exc:
            session = self._session(name)
            self._note(name, str(exc))
            return session

    def _note(self, name: str, reason: str) -> None:
        self.uncaptured_graphs[name] = reason
        if not name.endswith(START):
            self.uncaptured_reason = reason

    def _without_capture(self, name: str, reason: str) -> Any:
        """A session for a graph whose capture failed in a run; later loops take it too. None: the backend is closed."""
        if self._cuda is not None and name not in self.uncaptured_graphs:
            if file_hash(self._files[name]) != self._hashes[name]:
                raise BundleError(f"{self._files[name]} has changed since it was loaded; load the bundle again")
            self.sessions[name] = self._session(name)
            self._note(name, reason)
        return self.sessions.get(name)

    def _said(self, uncaptured: Mapping[str, str]) -> dict[str, Any]:
        """What a loop's ``info`` says. Start graphs run a few times in a stream's life: without them it is captured."""
        reasons = [reason for name, reason in uncaptured.items() if not name.endswith(START)]
        reason = "not asked for" if not self._capture else reasons[0] if reasons else None
        said = {"captured": reason is None, "uncaptured_reason": reason, "uncaptured_graphs": dict(uncaptured)}
        return said | ({"kernels": self.kernels} if self.kernels else {})

    def _weight_names(self) -> list[str]:
        """Inputs that are no part of a step's own, each once, in graph order."""
        own = {spec.name for io in self.layout.graphs.values() for spec in io.inputs}
        own |= {name for stored in self.layout.stored.values() for name in stored.names}
        names = [v.name for session in self.sessions.values() for v in session.get_inputs() if v.name not in own]
        return list(dict.fromkeys(names))

    def _open(self, batch: int) -> DeviceLoop:
        if self._cuda is None or self.weights is None:
            raise FamExportError(f"the backend {self.name} is closed; load the bundle again")
        uncaptured, info = dict(self.uncaptured_graphs), dict[str, Any]()

        def without_capture(graph: str, reason: str) -> Any:
            if (session := self._without_capture(graph, reason)) is not None:
                uncaptured[graph] = reason
                info.update(self._said(uncaptured))
            return session

        engine = RingEnqueuer(
            self.contract,
            batch,
            self.sessions,
            self.layout,
            self.weights,
            self._numbers if self._capture else None,
            uncaptured,
            without_capture,
        )
        loop = DeviceLoop(self.contract, batch, engine, cast(CudaLayer, self._regions), layout=self.layout)
        info = loop.info  # without a hold on the loop itself
        info.update(self._said(uncaptured))
        return loop

    def close(self) -> None:
        self.sessions = {}  # before what they point into
        if self._cuda is not None:
            if self.weights is not None:
                self.weights.close()
                self.weights = None
            if self._regions is not None:
                self._regions.give_back()
        super().close()


class RingEnqueuer(OrtEnqueuer):
    """The same with the weights' addresses, and each set of addresses a CUDA graph of its own.

    Args:
        numbers: of those graphs, shared by all loops over the same sessions; None where nothing is captured.
        uncaptured: graphs whose sessions do not capture.
        without_capture: called with a graph whose capturing session failed, and the error; gives one that does not
            capture and adds the graph to ``uncaptured``, or gives None.
    Raises:
        BundleError: a graph takes or gives what the layout has not, or in another size: it would read or write beyond
            what is its own.
    """

    def __init__(
        self,
        contract: StepContract,
        batch: int,
        sessions: Mapping[str, Any],
        layout: Layout,
        weights: DeviceWeights,
        numbers: dict[Call, int] | None,
        uncaptured: Mapping[str, str] | None = None,
        without_capture: Callable[[str, str], Any] | None = None,
    ) -> None:
        super().__init__(contract, batch, sessions)
        self._weights, self._numbers, self._uncaptured = weights, numbers, uncaptured if uncaptured is not None else {}
        self._without_capture = without_capture
        for name, session in self._sessions.items():
            taken, given = _sizes(layout, layout.graphs[name], batch)
            taken |= {weight: (None, size) for weight, size in weights.sizes.items()}
            problems = _problems(session.get_inputs(), taken) + _problems(session.get_outputs(), given)
            absent = given.keys() - {value.name for value in session.get_outputs()}
            problems += [f"it does not give {name}" for name in sorted(absent)]
            subject = f"the graph {name} made for CUDA does not fit this famexport (export the bundle again)"
            raise_problems(BundleError, subject, problems)
        weights.retain()

    def enqueue(self, graph: str, addresses: Mapping[str, int], stream: int) -> None:
        """A run that fails where it may have been the capture that failed is done again without capture."""
        try:
            super().enqueue(graph, addresses, stream)
        except FamExportError as exc:
            if self._numbers is None or graph in self._uncaptured or self._without_capture is None:
                raise
            if (session := self._without_capture(graph, str(exc))) is None:
                raise
            for call in [call for call in self._calls if call[0] == graph]:
                del self._calls[call]
            self._sessions[graph] = session
            super().enqueue(graph, addresses, stream)

    def _options(self, graph: str, addresses: Mapping[str, int]) -> Any:
        """A session replays what it captured under a number with the addresses of then, whatever is bound now: two
        loops must not share one, but a later loop in the place of an earlier one may."""
        import onnxruntime

        number = -1  # capture nothing and replay nothing: without a number a session that captures would take 0 for all
        if self._numbers is not None and graph not in self._uncaptured:
            call = graph, tuple(addresses.values())
            number = self._numbers.setdefault(call, len(self._numbers) + 1)
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number))
        return options

    def _bind(self, graph: str, addresses: Mapping[str, int]) -> Any:
        session = self._sessions[graph]
        binding, known = session.io_binding(), {**self._weights.address, **addresses}
        for values, bind in ((session.get_inputs(), binding.bind_input), (session.get_outputs(), binding.bind_output)):
            for value in values:
                dtype = ONNX_TYPES[DTYPES[value.type]]
                bind(value.name, "cuda", 0, dtype, list(value.shape), known[value.name])
        return binding

    def close(self) -> None:
        if self._sessions:
            self._weights.close()
        super().close()


class KeptRegions:
    """A CUDA layer that keeps the memory of a closed loop for the next one, which has the same size.

    A session can forget no graph that it captured: streams that come and go must come to the same addresses, or each
    would leave its graphs behind.
    """

    def __init__(self, cuda: CudaLayer) -> None:
        self._cuda = cuda
        self._size: int | None = None  # of a loop's region, the first thing that it asks for
        self._regions: set[int] = set()
        self._unused: list[int] = []
        self._keeps = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cuda, name)

    def malloc(self, nbytes: int) -> int:
        self._size = self._size or nbytes
        if nbytes != self._size:
            return self._cuda.malloc(nbytes)
        if self._unused:
            return self._unused.pop()
        self._regions.add(address := self._cuda.malloc(nbytes))
        return address

    def free(self, address: int) -> None:
        if self._keeps and address in self._regions:
            self._unused.append(address)
        else:
            self._cuda.free(address)

    def give_back(self) -> None:
        """Free what no loop uses, and from now on what is freed: the sessions go."""
        self._keeps = False
        while self._unused:
            self._cuda.free(self._unused.pop())


_Sizes = dict[str, tuple[str | None, int]]  # dtype, where it is known, and bytes


def _sizes(layout: Layout, io: GraphIO, batch: int) -> tuple[_Sizes, _Sizes]:
    """What a graph takes and gives, weights apart, by the engine's names."""
    taken: _Sizes = {spec.name: (spec.dtype, spec.nbytes(batch)) for spec in io.inputs}
    given: _Sizes = {io.logits.name: (io.logits.dtype, io.logits.nbytes(batch))} if io.logits else {}
    for spec in io.states:
        stored = layout.stored[spec.name]
        taken |= dict.fromkeys(stored.names, (spec.dtype, stored.row_bytes * batch))
    for spec in io.new:
        stored = layout.stored[spec.name]
        given[stored.new] = spec.dtype, stored.row_bytes * batch
    return taken, given


def _problems(values: Any, sizes: _Sizes) -> list[str]:
    found = []
    for value in values:
        dtype, fixed = DTYPES.get(value.type), all(isinstance(n, int) and n > 0 for n in value.shape)
        if value.name not in sizes or dtype is None or not fixed:
            found.append(f"{value.name!r:.80} {value.type} {list(value.shape)} is nothing that a step has")
            continue
        wanted, size = sizes[value.name]
        got = prod(value.shape) * ITEM_BYTES[dtype]
        if got != size or wanted not in (None, dtype):
            found.append(f"{value.name} is {got} bytes of {dtype}, expected {size}{f' of {wanted}' if wanted else ''}")
    return found
