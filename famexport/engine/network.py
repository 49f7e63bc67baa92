"""An ONNX graph as a strongly typed TensorRT network, and what types it got."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from famexport.contract import PRECISION_DTYPE, GraphIO
from famexport.errors import EngineError, FamExportError, IncompatibleError
from famexport.runtime.tensorrt_api import DTYPES


def parse_network(trt: Any, builder: Any, logger: Any, graph: Path) -> Any:
    """The network of an ONNX file, whose weights lie beside it.

    Raises:
        IncompatibleError: this TensorRT cannot parse it; the first of its errors is named.
    """
    flags = trt.NetworkDefinitionCreationFlag
    # Strongly typed: the graph's dtypes are binding. TensorRT 11 knows nothing else, and 11.x keeps the flag.
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        why = "; ".join(errors[:3]) or "no reason given"
        raise IncompatibleError(
            f"{trt.__name__} {trt.__version__} cannot parse {graph.name}: {why}; "
            "export with --opset 20, whose operators every version has"
        )
    return network


def _parser_error(error: Any) -> str:
    first = (error.desc().strip() or "no reason given").splitlines()[0]
    return f"{first:.300} (node {error.node_name() or error.node()}, {error.node_operator()})"


def mark_attention(trt: Any, network: Any, decomposable: bool) -> int:
    """Say of every attention whether it may fall apart into primitives; return how many there are.

    One that may not builds only if TensorRT has a dedicated kernel for it.
    """
    count = 0
    for layer in _layers(network):
        if layer.type.name == "ATTENTION_OUTPUT":
            # The bindings hand every layer out as ILayer; samples of NVIDIA's narrow it in the same way
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = decomposable
            count += 1
    return count


def network_types(network: Any) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """Output dtypes of the layers by kind, and the dtypes of inputs and outputs, in TensorRT's names."""
    kinds: dict[str, Counter[str]] = {}
    for layer in _layers(network):
        for i in range(layer.num_outputs):
            kinds.setdefault(layer.type.name, Counter())[layer.get_output(i).dtype.name] += 1
    ends = [network.get_input(i) for i in range(network.num_inputs)]
    ends += [network.get_output(i) for i in range(network.num_outputs)]
    return {kind: dict(counts) for kind, counts in sorted(kinds.items())}, {t.name: t.dtype.name for t in ends}


def check_types(
    layers: dict[str, dict[str, int]], io: dict[str, str], wanted: GraphIO, precision: str, *, own_model: bool
) -> None:
    """Every input and output as the contract has it, and for famexport's own model every product in its precision.

    Raises:
        EngineError: it is not what was asked for; nothing was built.
    """
    problems = []
    for spec in (*wanted.taken, *wanted.given):
        if (got := io.get(spec.name)) != DTYPES[spec.dtype]:
            problems.append(f"{spec.name} is {got}, expected {DTYPES[spec.dtype]}")
    if unknown := sorted(set(io) - {spec.name for spec in (*wanted.taken, *wanted.given)}):
        problems.append(f"unknown tensors {', '.join(unknown)}")
    expected = DTYPES[PRECISION_DTYPE.get(precision, "float32")]
    for kind in ("MATRIX_MULTIPLY", "ATTENTION_OUTPUT") if own_model else ():
        if strange := {dtype: n for dtype, n in layers.get(kind, {}).items() if dtype != expected}:
            problems.append(f"{strange} of the {kind} layers, expected all {expected} for {precision}")
    if problems:
        raise EngineError(f"the engine of {wanted.name} would not be what was asked: {'; '.join(problems)}")


def _layers(network: Any) -> list[Any]:
    return [network.get_layer(i) for i in range(network.num_layers)]


def build_failure(what: str, errors: list[str]) -> FamExportError:
    """The error for a build that gave no engine, from what the builder logged."""
    text = " ".join(errors) or "the builder gave no reason"
    low = text.lower()
    shown = f"{text.split(' (See ')[0]:.400}"
    if "is_decomposable" in low:
        return EngineError(
            f"{what}: TensorRT has no fused kernel for this attention (fused ones: float16 or bfloat16, head size "
            f"16 to 256 and a multiple of 8): {shown}; build with --attention decomposable"
        )
    if "outofmemory" in low.replace(" ", "") or "cuda error 2" in low or "insufficient memory" in low:
        return FamExportError(
            f"{what}: the build ran out of memory: {shown}; lower --workspace or --optimization-level, or close what "
            "else uses the memory"
        )
    if "cuda_success" in low:  # TensorRT-RTX 1.7.1 without a GPU: REFIT compiles for the GPU at hand
        return IncompatibleError(
            f"{what}: the build needs a GPU: {shown}; leave out --refit and --strip, or build where the GPU is"
        )
    return IncompatibleError(f"{what}: TensorRT could not build it: {shown}")
