"""Trace one step into an ONNX graph. No weight is read: parameters may live on the meta device."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from famexport.contract import StepContract
from famexport.errors import UsageError
from famexport.export.translations import primitive_translations

if TYPE_CHECKING:
    import onnx_ir as ir

Step = Callable[..., tuple[Tensor, dict[str, Tensor]]]  # (input, state) -> (logits, state)

# opset -> IR version: the oldest that the opset allows, so that older runtimes load the file
IR_VERSIONS = {18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
NATIVE_ATTENTION_OPSET = 23
_DYNAMIC_EXAMPLE = 2  # a batch of 1 would be taken for a constant


class FlatStep(nn.Module):
    """The step with flat inputs and outputs in contract order, which become the graph's own."""

    def __init__(self, module: nn.Module, step: Step, contract: StepContract) -> None:
        super().__init__()
        self.module = module  # registered, so that its parameters keep their names
        self.contract = contract
        self._call = step

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        fed, past = tensors[: len(self.contract.inputs)], tensors[len(self.contract.inputs) :]
        state = {spec.name: tensor for spec, tensor in zip(self.contract.states, past, strict=True)}
        logits, new = self._call(*fed, state)
        return logits, *(new[spec.name] for spec in self.contract.states)


def trace_step(module: nn.Module, step: Step, contract: StepContract, opset: int, device: str = "meta") -> ir.Model:
    """The step as an ``onnx_ir.Model`` whose initialisers carry the parameters' own names and no data.

    Args:
        module: owner of the parameters and buffers that ``step`` uses.
        device: where they live: "meta" where they hold no data.
    Raises:
        UsageError: an opset famexport does not write.
    """
    if opset not in IR_VERSIONS:
        raise UsageError(f"opset {opset} is not supported; expected one of {', '.join(map(str, IR_VERSIONS))}")
    dynamic = contract.batch == "dynamic"
    batch = _DYNAMIC_EXAMPLE if dynamic else int(contract.batch)
    specs = (*contract.inputs, *contract.states)
    args = tuple(torch.zeros(spec.sized(batch), dtype=getattr(torch, spec.dtype), device=device) for spec in specs)
    axis = torch.export.Dim("batch") if dynamic else None
    shapes = {"tensors": tuple({0: axis} for _ in specs)} if dynamic else None
    with torch.no_grad(), _quiet():
        program = torch.export.export(FlatStep(module, step, contract), args, dynamic_shapes=shapes, strict=False)
        onnx_program = torch.onnx.export(
            program,
            opset_version=opset,
            optimize=False,
            verbose=False,
            input_names=contract.input_names,
            output_names=contract.output_names,
            custom_translation_table=primitive_translations() if opset < NATIVE_ATTENTION_OPSET else None,
        )
    assert onnx_program is not None
    model = onnx_program.model
    model.ir_version = IR_VERSIONS[opset]
    for name in list(model.graph.initializers):
        value = model.graph.initializers.pop(name)
        value.name = name.removeprefix("module.")
        model.graph.initializers[value.name] = value
    return model


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
