"""``export_bundle``: checkpoint or module -> graph -> weight file -> parity -> a published bundle."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

from famexport.bundle import Bundle, describe_files, is_bundle, open_bundle, write_manifest
from famexport.checkpoint import Checkpoint, open_checkpoint
from famexport.contract import PRECISION_DTYPE
from famexport.errors import FamExportError, UsageError
from famexport.export import passes
from famexport.export.parity import TOLERANCES, Parity, check_parity, default_blocks
from famexport.export.source import Source, checkpoint_source, module_source
from famexport.export.trace import trace_step
from famexport.manifest import GraphFiles, Manifest
from famexport.publish import staged_directory
from famexport.runtime.golden import Golden
from famexport.runtime.ort import OrtCpu, import_onnxruntime
from famexport.tensorfile import TensorEntry, write_tensors

GRAPH, GRAPH_CPU, WEIGHTS = "block_step.onnx", "block_step.ort-cpu.onnx", "weights.safetensors"
GOLDEN, TOKENIZER = "golden.safetensors", "tokenizer.json"
DEFAULT_OPSET = 20
_DYNAMIC_PARITY_BATCH = 2
_M_MMAP_THRESHOLD = -3  # of mallopt(3)

Progress = Callable[[str, int, int], None]  # stage, done, in all


def export_bundle(
    source: str | Path | Checkpoint | nn.Module,
    out: str | Path,
    *,
    precision: str = "fp32",
    opset: int = DEFAULT_OPSET,
    batch: int | str = 1,
    inputs: str = "tokens",
    logits: str = "all",
    parity_blocks: int | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Bundle:
    """Trace one block step into ONNX, check it in a closed loop against the float32 torch step, and publish a bundle.

    Args:
        source: a checkpoint, or a module with ``step`` and ``contract``, exported as it is.
        precision: ``fp32``, ``fp16`` or ``bf16``: a property of the graph.
        opset: 20 gives primitives that every runtime has; 23 gives native Attention and RMSNormalization.
        batch: rows, or ``"dynamic"``.
        inputs: ``tokens`` or ``inputs_embeds``.
        logits: ``all`` rows of the block or the ``last``.
        parity_blocks: blocks to compare; by default 256, fewer for models that take long.
        tolerance: largest relative error allowed; by default that of the precision.
        seed: of the parity check's random input.
        progress: called with (stage, done, in all).
    Returns:
        the published bundle, read back and verified.
    Raises:
        UsageError: options that do not go together.
        ParityError: the export differs; nothing is published.
        CheckpointError, ConfigError, ContractError: bad input.
    """
    _check_options(precision, batch, inputs, logits)
    _check_parity_options(parity_blocks, tolerance, seed)
    report: Progress = progress or (lambda stage, done, total: None)
    import_onnxruntime()  # the parity check needs it: better missed now than after the tracing
    what = _source(source, precision, batch, inputs, logits)
    if isinstance(source, nn.Module) and (precision, batch, inputs, logits) != ("fp32", 1, "tokens", "all"):
        raise UsageError("a module is exported as its own contract says; precision, batch, inputs and logits go there")
    with staged_directory(Path(out), is_bundle, "bundle") as temp:
        report("trace", 0, 1)
        model = trace_step(what.module, what.step, what.contract, opset, what.device)
        report("trace", 1, 1)
        graphs = _write_graphs(temp, model, what, precision, report)
        parity, golden = _compare(temp, graphs, what, precision, parity_blocks, tolerance, seed, report)
        (temp / GOLDEN).write_bytes(golden.to_bytes())
        if what.tokenizer:
            (temp / TOKENIZER).write_bytes(what.tokenizer)
        manifest = Manifest(
            contract=what.contract,
            config=what.config,
            fam_trained=what.fam_trained,
            precision=precision,
            opset=opset,
            ir_version=int(model.ir_version),
            graphs={"block_step": graphs},
            weights=WEIGHTS if (temp / WEIGHTS).exists() else None,
            tokenizer=TOKENIZER if what.tokenizer else None,
            golden=GOLDEN,
            files=describe_files(temp),
            versions=_versions(),
            parity=parity.to_dict(),
            cost=dict(what.cost),
            engines={},
        )
        write_manifest(temp, manifest)
    return open_bundle(out)


def _check_options(precision: str, batch: int | str, inputs: str, logits: str) -> None:
    allowed = {"precision": (precision, tuple(PRECISION_DTYPE)), "inputs": (inputs, ("tokens", "inputs_embeds"))}
    allowed["logits"] = (logits, ("all", "last"))
    for name, (value, choices) in allowed.items():
        if value not in choices:
            raise UsageError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if batch != "dynamic" and (not isinstance(batch, int) or isinstance(batch, bool) or batch < 1):
        raise UsageError(f"batch must be a positive number or 'dynamic', got {batch!r}")


def _check_parity_options(blocks: int | None, tolerance: float | None, seed: int) -> None:
    if blocks is not None and blocks < 1:
        raise UsageError(f"parity_blocks must be at least 1, got {blocks}")
    if tolerance is not None and not 0 < tolerance < float("inf"):  # infinity would let NaN through
        raise UsageError(f"tolerance must be a positive, finite number, got {tolerance}")
    if seed < 0:
        raise UsageError(f"seed must not be negative, got {seed}")


def _source(
    source: str | Path | Checkpoint | nn.Module, precision: str, batch: int | str, inputs: str, logits: str
) -> Source:
    if isinstance(source, nn.Module):
        return module_source(source)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    return checkpoint_source(checkpoint, precision, batch, inputs=inputs, logits=logits)


def _write_graphs(temp: Path, model: ir.Model, what: Source, precision: str, report: Progress) -> GraphFiles:
    """Weight file, portable graph, and the graph for CPUs where that must be another one."""
    initializers = model.graph.initializers
    for name in what.weights:
        if name in initializers:
            initializers[name].const_value = None  # nothing may read or fold a weight
    passes.fill_constants(model, what.constants)
    passes.clean(model)
    used = [entry for name, entry in what.weights.items() if name in initializers]
    placed: dict[str, TensorEntry] = {}
    if used:
        placed = write_tensors(
            temp / WEIGHTS, used, what.load, progress=lambda done, total: report("weights", done, total)
        )
    facts = {"famexport.precision": precision}
    if precision == "bf16":
        passes.infer_types(model, what.contract)
    passes.bind_weights(model, placed, WEIGHTS)
    passes.attach_contract(model, what.contract, facts)
    (temp / GRAPH).write_bytes(passes.serialize(model))
    if precision != "bf16":
        return GraphFiles(GRAPH, {})
    passes.emulate_bfloat16(model)
    (temp / GRAPH_CPU).write_bytes(passes.serialize(model))
    return GraphFiles(GRAPH, {"ort-cpu": GRAPH_CPU})


def _compare(
    temp: Path,
    graphs: GraphFiles,
    what: Source,
    precision: str,
    blocks: int | None,
    tolerance: float | None,
    seed: int,
    report: Progress,
) -> tuple[Parity, Golden]:
    _return_large_buffers()
    backend = OrtCpu(what.contract, precision, temp / graphs.variants.get("ort-cpu", graphs.file))
    loop = backend.open(_DYNAMIC_PARITY_BATCH if what.contract.batch == "dynamic" else None)

    def release() -> None:
        loop.close()
        backend.close()

    return check_parity(
        loop,
        what.reference(),
        blocks=blocks or default_blocks(what.cost.get("flops_per_block"), what.contract),
        tolerance=TOLERANCES[precision] if tolerance is None else tolerance,
        seed=seed,
        release=release,
        folder=temp,
        progress=lambda done, total: report("parity", done, total),
    )


def _return_large_buffers() -> None:
    """Have the C library give freed buffers of a MiB and more back to the system at once.

    glibc raises that limit to 32 MiB by itself, and then keeps some 400 MB of freed activations beside a step of a
    1B model at T = 1024 (VmHWM, Linux x86-64).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def _versions() -> dict[str, str]:
    found: dict[str, Any] = {}
    for package in ("famexport", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            if package != "famexport":  # run from the source tree
                raise FamExportError(f"{package} is not installed; pip install 'famexport[export]'") from None
            found[package] = "source"
    return found
