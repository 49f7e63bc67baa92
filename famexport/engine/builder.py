"""One code path over the builders of TensorRT 10, 11 and TensorRT-RTX: settings, progress, a look at the plan."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from famexport.contract import GraphIO
from famexport.engine.build_options import HARDWARE, BuildOptions
from famexport.engine.targets import RTX, TENSORRT, Target
from famexport.errors import EngineError, IncompatibleError
from famexport.runtime.tensorrt import tensor_problems

Progress = Callable[[str, int, int], None]  # stage, done, in all


def builder_config(trt: Any, builder: Any, io: GraphIO, kind: str, target: Target, options: BuildOptions) -> Any:
    config = builder.create_builder_config()
    if kind == RTX:
        capability = getattr(trt.ComputeCapability, "SM" + target.compute_capability.replace(".", ""))
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(capability, 0):
            raise IncompatibleError(f"{trt.__name__} {trt.__version__} refuses compute capability {capability.name}")
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    if options.hardware_compatible != "none":
        config.hardware_compatibility_level = getattr(
            trt.HardwareCompatibilityLevel, HARDWARE[options.hardware_compatible]
        )
    flags = {
        "VERSION_COMPATIBLE": options.version_compatible,
        "STRIP_PLAN": options.strip,
        "REFIT": options.refit,
        # The lean runtime that such a plan carries is host code, and we never allow host code
        "EXCLUDE_LEAN_RUNTIME": options.version_compatible,
    }
    for flag, on in flags.items():
        if on:
            config.set_flag(getattr(trt.BuilderFlag, flag))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.timing_cache and kind == TENSORRT:
        before = options.timing_cache.read_bytes() if options.timing_cache.exists() else b""
        config.set_timing_cache(config.create_timing_cache(before), False)
    if options.batch_profile:
        profile = builder.create_optimization_profile()
        for spec in io.taken:
            profile.set_shape(spec.name, *(spec.sized(rows) for rows in options.batch_profile))
        config.add_optimization_profile(profile)
    return config


def check_plan(trt: Any, logger: Any, data: bytes, io: GraphIO, what: str) -> None:
    """Ask a plan that was just built here for the types of its inputs and outputs."""
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = False
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise IncompatibleError(f"{what}: the engine just built does not load: {' '.join(logger.errors)[:300]}")
    if problems := tensor_problems(engine, io):
        raise EngineError(
            f"{what}: the engine's inputs and outputs differ from the contract: {'; '.join(problems[:6])}"
        )


def progress_monitor(trt: Any, name: str, progress: Progress | None, stopped: Callable[[], bool]) -> Any:
    """Reports the outermost phase's steps; a build ends early after Ctrl-C."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outer: tuple[str, int] | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if self.outer is None and steps > 0:
                self.outer = phase, steps

        def step_complete(self, phase: str, step: int) -> bool:
            if progress and self.outer and phase == self.outer[0]:
                progress(name, min(step + 1, self.outer[1]), self.outer[1])
            return not stopped()

        def phase_finish(self, phase: str) -> None:
            if self.outer and phase == self.outer[0]:
                self.outer = None

    return Monitor()


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """While the builder is in C++ no exception can end it: Ctrl-C is remembered, and the monitor stops the build."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)
    if seen:
        raise KeyboardInterrupt
