"""``build_engines``: the graphs of a bundle -> engines for one target, in the bundle, noted in its manifest.

The plan is written first, then the manifest, each atomically: a plan that no manifest names is litter, is never
loaded, and goes with the next build. Trust is noted last before the manifest names the engine. One process at a time
builds for a target of a bundle: to another, the plans that it has written and not yet named would be litter.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from famexport.bundle import Bundle, engine_bytes, open_bundle, write_manifest
from famexport.contract import QUANTIZED
from famexport.engine.build_options import BuildOptions
from famexport.engine.builder import Progress, builder_config, check_plan, interruptible, progress_monitor
from famexport.engine.network import build_failure, check_types, mark_attention, network_types, parse_network
from famexport.engine.targets import (
    RTX,
    RTX_CAPABILITIES,
    TENSORRT,
    Target,
    find_target,
    precision_problems,
    versions_fit,
)
from famexport.engines import DeviceTuple, EngineEntry, build_key, read_entries
from famexport.errors import (
    BundleError,
    EngineError,
    FamExportError,
    IncompatibleError,
    MissingDependencyError,
    UsageError,
    raise_problems,
)
from famexport.interrupts import uninterrupted
from famexport.manifest import ENGINES
from famexport.publish import atomic_write, write_output
from famexport.runtime.tensorrt import this_device
from famexport.runtime.tensorrt_api import MODULES, host_facts, import_tensorrt, new_logger
from famexport.runtime.trust import is_trusted, trust

_DYNAMIC_PROFILE = (1, 1, 8)


@dataclass(frozen=True)
class Built:
    """What a build did: the engines that the target has now, and which of them were there already."""

    engines: list[EngineEntry]
    kept: list[str]


def build_engines(
    bundle: str | Path | Bundle,
    target: str,
    *,
    engine: str | None = None,
    options: BuildOptions | None = None,
    progress: Progress | None = None,
) -> Built:
    """Build an engine of every graph of a bundle for one target.

    Args:
        target: a name of ``famexport.engine.targets.TARGETS``.
        engine: ``tensorrt`` (on the device itself) or ``tensorrt-rtx`` (ahead of time, without a GPU); by default the
            first that the target has and this machine can build with.
    Raises:
        UsageError: no such target, engine or option.
        IncompatibleError: this machine, TensorRT or target cannot have it; nothing changed.
        FamExportError: another process builds engines of the bundle for this target now; nothing changed.
        EngineError: the engine is not what was asked (types, fused attention); nothing changed.
    """
    goal = find_target(target)
    kind = _choose(goal, engine)
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    if opened.manifest.precision in QUANTIZED:
        raise IncompatibleError(
            f"an {opened.manifest.precision} bundle has graphs for ONNX Runtime on CPUs, no engine can be built of it; "
            "export with --precision fp16 or bf16"
        )
    wanted = options or BuildOptions()
    if opened.contract.batch == "dynamic" and wanted.batch_profile is None:
        wanted = replace(wanted, batch_profile=_DYNAMIC_PROFILE)
    raise_problems(UsageError, "cannot build", wanted.problems(kind, opened.contract.batch))
    raise_problems(IncompatibleError, "cannot build", precision_problems(goal, kind, opened.manifest.precision))
    trt = _import(kind, goal)
    device = _device(trt, goal, kind)
    _check_folder(opened, goal)
    entries: list[EngineEntry] = []
    kept: list[str] = []
    names = opened.contract.graph_names
    with _building(opened, goal) as has:
        try:
            with interruptible() as stopped:
                for done, name in enumerate(names):
                    if progress:
                        progress("engines", done, len(names))
                    key = _key(opened, name, kind, device, goal, wanted)
                    wants = goal.name, kind, name, key
                    old = next((e for e in has if (e.target, e.engine, e.graph, e.key) == wants), None)
                    if old and _is_whole(opened, old):
                        entries.append(old)
                        kept.append(name)
                        continue
                    entries.append(_build_one(trt, opened, name, key, goal, kind, device, wanted, progress, stopped))
        except BaseException:
            with uninterrupted():
                _remove_unnamed(opened, goal, has, [entry for entry in entries if entry.graph not in kept])
            raise
        _publish(opened, goal, kind, entries)
    if progress:
        progress("engines", len(names), len(names))
    return Built(entries, kept)


def _choose(target: Target, engine: str | None) -> str:
    if engine is not None and engine not in MODULES:
        raise UsageError(f"no engine {engine!r:.80}; expected {' or '.join(MODULES)}")
    if engine is None:
        there = [kind for kind in target.engines if find_spec(MODULES[kind][0])]
        return (there or list(target.engines))[0]
    if engine not in target.engines:
        raise IncompatibleError(
            f"{engine} has no engines for {target.name} (compute capability {target.compute_capability}, "
            f"{target.arch}); it has {', '.join(RTX_CAPABILITIES)} on x86_64; "
            "build with --engine tensorrt on the device itself"
        )
    return engine


def _import(kind: str, target: Target) -> Any:
    """The TensorRT to build with. What could not build for the target anyhow is not asked to install one."""
    arch = host_facts()[1]
    if kind == TENSORRT and arch != target.arch:
        raise IncompatibleError(
            f"this machine has a processor of {arch}, {target.name} is {target.gpu} ({target.compute_capability}, "
            f"{target.arch}); TensorRT builds on the device itself: run this there"
        )
    try:
        return import_tensorrt(kind)
    except MissingDependencyError as exc:
        if not target.name.startswith("jetson-"):
            raise
        raise IncompatibleError(
            f"{target.name} needs JetPack's own TensorRT, and the module tensorrt is not seen here; sudo apt-get "
            "install python3-libnvinfer, and make the environment with --system-site-packages (docs/jetson.md)"
        ) from exc


def _device(trt: Any, target: Target, kind: str) -> DeviceTuple:
    """What the engine will be tied to. Full TensorRT builds for the GPU at hand, so that must be the target's."""
    version = str(trt.__version__)
    if kind == RTX:
        return DeviceTuple(version, None, target.compute_capability, None, "linux", target.arch)
    if not versions_fit(version, target.tensorrt):
        raise IncompatibleError(
            f"TensorRT here is {version}, {target.name} has {target.tensorrt[0]} to before {target.tensorrt[1]}; "
            "build on the device itself"
        )
    from famexport.runtime.cuda import Cuda

    cuda = Cuda()
    try:
        here = this_device(trt, cuda.facts())
    finally:
        cuda.close()
    if here.compute_capability != target.compute_capability:
        raise IncompatibleError(
            f"this machine has {here.gpu} ({here.compute_capability}, {here.arch}), {target.name} is {target.gpu} "
            f"({target.compute_capability}, {target.arch}); TensorRT builds on the device itself: run this there"
        )
    return here


def _key(bundle: Bundle, name: str, kind: str, device: DeviceTuple, target: Target, options: BuildOptions) -> str:
    files = bundle.manifest.files
    graph, weights = bundle.manifest.graphs[name].file, bundle.manifest.weights
    return build_key(
        graph=files[graph].sha256,
        weights=files[weights].sha256 if weights else None,
        engine=kind,
        device=asdict(device),
        target=target.name,
        options=options.key_parts(),
    )


def _is_whole(bundle: Bundle, entry: EngineEntry) -> bool:
    """Whether a plan is there as it was built, and may be loaded here."""
    try:
        engine_bytes(bundle, entry)
    except FamExportError:
        return False
    return is_trusted(entry.sha256)


def _build_one(
    trt: Any,
    bundle: Bundle,
    name: str,
    key: str,
    target: Target,
    kind: str,
    device: DeviceTuple,
    options: BuildOptions,
    progress: Progress | None,
    stopped: Callable[[], bool],
) -> EngineEntry:
    manifest, started = bundle.manifest, time.perf_counter()
    what = f"{name} for {target.name}"
    logger = new_logger(trt)
    builder = trt.Builder(logger)
    if builder is None:
        raise IncompatibleError(f"{trt.__name__} gives no builder here: {' '.join(logger.errors)[:300]}")
    if manifest.weights:
        bundle.file(manifest.weights)  # checked; the parser finds it beside the graph
    network = parse_network(trt, builder, logger, bundle.file(manifest.graphs[name].file))
    attention = _attention(trt, network, bundle, what, options)
    layers, io = network_types(network)
    own_model = manifest.config is not None
    check_types(layers, io, bundle.contract.graph(name), manifest.precision, own_model=own_model)
    config = builder_config(trt, builder, bundle.contract.graph(name), kind, target, options)
    if hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = progress_monitor(trt, name, progress, stopped)
    plan = builder.build_serialized_network(network, config)
    if stopped():
        raise KeyboardInterrupt
    if plan is None:
        raise build_failure(what, logger.errors)
    data = bytes(plan)
    checked = "network"
    if kind == TENSORRT:  # it was built for the GPU at hand: the plan itself can be asked
        check_plan(trt, logger, data, bundle.contract.graph(name), what)
        checked = "engine"
        if options.timing_cache:
            write_output(options.timing_cache, bytes(config.get_timing_cache().serialize()))
    digest = hashlib.sha256(data).hexdigest()
    file = f"{name}-{key}.plan"
    folder = bundle.path / ENGINES / target.name
    atomic_write(folder / file, data)
    trust(digest)
    return EngineEntry(
        file=file,
        graph=name,
        target=target.name,
        engine=kind,
        bytes=len(data),
        sha256=digest,
        key=key,
        options={k: list(v) if isinstance(v, tuple) else v for k, v in options.key_parts().items()},
        device=device,
        layers=layers,
        io=dict(Counter(io.values())),
        checked=checked,
        attention=attention,
        build_seconds=round(time.perf_counter() - started, 2),
    )


def _attention(trt: Any, network: Any, bundle: Bundle, what: str, options: BuildOptions) -> str | None:
    """Mark the network's attention; ``fused`` is refused before the build where it cannot be."""
    count = mark_attention(trt, network, options.attention == "decomposable")
    if options.attention != "fused":
        return "decomposable" if count else None
    if not count:
        if "block_step" not in what:  # commit_block may have none
            return None
        raise EngineError(
            f"{what}: the graph has no Attention nodes (opset {bundle.manifest.opset}), so none can be fused; "
            "export with --opset 23"
        )
    if problems := _fused_problems(bundle):
        raise EngineError(
            f"{what}: TensorRT has no fused attention for this: {'; '.join(problems)}; "
            "build with --attention decomposable"
        )
    return "fused"


def _fused_problems(bundle: Bundle) -> list[str]:
    """Why TensorRT can have no fused attention for a bundle, by its documentation's table of shapes and dtypes."""
    head, problems = (bundle.manifest.config or {}).get("head_dim"), []
    if bundle.manifest.precision not in ("fp16", "bf16"):
        problems.append(f"precision is {bundle.manifest.precision}, expected fp16 or bf16")
    if isinstance(head, int) and (head % 8 or not 16 <= head <= 256):
        problems.append(f"the head size is {head}, expected 16 to 256 and a multiple of 8")
    return problems


def _check_folder(bundle: Bundle, target: Target) -> None:
    """Plans are written into the bundle and nowhere else (R3): a link in their path would lead out of it."""
    for folder in (bundle.path / ENGINES, bundle.path / ENGINES / target.name):
        if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
            raise BundleError(f"{folder} is a link or no directory, expected a directory of the bundle; remove it")


def _remove_unnamed(bundle: Bundle, target: Target, has: list[EngineEntry], entries: list[EngineEntry]) -> None:
    """Remove plans that no manifest came to name; ``has`` is what it names."""
    folder = bundle.path / ENGINES / target.name
    named = {entry.name for entry in has}
    for entry in entries:
        if entry.name not in named:
            (folder / entry.file).unlink(missing_ok=True)


def _publish(bundle: Bundle, target: Target, kind: str, entries: list[EngineEntry]) -> None:
    """Name the engines in the manifest, and remove those that they replace."""
    folder = bundle.path / ENGINES
    with _locked(bundle.path, ENGINES):
        now = open_bundle(bundle.path, verify=False)
        if now.manifest.files != bundle.manifest.files:
            raise BundleError(f"{bundle.path} was exported anew while engines were built for it; build again")
        old: Mapping[str, Any] = now.manifest.engines
        gone = [e.name for e in read_entries(old) if (e.target, e.engine) == (target.name, kind)]
        engines = {name: data for name, data in old.items() if name not in gone}
        engines.update({entry.name: entry.to_dict() for entry in entries})
        if engines != dict(old):
            write_manifest(bundle.path, replace(now.manifest, engines=engines))
        for path in (folder / target.name).glob("*.plan"):
            if f"{target.name}/{path.name}" not in engines:
                path.unlink(missing_ok=True)


@contextmanager
def _building(bundle: Bundle, target: Target) -> Iterator[list[EngineEntry]]:
    """Be the one that builds for a target of the bundle; yields the engines that the manifest names by now."""
    folder = bundle.path / ENGINES / target.name
    try:
        lock = _lock(bundle.path, ENGINES, target.name, wait=False)
    except BlockingIOError as exc:
        raise FamExportError(
            f"another process builds engines for {target.name} in {bundle.path}; wait until it has ended"
        ) from exc
    try:
        yield read_entries(open_bundle(bundle.path, verify=False).manifest.engines)
    finally:
        for empty in (folder, folder.parent):
            with suppress(OSError):  # not empty
                empty.rmdir()
        os.close(lock)


@contextmanager
def _locked(root: Path, *names: str) -> Iterator[None]:
    """One writer at a time of the folder of those names under ``root``, which is made."""
    lock = _lock(root, *names)
    try:
        yield
    finally:
        os.close(lock)


def _lock(root: Path, *names: str, wait: bool = True) -> int:
    """A descriptor that holds the lock on a folder, which is made; the lock goes with the process.

    Raises:
        BlockingIOError: another holds it, without ``wait``.
    """
    folder = root.joinpath(*names)
    while True:
        descriptor, taken = -1, False
        try:
            for depth in range(len(names)):
                root.joinpath(*names[: depth + 1]).mkdir(exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            taken = os.path.samestat(os.fstat(descriptor), os.lstat(folder))
            if taken:
                return descriptor
        except FileNotFoundError:  # a build that ended without engines removes what is empty
            if not root.is_dir():
                raise
        finally:
            if not taken and descriptor >= 0:
                os.close(descriptor)
