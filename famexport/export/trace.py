"""Trace one step into an ONNX graph. No weight is read: parameters may live on the meta device."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from famexport.contract import DYNAMIC, GraphIO
from famexport.errors import ContractError, FamExportError, UsageError, first_line, raise_problems
from famexport.export.translations import primitive_translations

if TYPE_CHECKING:
    import onnx_ir as ir

Step = Callable[..., Any]  # (*inputs, state) -> (logits, new state), or the new state where there are no logits

# opset -> IR version: the oldest that the opset allows, so that older runtimes load the file
IR_VERSIONS = {18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
NATIVE_ATTENTION_OPSET = 23
_DYNAMIC_EXAMPLE = 2  # a batch of 1 would be taken for a constant


class FlatStep(nn.Module):
    """The step with flat inputs and outputs in contract order, which become the graph's own."""

    def __init__(self, module: nn.Module, step: Step, io: GraphIO) -> None:
        super().__init__()
        self.module = module  # registered, so that its parameters keep their names
        self.io = io
        self._call = step

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        fed, past = tensors[: len(self.io.inputs)], tensors[len(self.io.inputs) :]
        state = {spec.name: tensor for spec, tensor in zip(self.io.states, past, strict=True)}
        with _WithoutIdleCasts():
            result = self._call(*fed, state)
        outputs = self._ordered(result)
        taken = [*tensors]  # an output that is an input, or another output, would share its name in the graph
        for i, tensor in enumerate(outputs):
            outputs[i] = tensor.clone() if any(tensor is other for other in taken) else tensor
            taken.append(tensor)
        return tuple(outputs)

    def _ordered(self, result: Any) -> list[Tensor]:
        """What the step gave, as [logits, *states] in contract order."""
        if self.io.logits is None:
            result = None, result
        if not (isinstance(result, (tuple, list)) and len(result) == 2 and isinstance(result[1], Mapping)):
            raise ContractError(f"the step must return (logits, state), got {type(result).__name__}")
        logits, new = result
        names = [spec.name for spec in self.io.new]
        problems = [f"the new state lacks {name}" for name in names if name not in new]
        problems += [
            f"the new state has {name!r:.80}, which the contract does not" for name in new if name not in names
        ]
        outputs = [logits] if self.io.logits else []
        outputs += [new[name] for name in names if name in new]
        problems += [f"{type(o).__name__} given where a tensor belongs" for o in outputs if not isinstance(o, Tensor)]
        raise_problems(ContractError, "the step does not keep its contract", problems)
        return outputs


class _WithoutIdleCasts(TorchFunctionMode):
    """A cast to the dtype that a tensor has gives the tensor itself, as in eager torch.

    Traced, it would be two operations, which are a third of a step's, and are removed again at some cost.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs and ((func is Tensor.float and len(args) == 1) or (func is Tensor.to and len(args) == 2)):
            wanted = torch.float32 if func is Tensor.float else args[1]
            if wanted is args[0].dtype:
                return args[0]
        return func(*args, **(kwargs or {}))


def trace_step(module: nn.Module, step: Step, io: GraphIO, opset: int, device: str = "meta") -> ir.Model:
    """The step as an ``onnx_ir.Model`` whose initialisers carry the parameters' own names and no data.

    Args:
        module: owner of the parameters and buffers that ``step`` uses.
        io: the graph that it becomes.
        device: where they live: "meta" where they hold no data.
    Raises:
        UsageError: an opset famexport does not write.
        ContractError: the step does not take or give what the contract says, or cannot be traced.
        FamExportError: an operation of the step has no form in this opset.
    """
    if opset not in IR_VERSIONS:
        raise UsageError(f"opset {opset} is not supported; expected one of {', '.join(map(str, IR_VERSIONS))}")
    specs, dynamic = io.taken, io.taken[0].shape[0] == DYNAMIC
    args = tuple(
        torch.zeros(spec.sized(_DYNAMIC_EXAMPLE), dtype=getattr(torch, spec.dtype), device=device) for spec in specs
    )
    axis = torch.export.Dim("batch") if dynamic else None
    shapes = {"tensors": tuple({0: axis} for _ in specs)} if dynamic else None
    with torch.no_grad(), _quiet(), _without_stack_traces():
        try:
            program = torch.export.export(FlatStep(module, step, io), args, dynamic_shapes=shapes, strict=False)
        except FamExportError:
            raise
        except Exception as exc:  # whatever the step's own code and torch raise
            raise ContractError(
                f"the step cannot be traced with its contract's inputs: {_reason(exc)}; it must be tensor operations "
                "whose shapes and branches do not depend on values"
            ) from exc
        try:
            onnx_program = torch.onnx.export(
                program,
                opset_version=opset,
                optimize=False,
                verbose=False,
                input_names=[spec.name for spec in io.taken],
                output_names=[spec.name for spec in io.given],
                custom_translation_table=primitive_translations() if opset < NATIVE_ATTENTION_OPSET else None,
            )
        except Exception as exc:
            raise FamExportError(f"the step has no form in ONNX opset {opset}: {_reason(exc)}") from exc
    assert onnx_program is not None
    model = onnx_program.model
    model.ir_version = IR_VERSIONS[opset]
    for name in list(model.graph.initializers):
        value = model.graph.initializers.pop(name)
        value.name = name.removeprefix("module.")
        model.graph.initializers[value.name] = value
    _name_batch(model.graph)
    return model


@contextlib.contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Spare a stack trace for every operation: none reaches the graph. Older versions of torch lack the setting."""
    name = "do_not_emit_stack_traces"
    before = getattr(fx.config, name, None)
    if before is None:
        yield
        return
    setattr(fx.config, name, True)
    try:
        yield
    finally:
        setattr(fx.config, name, before)


def _name_batch(graph: ir.Graph) -> None:
    """Call the symbolic batch what the contract calls it; torch gives it a name of its own."""
    from onnx_ir import Shape

    symbols = {str(dim) for value in graph.inputs for dim in value.shape or () if not isinstance(dim, int)}
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = Shape(DYNAMIC if str(dim) in symbols else dim for dim in value.shape)


def _reason(exc: BaseException) -> str:
    """The first line of the exception at the root."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    return f"{type(exc).__name__}: {first_line(exc, 300)}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs and prints what no user can act on; errors still come as exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels: list[Any] = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
