"""What an engine builder is told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from famexport.engine.targets import RTX

ATTENTION = ("decomposable", "fused")
HARDWARE = {
    "none": "NONE",
    "ampere-plus": "AMPERE_PLUS",
    "same-compute-capability": "SAME_COMPUTE_CAPABILITY",
}


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What the builder is told; all of it goes into an engine's key, but for the timing cache.

    Args:
        optimization_level: 0 to 5; None leaves TensorRT's own.
        workspace_mb: most scratch memory of a layer, in MiB; None leaves all of the device.
        timing_cache: a file that keeps measured timings from build to build (full TensorRT only).
        version_compatible: runs on later TensorRT versions of the same major.
        hardware_compatible: ``none``, ``ampere-plus`` or ``same-compute-capability`` (full TensorRT only).
        strip: leave the weights out; ``refit`` puts them in.
        refit: weights can be replaced later.
        batch_profile: (min, opt, max) rows, for a bundle with a dynamic batch.
        attention: ``fused`` builds native attention only if there is a dedicated kernel; ``decomposable`` in any case.
    """

    optimization_level: int | None = None
    workspace_mb: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: str = "none"
    strip: bool = False
    refit: bool = False
    batch_profile: tuple[int, int, int] | None = None
    attention: str = "decomposable"

    def problems(self, engine: str, batch: int | str) -> list[str]:
        found = []
        if self.attention not in ATTENTION:
            found.append(f"attention must be {' or '.join(ATTENTION)}, got {self.attention!r:.80}")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            found.append(f"optimization_level must be 0 to 5, got {self.optimization_level}")
        if self.workspace_mb is not None and self.workspace_mb < 1:
            found.append(f"workspace_mb must be at least 1, got {self.workspace_mb}")
        if self.hardware_compatible not in HARDWARE:
            found.append(
                f"hardware_compatible must be one of {', '.join(HARDWARE)}, got {self.hardware_compatible!r:.80}"
            )
        if engine == RTX and (self.hardware_compatible != "none" or self.timing_cache or self.version_compatible):
            found.append("hardware and version compatibility and a timing cache are options of --engine tensorrt alone")
        profile = self.batch_profile
        if profile and batch != "dynamic":
            found.append(
                f"a batch profile is for a dynamic batch, this bundle has {batch}; export with --batch dynamic"
            )
        if profile and not 1 <= profile[0] <= profile[1] <= profile[2]:
            found.append(f"a batch profile is min,opt,max with 1 <= min <= opt <= max, got {profile}")
        return found

    def key_parts(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "timing_cache"}
