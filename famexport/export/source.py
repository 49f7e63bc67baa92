"""What is exported: a checkpoint, whose weights stay on disk, or a module of the user's own that keeps the contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from famexport.checkpoint import Checkpoint, tensor_bytes
from famexport.config import FamConfig
from famexport.contract import ITEM_BYTES, PRECISION_DTYPE, StepContract
from famexport.errors import ContractError, NumericError, UsageError, raise_problems
from famexport.export.trace import Step
from famexport.model import FamModel, State
from famexport.rotary import Rope
from famexport.tensorfile import TensorEntry

FAM_INIT = "fam_init"
INLINE_BYTES = 1024  # smaller tensors stay inside the graph
RESIDENT_BYTES = 2**31  # float32 references up to this size are kept in memory whole

Reference = Callable[[Tensor, State], tuple[Tensor, State]]


@dataclass(frozen=True)
class Source:
    """A step ready to be traced, and where its weights come from.

    Args:
        steps: what each graph of the contract traces, by kind (``append_step`` for every chunk).
        weights: every tensor that may go to the weight file, in the dtype it gets there.
        load: a weight's bytes, in that dtype.
        constants: small tensors whose values are known now, by the name they have in the module.
        reference: builds the float32 step that the export is compared with.
        model: builds the float32 model itself; None for a module.
        layers: of a checkpoint; 0 for a module, whose layers are its own affair.
        cut: the same model with so many of its first layers only; None where that cannot be had.
    """

    module: nn.Module
    steps: Mapping[str, Step]
    contract: StepContract
    device: str
    weights: Mapping[str, TensorEntry]
    load: Callable[[str], Any]
    reference: Callable[[], Reference]
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    fam_trained: bool | None = None
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)
    cost: dict[str, int] = field(default_factory=dict)
    model: Callable[[], FamModel] | None = None
    layers: int = 0
    cut: Callable[[int], Source] | None = None


def checkpoint_source(
    checkpoint: Checkpoint,
    precision: str,
    batch: int | str,
    *,
    inputs: str = "tokens",
    logits: str = "all",
    chunks: tuple[int, ...] = (),
) -> Source:
    """A checkpoint at a precision. Nothing but F_0's computation reads a weight before it is written."""
    config = checkpoint.config
    dtype = getattr(torch, PRECISION_DTYPE[precision])
    with torch.device("meta"):
        module = FamModel(config).to(dtype).eval()
    module.rope = module.rope.float()
    if config.fam_length:
        shape = (config.num_hidden_layers, config.fam_length, config.hidden_size)
        module.fam_init = torch.empty(shape, device="meta")
    contract = module.contract(precision, batch, inputs=inputs, logits=logits, chunks=chunks)
    weights = {n: TensorEntry(n, PRECISION_DTYPE[precision], tuple(p.shape)) for n, p in module.named_parameters()}
    if config.fam_length:
        weights[FAM_INIT] = TensorEntry(
            FAM_INIT, "float32", (config.num_hidden_layers, config.fam_length, config.hidden_size)
        )
    models: list[FamModel] = []  # built when first needed, then shared by F_0 and the parity check

    def reference_model() -> FamModel:
        if not models:
            models.append(float32_model(checkpoint))
        return models[0]

    def load(name: str) -> Any:
        if name == FAM_INIT:
            return tensor_bytes(reference_model().get_buffer(FAM_INIT))
        return tensor_bytes(_cast(name, checkpoint.tensor(name), dtype))

    def cut(layers: int) -> Source:
        first = replace(checkpoint, config=replace(config, num_hidden_layers=layers))
        return checkpoint_source(first, precision, batch, inputs=inputs, logits=logits, chunks=chunks)

    table = Rope(config).named_buffers()
    return Source(
        module=module,
        steps={
            "block_step": lambda fed, state: module.step(fed, state, logits=logits),
            "append_step": lambda fed, length, state: module.append(fed, length, state, logits=logits),
            "commit_block": module.commit,
        },
        contract=contract,
        device="meta",
        weights=weights,
        load=load,
        reference=lambda: lambda fed, state: reference_model().step(fed, state, logits=logits),
        constants={f"rope.{name}": buffer.numpy() for name, buffer in table},
        config=config.to_dict(),
        fam_trained=checkpoint.fam_trained if config.fam_length else None,
        tokenizer=checkpoint.tokenizer_files(),
        cost=_cost(config, ITEM_BYTES[PRECISION_DTYPE[precision]], logits),
        model=reference_model,
        layers=config.num_hidden_layers,
        cut=cut,
    )


def module_source(module: nn.Module) -> Source:
    """A user's own module: ``step(tokens, state) -> (logits, state)`` and ``contract``, a StepContract or a function.

    Raises:
        ContractError: the module lacks one of the two.
    """
    contract = getattr(module, "contract", None)
    contract = contract() if callable(contract) else contract
    step = getattr(module, "step", None)
    if not isinstance(contract, StepContract) or not callable(step):
        raise ContractError(
            f"{type(module).__name__} needs a method step(tokens, state) -> (logits, state) and a StepContract "
            "named contract; samples/own_module.py shows one"
        )
    if contract.graphs != ("block_step",):
        raise ContractError(f"{type(module).__name__}: a module has one graph, block_step; got {list(contract.graphs)}")
    fed = contract.inputs[0]
    if len(contract.inputs) != 1 or fed.dtype not in ("int64", "float32"):
        wanted = "one input is supported, int64 ids or float32 rows"
        raise ContractError(f"{type(module).__name__}: {wanted}; got {'; '.join(map(str, contract.inputs))}")
    module = module.eval()
    if isinstance(module, FamModel):
        module.fold_fam()
    tensors = {
        **dict(module.named_parameters(remove_duplicate=False)),  # tracing may choose any name of a shared weight
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    on_meta = [name for name, tensor in tensors.items() if tensor.device.type != "cpu"]
    if on_meta:
        raise UsageError(f"export needs a module on the CPU, got {on_meta[0]} on {tensors[on_meta[0]].device}")
    dtypes = {n: str(t.dtype).removeprefix("torch.") for n, t in tensors.items()}
    odd = [
        f"{n} is {dtype}, expected one of {', '.join(ITEM_BYTES)}"
        for n, dtype in dtypes.items()
        if dtype not in ITEM_BYTES
    ]
    raise_problems(ContractError, type(module).__name__, odd)
    # numpy has no bfloat16, so such a tensor is never a constant
    large = {n: t for n, t in tensors.items() if t.nbytes >= INLINE_BYTES or t.dtype == torch.bfloat16}
    return Source(
        module=module,
        steps={"block_step": step},
        contract=contract,
        device="cpu",
        weights={n: TensorEntry(n, dtypes[n], tuple(t.shape)) for n, t in large.items()},
        load=lambda name: tensor_bytes(large[name]),
        reference=lambda: _own_reference(step, contract),
        constants={n: t.detach().numpy() for n, t in tensors.items() if n not in large},
        config=module.config.to_dict() if isinstance(module, FamModel) else None,
        fam_trained=True if isinstance(module, FamModel) and module.config.fam_length else None,
        cost={"parameters": sum(p.numel() for p in module.parameters())},
    )


def _own_reference(step: Step, contract: StepContract) -> Reference:
    """The user's own step, its state in the contract's dtypes as on the device; what it gives is widened for numpy."""
    dtypes = {spec.name: getattr(torch, spec.dtype) for spec in contract.states}

    def reference(fed: Tensor, state: State) -> tuple[Tensor, State]:
        logits, new = step(fed, {name: tensor.to(dtypes[name]) for name, tensor in state.items()})
        return logits, {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in new.items()}

    return reference


def float32_model(checkpoint: Checkpoint) -> FamModel:
    """The checkpoint in float32, F_0 folded. Where it is large, a layer's weights are in memory only while it runs."""
    config = checkpoint.config
    with torch.device("meta"):
        model = FamModel(config).eval()
    model.rope = Rope(config)
    streamed, buffers = config.parameters * 4 > RESIDENT_BYTES, dict[str, Tensor]()
    for owner_name, owner in model.named_modules():
        names = [leaf for leaf, _ in owner.named_parameters(recurse=False)]
        if not names:
            continue
        resident = owner_name == "model.fam_embeddings" or (
            config.tie_word_embeddings and owner_name.endswith("tokens")
        )
        if streamed and not resident:  # the resident ones are read as weights, not called
            reused = buffers if owner_name.startswith("model.layers.") else None  # vocabularies are too large to keep
            fill = _filler(checkpoint, owner_name, names, reused)
            owner.register_forward_pre_hook(lambda module, _, fill=fill: fill(module))
            owner.register_forward_hook(lambda module, _, out, names=names: _drop(module, names))
        else:
            _filler(checkpoint, owner_name, names)(owner)
    model.fold_fam()
    return model


def _cost(config: FamConfig, item_bytes: int, logits: str) -> dict[str, int]:
    """What one row's block step needs at least. An input table that is not also the head is hardly read."""
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    read = config.parameters - looked_up - config.fam_length * config.hidden_size
    return {
        "parameters": config.parameters,
        "flops_per_block": config.block_flops(logits=logits),
        "weight_bytes_read": read * item_bytes,
    }


def _filler(
    checkpoint: Checkpoint, owner: str, names: list[str], buffers: dict[str, Tensor] | None = None
) -> Callable[[nn.Module], None]:
    """What gives a module its weights in float32; with ``buffers``, until another module is given its own."""

    def fill(module: nn.Module) -> None:
        for leaf in names:
            tensor = checkpoint.tensor(f"{owner}.{leaf}")
            wide = tensor.float() if buffers is None else _widened(tensor, leaf, buffers)
            setattr(module, leaf, nn.Parameter(wide, requires_grad=False))

    return fill


def _widened(tensor: Tensor, leaf: str, buffers: dict[str, Tensor]) -> Tensor:
    """``tensor`` in float32, in the buffer of its leaf's name: the system clears every page of a fresh one, which takes
    longer than the widening."""
    if tensor.dtype == torch.float32:
        return tensor
    if leaf not in buffers or buffers[leaf].numel() < tensor.numel():
        buffers[leaf] = torch.empty(tensor.numel())
    return buffers[leaf][: tensor.numel()].view(tensor.shape).copy_(tensor)


def _drop(module: nn.Module, names: list[str]) -> None:
    for leaf in names:
        setattr(module, leaf, nn.Parameter(getattr(module, leaf).to("meta"), requires_grad=False))


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if not _finite(cast):
        if dtype == torch.float16 and tensor.dtype != dtype and _finite(tensor):
            raise NumericError(
                f"{name} does not fit float16 (largest magnitude {tensor.abs().max():.3g}); use bf16 or fp32"
            )
        raise NumericError(f"{name} holds NaN or infinity; the checkpoint is damaged or diverged in training")
    return cast


def _finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, in one pass: ``isfinite`` would make several copies of it."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())  # NaN is both
