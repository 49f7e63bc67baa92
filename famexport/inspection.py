"""What a path is: a checkpoint, a bundle, a graph or a weight file; what it needs, and whether it can run here."""

from __future__ import annotations

import os
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from famexport.bundle import MAX_GRAPH_BYTES, engine_bytes, open_bundle
from famexport.contract import METADATA_KEY
from famexport.engines import read_entries
from famexport.errors import BundleError, InvalidInputError, MissingDependencyError, UsageError
from famexport.manifest import ENGINES, MANIFEST
from famexport.onnx_wire import graph_facts
from famexport.runtime.session import precision_problem
from famexport.runtime.trust import is_trusted
from famexport.tensorfile import read_header


def inspect(path: str | Path) -> dict[str, Any]:
    """Facts about ``path``, as plain values; ``kind`` says what it is.

    Raises:
        UsageError: no such path.
        InvalidInputError: damaged, or nothing famexport knows.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"no such path: {path}")
    if path.is_dir():
        if (path / MANIFEST).exists():
            return _bundle(path)
        if (path / "config.json").exists():
            return _checkpoint(path)
        raise InvalidInputError(f"{path} holds neither {MANIFEST} (a bundle) nor config.json (a checkpoint)")
    if not path.is_file():  # opening a FIFO would wait for ever
        raise InvalidInputError(f"{path} is no regular file; give a file, or the directory of a bundle or checkpoint")
    if path.suffix == ".onnx":
        return _graph(path)
    if path.suffix == ".safetensors":
        return _weights(path)
    if path.suffix == ".plan":
        return _engine(path)
    raise InvalidInputError(f"{path} is not a bundle, a checkpoint, an .onnx, a .safetensors or a .plan file")


def _bundle(path: Path) -> dict[str, Any]:
    bundle = open_bundle(path)
    m, contract = bundle.manifest, bundle.contract
    runnable = {"ort-cpu": find_spec("onnxruntime") is not None}
    runnable["torch"] = m.config is not None and find_spec("torch") is not None
    parity = m.parity  # not looked into by whoever reads a manifest: anything may be in it
    cut = _object(parity.get("cut"))  # where not all layers were compared over many blocks
    append = _object(parity.get("append")) or _object(cut.get("append"))
    return {
        "kind": "bundle",
        "id": bundle.id,
        "precision": m.precision,
        "opset": m.opset,
        "ir_version": m.ir_version,
        "block_size": contract.block_size,
        "memory_segments": contract.memory_segments,
        "fam_length": contract.fam_length,
        "fam_trained": m.fam_trained,
        "vocab_size": contract.vocab_size,
        "batch": contract.batch,
        "logits": contract.logits,
        "inputs": [str(spec) for spec in contract.inputs],
        "states": len(contract.states),
        "chunks": list(contract.chunks),
        "state_bytes": contract.state_bytes(),
        "graphs": {name: [g.file, *g.variants.values()] for name, g in m.graphs.items()},
        "files": {name: entry.bytes for name, entry in m.files.items()},
        "engines": {
            e.name: f"{e.engine} {e.device.tensorrt} for compute capability {e.device.compute_capability}, "
            f"{e.bytes} bytes, {'built here' if is_trusted(e.sha256) else 'not built here'}"
            for e in read_entries(m.engines)
        },
        "parity": {
            "blocks": parity.get("blocks"),
            "logits_error": _largest(parity.get("logits_error")),
            "state_error": _largest(parity.get("state_error")),
            "append_error": _largest(append.get("logits_error")) if contract.chunks else None,
            "cut_layers": cut.get("layers"),
            "cut_blocks": cut.get("blocks"),
            "cut_error": _largest(cut.get("logits_error"), cut.get("state_error")),
            "tolerance": parity.get("tolerance"),
            "argmax_agreement": parity.get("argmax_agreement"),
            "fam_growth": parity.get("fam_growth"),
        },
        "versions": m.versions,
        "runs_here": [name for name, here in runnable.items() if here and not precision_problem(m.precision, name)],
    }


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _largest(*curves: Any) -> float | None:
    """The largest value of curves of errors; None where that is not known."""
    try:
        return max(float(value) for curve in curves for value in curve or ())
    except (TypeError, ValueError):  # also where there is no value
        return None


def layer_counts(counts: Any) -> str:
    """How many layers of one kind have which dtype, as an engine's entry says it; "-" where it says something else."""
    return ", ".join(f"{n} {dtype}" for dtype, n in _object(counts).items()) or "-"


def _checkpoint(path: Path) -> dict[str, Any]:
    if find_spec("torch") is None:
        raise MissingDependencyError("torch", "export", f"reading the checkpoint {path}")
    from famexport.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    return {
        "kind": "checkpoint",
        "parameters": config.parameters,
        "dtype": checkpoint.dtype,
        "bytes": sum(entry.nbytes for entry in checkpoint.tensors.values()),
        "fam_trained": checkpoint.fam_trained,
        "tokenizer": checkpoint.tokenizer is not None,
        "flops_per_block": config.block_flops(),
        "config": config.to_dict(),
        "next": f"famexport export {path} -o BUNDLE",
    }


def _graph(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_GRAPH_BYTES:
        raise InvalidInputError(f"{path} has {path.stat().st_size} bytes; an ONNX file has at most {MAX_GRAPH_BYTES}")
    try:
        facts = graph_facts(path.read_bytes())
    except BundleError as exc:
        raise InvalidInputError(f"{path}: {exc}") from exc
    return {
        "kind": "graph",
        "opset": facts.opset,
        "ir_version": facts.ir_version,
        "operators": sorted(f"{domain}.{kind}" if domain else kind for domain, kind in facts.operators),
        "external_files": sorted({e.location for e in facts.external}),
        "step_contract": METADATA_KEY in facts.metadata,
        "metadata": {key: value for key, value in facts.metadata.items() if key != METADATA_KEY},
    }


def _engine(path: Path) -> dict[str, Any]:
    """An engine by what its bundle's manifest says of it: a plan says nothing that could be read without running it."""
    place = Path(os.path.abspath(path)).parent
    if place.parent.name != ENGINES:
        raise InvalidInputError(
            f"{path} is in no bundle; expected BUNDLE/{ENGINES}/TARGET/{path.name}, where it was built"
        )
    folder = place.parent.parent
    bundle = open_bundle(folder, verify=False)
    name = f"{place.name}/{path.name}"
    entry = next((e for e in read_entries(bundle.manifest.engines) if e.name == name), None)
    if entry is None:
        raise InvalidInputError(f"{path} is no engine that the manifest of {folder} names; build it again")
    engine_bytes(bundle, entry)
    return {
        "kind": "engine",
        "bundle": str(folder),
        "built_here": is_trusted(entry.sha256),
        "target": entry.target,
        "graph": entry.graph,
        "engine": entry.engine,
        "device": asdict(entry.device),
        "attention": entry.attention,
        "types_read_from": entry.checked,
        "inputs_and_outputs": entry.io,
        "layers": {kind: layer_counts(counts) for kind, counts in entry.layers.items()},
        "options": {key: value for key, value in entry.options.items() if value not in (None, False, "none")},
        "bytes": entry.bytes,
    }


def _weights(path: Path) -> dict[str, Any]:
    entries = read_header(path)
    return {
        "kind": "weights",
        "tensors": len(entries),
        "bytes": sum(entry.nbytes for entry in entries.values()),
        "dtypes": sorted({entry.dtype for entry in entries.values()}),
    }
