"""``export_bundle``: checkpoint or module -> graph -> weight file -> parity -> a published bundle."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

from famexport.bundle import Bundle, Signature, describe_files, is_bundle, open_bundle, write_manifest
from famexport.checkpoint import Checkpoint, open_checkpoint
from famexport.config import FamConfig
from famexport.contract import PRECISION_DTYPE, QUANTIZED
from famexport.errors import CheckpointError, FamExportError, UsageError
from famexport.export import passes
from famexport.export.cuda_steps import cuda_graphs
from famexport.export.cut import compare, is_cut
from famexport.export.quality import measure_quality, quality_options, quality_tokens
from famexport.export.quantize import quantize
from famexport.export.source import Source, checkpoint_source, module_source
from famexport.export.stamp import TRACED_LAYERS, stamp
from famexport.export.trace import IR_VERSIONS, trace_step
from famexport.manifest import FileEntry, GraphFiles, Manifest
from famexport.publish import staged_directory
from famexport.runtime.ort import import_onnxruntime
from famexport.tensorfile import TensorEntry, write_tensors

WEIGHTS, GOLDEN, TOKENIZER = "weights.safetensors", "golden.safetensors", "tokenizer.json"
DEFAULT_OPSET = 20
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
    graphs: str = "block",
    chunks: Sequence[int] | None = None,
    parity_blocks: int | None = None,
    tolerance: float | None = None,
    max_loss_increase: float | None = None,
    quality_text: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Bundle:
    """Trace one block step into ONNX, check it in a closed loop against the float32 torch step, and publish a bundle.

    Args:
        source: a checkpoint, or a module with ``step`` and ``contract``, exported as it is.
        precision: ``fp32``, ``fp16`` or ``bf16``: a property of the graph; ``int8`` or ``int4``: float32 with quantised
            products, for ONNX Runtime on CPUs.
        opset: 20 gives primitives that every runtime has; 23 gives native Attention and RMSNormalization.
        batch: rows, or ``"dynamic"``.
        inputs: ``tokens`` or ``inputs_embeds``.
        logits: ``all`` rows of the block or the ``last``.
        graphs: ``block`` gives block_step; ``all`` gives append_step and commit_block too, over the same weight file.
        chunks: widths of append_step, one graph each: positions that it takes at once; 1 alone unless given.
        parity_blocks: blocks to compare; by default 256, fewer for models that take long. Where not even 2 are cheap, 1
            block is compared through all layers and more through the first ones alone: ``parity["cut"]``; append_step
            and commit_block through all layers for one call: ``parity["calls"]``.
        tolerance: largest relative error allowed; by default that of the precision.
        max_loss_increase: of int8 and int4, nats per token on text; by default that of the precision.
        quality_text: a file with that text; by default Python's own documentation.
        seed: of the parity check's random input.
        progress: called with (stage, done, in all).
    Returns:
        the published bundle, read back and verified.
    Raises:
        UsageError: options that do not go together.
        ParityError: the export differs; nothing is published.
        NumericError: quantising costs more loss than allowed; nothing is published.
        CheckpointError, ConfigError, ContractError: bad input.
    """
    chunks = _check_options(precision, batch, inputs, logits, graphs, chunks)
    _check_parity_options(parity_blocks, tolerance, seed)
    limit, text = quality_options(precision, opset, DEFAULT_OPSET, max_loss_increase, quality_text)
    report: Progress = progress or (lambda stage, done, total: None)
    import_onnxruntime()  # the parity check needs it: better missed now than after the tracing
    what = _source(source, precision, batch, inputs, logits, chunks)
    if isinstance(source, nn.Module) and (precision, batch, inputs, logits, chunks) != ("fp32", 1, "tokens", "all", ()):
        raise UsageError("a module is exported as its own contract says; precision, batch, inputs and logits go there")
    _return_large_buffers()
    with staged_directory(Path(out), is_bundle, "bundle") as temp:
        for name, content in what.tokenizer.items():
            (temp / name).write_bytes(content)
        ids = quality_tokens(what, temp / TOKENIZER, text) if precision in QUANTIZED else None  # before what takes long
        models, cuts = _trace(what, opset, report)
        if precision in QUANTIZED:
            what = quantize(what, [*models.values(), *cuts.values()], precision)
        files = _write_graphs(temp, models, what, precision, report)
        weights = temp / WEIGHTS if (temp / WEIGHTS).exists() else None
        on_cpu = {name: temp / file.variants.get("ort-cpu", file.file) for name, file in files.items()}
        parity, golden = compare(what, on_cpu, cuts, weights, precision, parity_blocks, tolerance, seed, report)
        (temp / GOLDEN).write_bytes(golden.to_bytes())
        if precision in QUANTIZED:
            graph = temp / files["block_step"].file
            parity["quality"] = measure_quality(what, precision, graph, temp / WEIGHTS, ids, limit, text, report)
        hashes = dict[Signature, FileEntry]()
        manifest = Manifest(
            contract=what.contract,
            config=what.config,
            fam_trained=what.fam_trained,
            precision=precision,
            opset=opset,
            ir_version=IR_VERSIONS[opset],
            graphs=files,
            weights=WEIGHTS if weights else None,
            tokenizer=TOKENIZER if what.tokenizer else None,
            golden=GOLDEN,
            files=describe_files(temp, hashes),
            versions=_versions(),
            parity=parity,
            cost=dict(what.cost),
            engines={},
        )
        write_manifest(temp, manifest)
        checked = open_bundle(temp, hashes=hashes)  # before: a module may have operators that no device would load
    return replace(checked, path=Path(os.path.abspath(out)))


def _check_options(
    precision: str, batch: int | str, inputs: str, logits: str, graphs: str, chunks: Sequence[int] | None
) -> tuple[int, ...]:
    """The chunk widths that the options amount to."""
    allowed = {
        "precision": (precision, tuple(PRECISION_DTYPE)),
        "inputs": (inputs, ("tokens", "inputs_embeds")),
        "logits": (logits, ("all", "last")),
        "graphs": (graphs, ("block", "all")),
    }
    for name, (value, choices) in allowed.items():
        if value not in choices:
            raise UsageError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if batch != "dynamic" and (not isinstance(batch, int) or isinstance(batch, bool) or batch < 1):
        raise UsageError(f"batch must be a positive number or 'dynamic', got {batch!r}")
    if graphs != "all":
        if chunks is not None:
            raise UsageError(
                f"chunks {list(chunks)} are of append_step, which graphs={graphs!r} leaves out; give 'all'"
            )
        return ()
    chunks = (1,) if chunks is None else chunks
    if not chunks or any(not isinstance(c, int) or isinstance(c, bool) or c < 1 for c in chunks):
        raise UsageError(f"chunks must be positive numbers of positions, got {list(chunks)}")
    return tuple(sorted(set(chunks)))


def _check_parity_options(blocks: int | None, tolerance: float | None, seed: int) -> None:
    if blocks is not None and blocks < 1:
        raise UsageError(f"parity_blocks must be at least 1, got {blocks}")
    if tolerance is not None and not 0 < tolerance < float("inf"):  # infinity would let NaN through
        raise UsageError(f"tolerance must be a positive, finite number, got {tolerance}")
    if seed < 0:
        raise UsageError(f"seed must not be negative, got {seed}")


def _source(
    source: str | Path | Checkpoint | nn.Module,
    precision: str,
    batch: int | str,
    inputs: str,
    logits: str,
    chunks: tuple[int, ...],
) -> Source:
    if isinstance(source, nn.Module):
        return module_source(source)
    if not isinstance(source, Checkpoint) and is_bundle(Path(source)):
        raise CheckpointError(
            f"{source} is a bundle, expected a checkpoint; name the one that it was exported from, or make one with: "
            "famexport convert SRC -o CKPT"
        )
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    if chunks and chunks[-1] > (size := checkpoint.config.block_size):
        raise UsageError(
            f"a chunk of {chunks[-1]} does not fit a block of {size} positions; export with --chunk {size} or less"
        )
    return checkpoint_source(checkpoint, precision, batch, inputs=inputs, logits=logits, chunks=chunks)


def _trace(what: Source, opset: int, report: Progress) -> tuple[dict[str, ir.Model], dict[str, ir.Model]]:
    """Each graph of the contract, clean, its weights without data; and that of a model's first layers, where it was
    stamped from them."""
    names, models, cuts = what.contract.graph_names, {}, dict[str, ir.Model]()
    report("trace", 0, len(names))
    for done, name in enumerate(names, 1):
        models[name] = _graph(what, name, opset, cuts)
        report("trace", done, len(names))
    return models, cuts


def _graph(what: Source, name: str, opset: int, cuts: dict[str, ir.Model]) -> ir.Model:
    """One graph, clean. A checkpoint's layers are alike, so two of them are traced and the rest is stamped."""
    if what.cut and is_cut(what):
        model = _graph(what.cut(TRACED_LAYERS), name, opset, {})
        cuts[name] = model.clone()
        if stamp(model, what.contract.graph(name), what.layers):
            return model
    io = what.contract.graph(name)
    model = trace_step(what.module, what.steps["append_step" if io.chunk else name], io, opset, what.device)
    for value in model.graph.initializers.values():
        if value.name in what.weights:
            value.const_value = None  # nothing may read or fold a weight
    passes.fill_constants(model, what.constants)
    passes.clean(model)
    return model


def _write_graphs(
    temp: Path, models: Mapping[str, ir.Model], what: Source, precision: str, report: Progress
) -> dict[str, GraphFiles]:
    """The weight file that all graphs share, each graph, and the one for CPUs where that must be another."""
    read = {name for model in models.values() for name in model.graph.initializers}
    used = [entry for name, entry in what.weights.items() if name in read]
    placed: dict[str, TensorEntry] = {}
    if used:
        placed = write_tensors(
            temp / WEIGHTS, used, what.load, progress=lambda done, total: report("weights", done, total)
        )
    files = {}
    for name, model in models.items():
        files[name] = GraphFiles(f"{name}.onnx", {"ort-cpu": f"{name}.ort-cpu.onnx"} if precision == "bf16" else {})
        if precision == "bf16":
            passes.infer_types(model)
        passes.bind_weights(model, placed, WEIGHTS)
        passes.attach_contract(model, what.contract, name, {"famexport.precision": precision})
        (temp / files[name].file).write_bytes(passes.serialize(model))
        if precision == "bf16":
            passes.emulate_bfloat16(model)
            (temp / files[name].variants["ort-cpu"]).write_bytes(passes.serialize(model))
    if what.config is not None and precision not in QUANTIZED:
        own = cuda_graphs(FamConfig.from_dict(what.config), what.contract, precision, set(placed))
        for name, variants in own.items():
            for key, model in variants.items():
                files[name].variants[key] = f"{name}.{key}.onnx"
                passes.describe(model, what.contract, name, {"famexport.precision": precision})
                (temp / f"{name}.{key}.onnx").write_bytes(passes.serialize(model))
    return files


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
