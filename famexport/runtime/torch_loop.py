"""The loop of the torch backends, on the CPU or on a GPU. The module torch comes with the backend."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from famexport.contract import OPEN_LENGTH, StepContract, TensorSpec
from famexport.errors import FamExportError, first_line
from famexport.runtime.backend import STORAGE, Loop
from famexport.runtime.host import is_finite, nonfinite_rows


class TorchCalls(Protocol):
    """What a loop needs of its backend.

    ``calls``: ``step``, ``append`` and ``commit``, each taking inputs and the state and giving (logits or None, new
    state).
    """

    contract: StepContract
    torch: Any
    calls: dict[str, Any]
    compiled: bool
    device: str


class TorchLoop(Loop):
    """State in static tensors on the backend's device; ``commit`` copies into them what the last call computed. On a
    GPU inputs and logits pass through pinned memory, as with the other backends there.

    What a captured graph computes lies in memory that its next replay overwrites, so nothing of a call is kept past the
    beginning of the next one but what was committed.
    """

    def __init__(self, backend: TorchCalls, batch: int) -> None:
        super().__init__(backend.contract, batch)
        self._torch, self._calls, self._compiled = backend.torch, dict(backend.calls), backend.compiled
        self._on_gpu = backend.device == "cuda"
        self._device = self._torch.device(backend.device)
        self._specs = {spec.name: spec for spec in self.contract.all_states}
        self._state = {spec.name: self._zeros(spec.sized(batch), spec.dtype) for spec in self.contract.all_states}
        self._new: dict[str, Any] = {}
        self._buffers: dict[tuple[str, tuple[int, ...]], tuple[np.ndarray, Any, Any]] = {}  # host, the same, device
        self._given: dict[tuple[int, ...], Any] = {}  # pinned logits
        self._finite = self._torch.ones((), dtype=self._torch.bool, pin_memory=self._on_gpu)
        self._events: tuple[Any, Any] | None = None

    def _zeros(self, shape: Sequence[int], dtype: str) -> Any:
        made = self._torch.zeros(tuple(shape), dtype=getattr(self._torch, dtype), device=self._device)
        if self._compiled:  # or a captured graph would copy it to a place of its own, at each call
            self._torch._dynamo.mark_static_address(made, guard=False)
        return made

    def advance(self, fed: np.ndarray, out: np.ndarray, rows: Sequence[int] | None = None) -> None:
        self._call("step", (fed,), out)

    def append(self, fed: np.ndarray, length: np.ndarray, out: np.ndarray) -> None:
        self._call("append", (fed, length), out)

    def end_block(self) -> None:
        self._call("commit", (), None)

    def _call(self, graph: str, arrays: Sequence[np.ndarray], out: np.ndarray | None) -> None:
        with self._running(graph):
            if self._events:
                self._events[0].record()
            given = self._enqueue(graph, self._feed(arrays))
            if self._on_gpu:
                self._finite.copy_(self._norms_are_finite(), non_blocking=True)
                if self._events:
                    self._events[1].record()
                self._torch.cuda.current_stream().synchronize()
                if self._events:
                    self.device_ms = self._events[0].elapsed_time(self._events[1])
            if out is not None:
                self._torch.from_numpy(out).copy_(given)

    @contextmanager
    def _running(self, graph: str) -> Iterator[None]:
        # Compiled code is guarded by whether it was made in inference mode; without, it is what a user would have
        mode = self._torch.no_grad if self._compiled else self._torch.inference_mode
        self._keep({})
        try:
            with mode():
                yield
        except FamExportError:
            raise
        except Exception as exc:  # torch's own, and its compilers'
            said = first_line(exc)
            raise FamExportError(f"torch failed in {graph}: {said}") from exc

    def _feed(self, arrays: Sequence[np.ndarray]) -> list[Any]:
        fed = []
        for i, array in enumerate(arrays):
            key = str(i), array.shape
            if key not in self._buffers:
                dtype = self.contract.inputs[0].dtype if i == 0 else "int64"
                kind = getattr(self._torch, dtype)
                host = self._torch.zeros(array.shape, dtype=kind, pin_memory=self._on_gpu)
                device = self._zeros(array.shape, dtype) if self._on_gpu else host
                self._buffers[key] = self._storage(host), host, device
            view, host, device = self._buffers[key]
            np.copyto(view, array)
            if self._on_gpu:
                device.copy_(host, non_blocking=True)
            fed.append(device)
        return fed

    def _enqueue(self, graph: str, fed: Sequence[Any]) -> Any:
        """One call; the logits where the host will find them."""
        if self._compiled and self._on_gpu:
            self._torch.compiler.cudagraph_mark_step_begin()
        logits, new = self._calls[graph](*fed, self._state)
        self._keep(new)
        if logits is None or not self._on_gpu:
            return logits
        shape = tuple(logits.shape)
        if shape not in self._given:
            self._given[shape] = self._torch.empty(shape, dtype=logits.dtype, pin_memory=True)
        return self._given[shape].copy_(logits, non_blocking=True)

    def _keep(self, new: dict[str, Any]) -> None:
        self._new = new

    def commit(self, rows: Sequence[int] | None = None) -> None:
        with self._torch.no_grad():
            for names in self._by_dtype(self._new):
                if rows is None:
                    self._torch._foreach_copy_([self._state[n] for n in names], [self._new[n] for n in names])
                else:
                    for name in names:
                        self._state[name][list(rows)] = self._new[name][list(rows)]
        self._keep({})

    def _by_dtype(self, names: Iterable[str]) -> list[list[str]]:
        """What one kernel can do for all tensors of a group it does only where they have one dtype."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self._specs[name].dtype, []).append(name)
        return list(groups.values())

    def _floating(self) -> dict[str, Any]:
        return {name: tensor for name, tensor in self._new.items() if tensor.is_floating_point()}

    def _norms_are_finite(self) -> Any:
        """Of all that the last call computed, as a tensor: largest absolute values, a few kernels for all tensors."""
        new, torch = self._floating(), self._torch
        norms = [torch._foreach_norm([new[n] for n in names], float("inf")) for names in self._by_dtype(new)]
        each = [torch.stack(group).isfinite().all() for group in norms]
        return torch.stack(each).all() if each else torch.ones((), dtype=torch.bool, device=self._device)

    def bad_rows(self, logits: np.ndarray | None = None, lengths: np.ndarray | None = None) -> list[int]:
        state_good = bool(self._finite) if self._on_gpu else all(map(self._is_finite, self._floating().values()))
        if state_good and (logits is None or is_finite(logits)):
            return []
        bad = set()
        if not state_good:
            each = [~tensor.isfinite().flatten(1).all(1) for tensor in self._floating().values()]
            bad |= set(self._torch.stack(each).any(0).nonzero().flatten().tolist())
        if logits is not None:
            bad |= nonfinite_rows(logits, lengths)
        return sorted(bad)

    def _is_finite(self, tensor: Any) -> bool:
        return is_finite(self._storage(tensor))

    def _storage(self, tensor: Any) -> np.ndarray:
        """A tensor on the CPU as numpy sees it: bfloat16 as its bits."""
        if tensor.dtype == self._torch.bfloat16:
            bits: np.ndarray = tensor.view(self._torch.int16).numpy().view(np.uint16)
            return bits
        array: np.ndarray = tensor.numpy()
        return array

    def tensor(self, name: str, row: int | None = None) -> np.ndarray:
        taken = self._state[name] if row is None else self._state[name][row : row + 1]
        return self._storage(taken.detach().to("cpu", copy=True))

    def write(self, state: Mapping[str, np.ndarray], row: int | None = None) -> None:
        for name, array in state.items():
            target = self._state[name] if row is None else self._state[name][row : row + 1]
            target.copy_(self._loaded(array, self._specs[name]))

    def _loaded(self, array: np.ndarray, spec: TensorSpec) -> Any:
        copied = np.array(array, STORAGE[spec.dtype], order="C")  # torch warns of arrays that are read-only
        if spec.dtype == "bfloat16":
            return self._torch.from_numpy(copied.view(np.int16)).view(self._torch.bfloat16)
        return self._torch.from_numpy(copied)

    def truncate(self, rows: Iterable[int], length: int) -> None:
        index = list(rows)
        for spec in self.contract.open_states:
            if spec.name == OPEN_LENGTH:
                self._state[spec.name][index] = length
            else:
                self._state[spec.name][index, :, length:] = 0

    def zero(self, rows: Sequence[int] | None) -> None:
        for tensor in self._state.values():
            if rows is None:
                tensor.zero_()
            else:
                tensor[list(rows)] = 0

    def time_device(self) -> None:
        if self._on_gpu:
            self._events = self._torch.cuda.Event(enable_timing=True), self._torch.cuda.Event(enable_timing=True)

    def back_to_back(self, fed: np.ndarray, blocks: int) -> float | None:
        if not self._on_gpu:
            return None
        with self._running("step"):
            inputs = self._feed((fed,))
            self._torch.cuda.synchronize()
            start = perf_counter()
            for _ in range(blocks):
                self._enqueue("step", inputs)
                self.commit()
            self._torch.cuda.synchronize()
            return perf_counter() - start

    def close(self) -> None:
        self._keep({})
        self._calls, self._state, self._buffers, self._given = {}, {}, {}, {}
