"""A block step in training without its launches: on a GPU a CUDA graph, and another for its gradients.

A step of a large model is some thousand small kernels, and Python takes ten times as long to launch them as they take
to run. Here a call runs one graph without gradients; where gradients are asked for, a second graph computes the step
again with them (so activations of one block are kept at most) and adds those of the parameters to their ``grad``.
Inputs and outputs are copied in and out, so a step may be called any number of times before its gradients are asked
for. On a CPU the same is done by calling the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from famexport.model import State

Step = Callable[[Tensor, State, Tensor], tuple[Tensor, State]]


class Replayed:
    """``step`` of tokens [b, T], a state and positions [b, n], for tensors of shapes that stay as they are.

    ``parameters`` must keep their ``grad`` from now on: it is to be zeroed, not dropped.
    """

    def __init__(self, step: Step, parameters: Sequence[Tensor], device: str) -> None:
        self._step, self._parameters, self._device = step, list(parameters), device
        self._calls: dict[Any, _Call] = {}
        for p in self._parameters:
            p.grad = torch.zeros_like(p)

    def __call__(self, tokens: Tensor, state: State, positions: Tensor) -> tuple[Tensor, State]:
        key = tokens.shape, positions.shape
        if key not in self._calls:
            kept = [p.grad.clone() for p in self._parameters if p.grad is not None]
            self._calls[key] = _Call(self._step, self._parameters, self._device, tokens, state, positions)
            torch._foreach_copy_([p.grad for p in self._parameters if p.grad is not None], kept)
        logits, *new = _Run.apply(self._calls[key], tokens, positions, *state.values())  # type: ignore[no-untyped-call]
        return logits, dict(zip(state, new, strict=True))


class _Call:
    def __init__(
        self,
        step: Step,
        parameters: Sequence[Tensor],
        device: str,
        tokens: Tensor,
        state: State,
        positions: Tensor,
    ) -> None:
        self.inputs = [x.detach().clone() for x in (tokens, positions, *state.values())]
        for x in self.inputs:
            x.requires_grad_(x.is_floating_point())
        past, wanted = self.inputs[2:], [x for x in self.inputs if x.requires_grad]
        self.outputs: list[Tensor] = []
        self.input_grads: list[Tensor] = []
        self.output_grads: list[Tensor] = []

        def run() -> list[Tensor]:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda", cache_enabled=False):
                logits, new = step(self.inputs[0], dict(zip(state, past, strict=True)), self.inputs[1])
            return [logits, *(new[name] for name in state)]

        def forward() -> None:
            with torch.no_grad():
                self.outputs[:] = run()

        def backward() -> None:
            with torch.enable_grad():
                outputs = [x for x in run() if x.is_floating_point()]
                grads = torch.autograd.grad(outputs, [*wanted, *parameters], self.output_grads, allow_unused=True)
            self.input_grads[:] = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=False)]
            found = [(p.grad, g) for p, g in zip(parameters, grads[len(wanted) :], strict=True) if g is not None]
            torch._foreach_add_([into for into, _ in found], [g for _, g in found])

        self.forward = recorded(forward, device)
        self.output_grads[:] = [torch.zeros_like(x) for x in self.outputs if x.is_floating_point()]
        self.backward = recorded(backward, device)

    @torch.no_grad()
    def take(self, inputs: Sequence[Tensor]) -> None:
        for into, given in zip(self.inputs, inputs, strict=True):
            into.copy_(given)


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(*inputs)
        call.take(inputs)
        call.forward()
        outputs = tuple(x.clone() for x in call.outputs)
        ctx.mark_non_differentiable(*(x for x in outputs if not x.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        call.take(ctx.saved_tensors)
        floating = (g for g, x in zip(grads, call.outputs, strict=True) if x.is_floating_point())
        for into, given in zip(call.output_grads, floating, strict=True):
            into.copy_(given)
        call.backward()
        found = iter(call.input_grads)
        return None, *(next(found).clone() if x.requires_grad else None for x in call.inputs)


def recorded(work: Callable[[], None], device: str) -> Callable[[], None]:
    """``work`` as a CUDA graph, after some calls that compile and warm up."""
    work()
    if device != "cuda":
        return work
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
