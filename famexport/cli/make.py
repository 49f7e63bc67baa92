"""Commands that make artifacts: init, convert, export."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from famexport.cli import options as opt
from famexport.cli.output import err, out, print_json, size, stages
from famexport.errors import UsageError

BlockSize = Annotated[int | None, typer.Option(help="T, tokens in a block.", min=1)]
Segments = Annotated[int | None, typer.Option(help="M, cached past blocks; 0 for none.", min=0)]
FamLength = Annotated[int | None, typer.Option(help="F, FAM vectors per layer; 0 for block sliding window.", min=0)]
Target = Annotated[Path, typer.Option("-o", "--output", help="Where the result goes; replaced only when complete.")]


def init(
    output: Target,
    preset: Annotated[str, typer.Option(help="tiny, edge, paper-1b, paper-8b or paper-24b.")] = "tiny",
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    dtype: Annotated[opt.Dtype, typer.Option(help="Dtype of the weights.")] = opt.Dtype.float32,
    block_size: BlockSize = None,
    memory_segments: Segments = None,
    fam_length: FamLength = None,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Make a random checkpoint, for tests, benchmarks and sizing."""
    from famexport.config import preset as find_preset

    changes = {"block_size": block_size, "memory_segments": memory_segments, "fam_length": fam_length}
    config = find_preset(preset, **{key: value for key, value in changes.items() if value is not None})
    from famexport.checkpoint import init_checkpoint

    with stages(quiet) as report:
        init_checkpoint(output, config, seed=seed, dtype=dtype.value, progress=report.one("weights"))
    _say_checkpoint(output, quiet, json)


def convert(
    source: Annotated[str, typer.Argument(help="A Hugging Face directory or hub id, or a GGUF file.", metavar="SRC")],
    output: Target,
    block_size: BlockSize = None,
    memory_segments: Segments = None,
    fam_length: FamLength = None,
    dtype: Annotated[
        opt.Dtype | None, typer.Option(help="Dtype of the weights.", show_default="the source's own")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompt embeddings where the source has none.")] = 0,
    lora: Annotated[
        Path | None,
        typer.Option(
            help="A LoRA adapter in PEFT's form to merge into the weights.", metavar="DIR", show_default="none"
        ),
    ] = None,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Make a checkpoint of a Llama, Mistral, Qwen2 or Qwen3 model."""
    from famexport.convert import convert as convert_source

    with stages(quiet) as report, warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        convert_source(
            source,
            output,
            block_size=block_size,
            memory_segments=memory_segments,
            fam_length=fam_length,
            dtype=dtype.value if dtype else None,
            seed=seed,
            lora=lora,
            progress=report.one("weights"),
        )
    for note in notes:
        if issubclass(note.category, UserWarning):
            err.print(f"note: {note.message}", markup=False)
    merged = None
    if lora is not None:
        from famexport.convert.lora import read_adapter, summary

        merged = summary(read_adapter(lora))
    _say_checkpoint(output, quiet, json, merged)


def _say_checkpoint(path: Path, quiet: bool, json: bool, lora: dict[str, Any] | None = None) -> None:
    from famexport.inspection import inspect

    facts = inspect(path)
    if json:
        print_json({"checkpoint": str(path), **facts, **({"lora": lora} if lora else {})})
    elif not quiet:
        config = facts["config"]
        trained = "" if facts["fam_trained"] or not config["fam_length"] else ", FAM not trained"
        merged = f", LoRA merged into {lora['weights']} weights" if lora else ""
        out.print(
            f"{path}: {facts['parameters'] / 1e6:.1f}M parameters, {facts['dtype']}, {size(facts['bytes'])}, "
            f"T={config['block_size']} M={config['memory_segments']} F={config['fam_length']}{trained}{merged}",
            markup=False,
        )


_CURVES = ("logits_error", "state_error")


def export(
    context: typer.Context,
    checkpoint: opt.Checkpoint,
    output: Target,
    recipe: opt.Recipe = None,
    precision: Annotated[
        opt.Precision, typer.Option(help="Dtype of weights and products; int8 and int4 are for CPUs.")
    ] = opt.Precision.fp32,
    opset: Annotated[int, typer.Option(help="20: primitives, runs everywhere; 23: native attention.")] = 20,
    batch: Annotated[str, typer.Option(help="Rows of the batch, or 'dynamic'.")] = "1",
    logits: Annotated[opt.Logits, typer.Option(help="Logits of all rows of a block, or of the last.")] = opt.Logits.all,
    inputs: Annotated[opt.Inputs, typer.Option(help="What the step takes.")] = opt.Inputs.tokens,
    graphs: Annotated[
        opt.Graphs, typer.Option(help="block: block_step alone; all: append_step and commit_block too, to generate.")
    ] = opt.Graphs.block,
    chunk: Annotated[
        list[int] | None,
        typer.Option(help="Positions append_step takes at once; repeat for several.", min=1, show_default="1"),
    ] = None,
    parity_blocks: Annotated[
        int | None, typer.Option(help="Blocks of the parity check.", min=2, show_default="256, fewer for large models")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative error.", min=0.0, show_default="by precision")
    ] = None,
    max_loss_increase: Annotated[
        float | None,
        typer.Option(help="Of int8 and int4: nats per token on text.", min=0.0, show_default="0.05 and 0.1"),
    ] = None,
    quality_text: Annotated[
        Path | None, typer.Option(help="That text: a file.", show_default="Python's documentation")
    ] = None,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Trace one block step into ONNX, check it against torch in a closed loop, and publish a bundle."""
    given: dict[str, Any] = {
        "precision": precision.value,
        "opset": opset,
        "batch": int(batch) if batch.isdecimal() else batch,
        "inputs": inputs.value,
        "logits": logits.value,
        "graphs": graphs.value,
        "chunks": chunk or None,
    }
    if recipe:
        from famexport.recipe import load_recipe

        names = {"chunks": "chunk"}
        typed = {key: value for key, value in given.items() if opt.is_typed(context, names.get(key, key))}
        given = {**given, **load_recipe(recipe).export, **typed}
    if chunk and given["graphs"] == "block":
        raise UsageError("--chunk is for append_step, which this bundle would not have; add --graphs all")
    if given["batch"] != "dynamic" and not isinstance(given["batch"], int):
        raise UsageError(f"--batch must be a positive number or 'dynamic', got {batch!r}")
    from famexport.export.pipeline import export_bundle

    with stages(quiet) as report:
        bundle = export_bundle(
            checkpoint,
            output,
            **given,
            parity_blocks=parity_blocks,
            tolerance=tolerance,
            max_loss_increase=max_loss_increase,
            quality_text=quality_text,
            progress=report,
        )
    parity, manifest = bundle.manifest.parity, bundle.manifest
    cut = parity.get("cut", {})
    parts = parity, parity.get("append", {}), cut, cut.get("append", {})
    curves = [e for part in parts for k in _CURVES for e in part.get(k, ())]
    worst = max(*curves, *parity.get("calls", {}).values())
    if json:
        files = {name: entry.bytes for name, entry in manifest.files.items()}
        print_json({"bundle": str(output), "id": bundle.id, "files": files, "worst_error": worst, "parity": parity})
    elif not quiet:
        total = sum(entry.bytes for entry in manifest.files.values())
        out.print(
            f"{output}: {manifest.precision}, opset {manifest.opset}, {size(total)}; parity over {_compared(parity)}: "
            f"worst relative error {worst:.2g} (allowed {parity['tolerance']:.2g}), "
            f"argmax agreement {parity['argmax_agreement']:.2%}",
            markup=False,
        )
        if quality := parity.get("quality"):
            out.print(_quality_line(quality), markup=False)
    from famexport.export.parity import growth_note

    if note := growth_note(parity):
        err.print(f"note: {note}", markup=False)


def _quality_line(quality: dict[str, Any]) -> str:
    if reason := quality.get("unmeasured"):
        return f"quality not measured on text: {reason}; the parity check above is all there is"
    return (
        f"quality on {quality['tokens']} tokens of {quality['text']}: loss {quality['loss']:.4f}, in float32 "
        f"{quality['reference_loss']:.4f}: {quality['loss_increase']:+.4f} nats (allowed "
        f"{quality['max_loss_increase']:+.4g}), argmax agreement {quality['argmax_agreement']:.2%}"
    )


def _compared(parity: dict[str, Any]) -> str:
    blocks = "1 block" if parity["blocks"] == 1 else f"{parity['blocks']} blocks"
    if cut := parity.get("cut"):
        return f"{blocks}, and over {cut['blocks']} of the first {cut['layers']} layers alone"
    return blocks
