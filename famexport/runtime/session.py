"""``load``: a checked bundle on a backend, from which streams are opened."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from famexport.bundle import Bundle, open_bundle
from famexport.config import FamConfig
from famexport.contract import QUANTIZED, StepContract
from famexport.errors import BundleError, FamExportError, IncompatibleError, UntrustedError, UsageError
from famexport.runtime.backend import Backend, Loop
from famexport.runtime.open_block import AppendStream, PaddedStream
from famexport.runtime.pool import Pool
from famexport.runtime.snapshot import Origin, engine_name
from famexport.runtime.stream import Stream

BACKENDS = ("tensorrt", "tensorrt-rtx", "ort-cuda", "ort-tensorrt", "ort-cpu", "torch", "torch-compile")
# In the order in which "auto" tries them. ort-tensorrt builds engines at every load, torch is the reference.
AUTO = ("tensorrt", "tensorrt-rtx", "ort-cuda", "ort-cpu")


class Session:
    """A loaded bundle: weights once, any number of streams over them."""

    def __init__(self, bundle: Bundle, backend: Backend, reason: str | None = None) -> None:
        self.bundle, self.backend, self._reason = bundle, backend, reason
        self.contract: StepContract = backend.contract
        self._closed = False

    def info(self) -> dict[str, Any]:
        """Backend, why it was chosen, provider, device, precision, bytes of the state (of all rows where the batch is
        fixed, or else of one), and the bundle's id.

        ``kernels``: with the backend ort-cuda, where the bundle has graphs made for it, "fused" or why not; else None.
        """
        return {
            "backend": self.backend.name,
            "reason": self._reason or "asked for",
            "provider": self.backend.provider,
            "device": self.backend.device,
            "precision": self.backend.precision,
            "state_bytes": self.contract.state_bytes(),
            "bundle_id": self.bundle.id,
            "kernels": self.backend.kernels,
        }

    def stream(self, batch: int | None = None, *, on_nonfinite: str = "raise") -> Stream:
        """A fresh stream.

        Args:
            batch: rows; given only where the bundle was exported with a dynamic batch.
            on_nonfinite: ``raise``, ``skip`` or ``reset``: what happens where NaN or infinity is computed.
        """
        loop = self._open(batch)
        kind = AppendStream if self.contract.chunks else PaddedStream
        return kind(loop, self._origin(loop.batch), on_nonfinite)

    def pool(self, capacity: int | None = None, *, max_queued: int | None = None, on_nonfinite: str = "raise") -> Pool:
        """Streams that share batched calls, each starting, pausing and ending on its own.

        Args:
            capacity: how many at once; the bundle's batch, or any number where that is dynamic.
            max_queued: positions that a stream may have waiting; four blocks unless given.
            on_nonfinite: ``raise``, ``skip`` or ``reset``, for the one stream concerned.
        """
        loop = self._open(capacity)
        return Pool(loop, self._origin(loop.batch), max_queued, on_nonfinite)

    def _open(self, batch: int | None) -> Loop:
        if self._closed:
            raise UsageError("the session is closed; load the bundle again with famexport.load()")
        return self.backend.open(batch)

    def _origin(self, batch: int) -> Origin:
        """Whose snapshots a stream of ``batch`` rows takes."""
        manifest = self.bundle.manifest
        weights = manifest.files[manifest.weights].sha256 if manifest.weights else None
        model = {"config": manifest.config, "precision": manifest.precision, "weights": weights}
        graphs = {name: manifest.files[name].sha256 for name in sorted(manifest.graph_files())}
        if manifest.config is None:  # a module of one's own: its graph is the model
            model["graphs"] = graphs
        digest = hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()
        fused = " fused" if self.backend.kernels == "fused" else ""  # it rounds differently
        runs = {**graphs, **self.backend.engines}
        return Origin(digest, engine_name(self.backend.name + fused, runs, batch), self.contract)

    def close(self) -> None:
        """Open no more streams; those that are open go on. Closing twice does nothing."""
        if not self._closed:
            self._closed = True
            self.backend.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def load(
    bundle: str | Path | Bundle,
    backend: str = "auto",
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Session:
    """Check a bundle, then load it on a backend.

    Args:
        bundle: its directory, or one already opened.
        backend: ``auto``, or one of ``BACKENDS``. ``auto`` takes the first of ``AUTO`` that works here;
            ``Session.info`` says why it was not one before. The torch ones run on the CPU unless an option is given
            behind a colon: ``torch:cuda``, ``torch-compile:cuda``, ``torch-compile:cuda,max-autotune``.
        threads: threads for one operator; None leaves the backend's own choice.
        progress: called with (bytes hashed, bytes in all).
    Raises:
        UsageError: no such path, no such backend.
        BundleError: damaged, or not a bundle; nothing was parsed or loaded.
        MissingDependencyError, IncompatibleError: the backend cannot run it here.
        UntrustedError: its engines were not built here, or were changed since.
    """
    base, colon, _ = backend.partition(":")
    if base not in ("auto", *BACKENDS) or (colon and not base.startswith("torch")):
        raise UsageError(f"no backend {backend!r}; expected auto, {', '.join(BACKENDS)}")
    for attempts_left in (2, 1, 0):
        opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle, progress=progress)
        last = opened is bundle or not attempts_left
        try:
            session = _load(opened, backend, threads)
        except FamExportError:
            if last or opened.is_unchanged():
                raise
            continue  # an exporter published anew while it was loaded
        if opened.is_unchanged():
            return session
        session.close()
        if last:
            break
    raise BundleError(f"{opened.path} was replaced while it was loaded; load it again")


def _load(opened: Bundle, backend: str, threads: int | None) -> Session:
    if backend != "auto":
        return Session(opened, open_backend(opened, backend, threads))
    reasons: list[str] = []
    for name in AUTO:
        try:
            found = open_backend(opened, name, threads)
        except (IncompatibleError, UntrustedError) as exc:
            if name == AUTO[-1]:
                raise
            reasons.append(f"not {name}: {exc}")
            continue
        return Session(
            opened, found, "the first that works here; " + "; ".join(reasons) if reasons else "the best there is"
        )
    raise AssertionError("unreachable")


def precision_problem(precision: str, backend: str) -> str | None:
    """Why ``backend`` runs no bundle of that precision; None where it does."""
    if precision not in QUANTIZED or backend == "ort-cpu":
        return None
    return (
        f"an {precision} bundle has graphs for ONNX Runtime on CPUs, which {backend} does not run; "
        "use ort-cpu, or export with --precision fp32, fp16 or bf16"
    )


def open_backend(bundle: Bundle, name: str, threads: int | None = None) -> Backend:
    """The backend ``name`` over a checked bundle."""
    manifest = bundle.manifest
    weights = bundle.file(manifest.weights) if manifest.weights else None
    if problem := precision_problem(manifest.precision, name):
        raise IncompatibleError(problem)
    if name == "ort-cpu":
        from famexport.runtime.ort import OrtCpu

        graphs = {
            graph: bundle.file(files.variants.get("ort-cpu", files.file)) for graph, files in manifest.graphs.items()
        }
        return OrtCpu(bundle.contract, manifest.precision, graphs, weights, threads)
    if name in ("ort-cuda", "ort-tensorrt"):
        return _ort_on_gpu(bundle, name, weights, threads)
    if name in ("tensorrt", "tensorrt-rtx"):
        from famexport.runtime.tensorrt import Tensorrt

        return Tensorrt(bundle, name)
    from famexport.runtime.torch_reference import Torch, parse_name

    base, _ = parse_name(name)
    if manifest.config is None or weights is None:
        raise IncompatibleError(
            f"the backend {base} runs famexport's own model, and this bundle holds another; use ort-cpu"
        )
    config = FamConfig.from_dict(manifest.config)
    return Torch(bundle.contract, manifest.precision, config, weights, threads, name)


def _ort_on_gpu(bundle: Bundle, name: str, weights: Path | None, threads: int | None) -> Backend:
    from famexport.runtime.ort_cuda import OrtCuda, OrtTensorrt
    from famexport.runtime.ort_ring import OrtCudaRing, ring_files

    manifest = bundle.manifest
    args = bundle.contract, manifest.precision
    files = {graph: bundle.file(f.file) for graph, f in manifest.graphs.items()}
    if name == "ort-tensorrt":
        return OrtTensorrt(*args, files, weights, threads)
    reason, kernels, ring = None, None, ring_files(bundle)
    if ring and weights is not None:
        library, kernels = _fused_kernels(bundle)
        if library is not None:
            try:
                return OrtCudaRing(*args, ring_files(bundle, fused=True), weights, threads, library=library)
            except IncompatibleError as exc:
                kernels = f"they do not load here: {exc}"
        try:
            unfused = OrtCudaRing(*args, ring, weights, threads)
            unfused.kernels = kernels
            return unfused
        except IncompatibleError as exc:  # the portable graphs have operators that every version has
            reason = f"the graphs made for CUDA do not load here: {exc}"
    backend = OrtCuda(*args, files, weights, threads)
    backend.uncaptured_reason, backend.kernels = reason, kernels
    return backend


def _fused_kernels(bundle: Bundle) -> tuple[Path | None, str | None]:
    """The library that a bundle's fused graphs need, or why they are not run."""
    from famexport.runtime.ort_ring import ring_files

    if not ring_files(bundle, fused=True):
        return None, "the bundle has no graphs for them; one made before there were kernels must be exported again"
    from famexport.kernels.build import COMMAND
    from famexport.kernels.library import find

    try:
        library = find()
    except IncompatibleError as exc:
        return None, str(exc)
    return library, None if library else f"not built: {COMMAND}"
