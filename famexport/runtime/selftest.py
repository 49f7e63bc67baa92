"""What ``famexport verify`` does: files, contract, and the golden rollout on this device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from famexport.bundle import open_bundle
from famexport.errors import BundleError
from famexport.runtime.chunks import advance_by_chunks
from famexport.runtime.golden import replay
from famexport.runtime.process import device_facts, versions
from famexport.runtime.session import load

_APPENDED_BLOCKS = 2  # by append_step and commit_block; the second reads what the first left behind


def verify(
    path: str | Path, backend: str = "auto", *, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Check a bundle from its bytes to its behaviour on this device.

    Returns:
        what was checked and measured, as plain values.
    Raises:
        BundleError: damaged, or without a golden rollout.
        ParityError: this device computes something else than the recording says.
        IncompatibleError, MissingDependencyError: the backend cannot run it here.
    """
    bundle = open_bundle(path, progress=progress)
    manifest = bundle.manifest
    if manifest.golden is None:
        raise BundleError(f"{path} has no golden rollout; export it again with this version of famexport")
    batch = int(manifest.parity["batch"]) if bundle.contract.batch == "dynamic" else None
    with load(bundle, backend) as session:
        loop = session.backend.open(batch)
        recorded, tolerance = bundle.read(manifest.golden), float(manifest.parity["tolerance"])
        result = replay(recorded, loop, tolerance)
        more = {}
        if bundle.contract.chunks:
            by_chunks = replay(
                recorded, loop, tolerance, advance=partial(advance_by_chunks, loop), blocks=_APPENDED_BLOCKS
            )
            more = {"append_blocks": by_chunks.blocks, "append_error": max(by_chunks.logits_error)}
        loop.close()
        info = session.info()
    return {
        "bundle": str(path),
        **info,
        "files": len(manifest.files),
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "golden_blocks": result.blocks,
        "logits_error": max(result.logits_error),
        "state_error": result.state_error,
        "tolerance": result.tolerance,
        **more,
    }


def report_line(facts: Mapping[str, Any]) -> str:
    """The row of docs/verified.md that a ``verify`` has earned, in its columns; nothing in it is typed by hand."""
    machine, found = device_facts(), versions()
    gpu = "-"
    if facts["device"] == "cuda":
        from famexport.runtime.cuda import Cuda

        cuda = Cuda()
        try:
            said = cuda.facts()
        finally:
            cuda.close()
        gpu = f"{said['name']} ({'.'.join(map(str, said['compute_capability']))}), CUDA {said['runtime']}"
    fused = ", fused kernels" if facts.get("kernels") == "fused" else ""
    packages = [f"{name} {found[name]}" for name in ("famexport", "onnxruntime", "onnxruntime-gpu") if name in found]
    cells = (
        date.today().isoformat(),
        f"{machine['processor']}, {machine['system']}, Python {machine['python']}",
        gpu,
        f"{facts['backend']} ({facts['provider']}{fused})",
        ", ".join(packages),
        facts["precision"],
        f"{facts['golden_blocks']} blocks executed, logits {facts['logits_error']:.2g}, "
        f"state {facts['state_error']:.2g}",
    )
    return "| " + " | ".join(cells) + " |"
