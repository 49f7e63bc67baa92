"""What ``famexport verify`` does: files, contract, and the golden rollout on this device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from famexport.bundle import Bundle, open_bundle
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
        BundleError: damaged, without a golden rollout, or without what it takes to replay one.
        ParityError: this device computes something else than the recording says.
        IncompatibleError, MissingDependencyError: the backend cannot run it here.
    """
    bundle = open_bundle(path, progress=progress)
    manifest = bundle.manifest
    if manifest.golden is None:
        raise BundleError(f"{path} has no golden rollout; export it again with this version of famexport")
    batch = _recorded_rows(bundle) if bundle.contract.batch == "dynamic" else None
    tolerance = stated_number(bundle, "parity", "tolerance")
    with load(bundle, backend) as session:
        loop = session.backend.open(batch)
        recorded = bundle.read(manifest.golden)
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


def stated_number(bundle: Bundle, part: str, key: str, missing: float | None = None) -> float:
    """A number of at least 0 out of ``parity`` or ``cost``, which are not looked into where a manifest is read.

    Args:
        missing: what to return where there is none; None where there must be one.
    Raises:
        BundleError: it is something else.
    """
    value = getattr(bundle.manifest, part).get(key, missing)
    if type(value) not in (int, float) or not value >= 0:
        raise BundleError(
            f"{bundle.path}: {part}.{key} of its manifest is {value!r:.80}, expected a number of at least 0; "
            "export it again"
        )
    return float(value)


def _recorded_rows(bundle: Bundle) -> int:
    """The batch that a golden rollout was recorded with: of float32 logits, so its file has room for only so many."""
    rows, size = stated_number(bundle, "parity", "batch"), bundle.manifest.files[str(bundle.manifest.golden)].bytes
    if rows < 1 or not rows.is_integer() or rows * bundle.contract.vocab_size * 4 > size:
        raise BundleError(
            f"{bundle.path}: parity.batch of its manifest is {rows:g}, expected the rows of its golden rollout of "
            f"{size} bytes; export it again"
        )
    return int(rows)


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
