"""The built-in model in PyTorch over a bundle's own weights: the reference that other backends are compared with, and,
compiled or on a GPU, the baseline that they are measured against.

Names: ``torch`` (eager, CPU) and ``torch-compile`` (``torch.compile``), each with options after a colon, as in
``torch-compile:cuda,max-autotune``. Options are part of the name, so that one benchmark can hold several of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from famexport.config import FamConfig
from famexport.contract import StepContract
from famexport.errors import BundleError, IncompatibleError, MissingDependencyError, UsageError
from famexport.runtime.backend import Backend
from famexport.runtime.torch_loop import TorchLoop
from famexport.tensorfile import read_header

OPTIONS = {"torch": ("cpu", "cuda", "tf32"), "torch-compile": ("cpu", "cuda", "tf32", "max-autotune")}


def parse_name(name: str) -> tuple[str, set[str]]:
    """``torch-compile:cuda,tf32`` as ("torch-compile", {"cuda", "tf32"}).

    Raises:
        UsageError: an option that this backend does not have.
    """
    base, colon, rest = name.partition(":")
    options = rest.split(",") if colon else []
    if unknown := [option for option in options if option not in OPTIONS[base]]:
        raise UsageError(f"{base} has no option {', '.join(map(repr, unknown))}; expected {', '.join(OPTIONS[base])}")
    if {"cpu", "cuda"} <= set(options) or ("tf32" in options and "cuda" not in options):
        raise UsageError(
            f"the options of {name} contradict each other; tf32 is one of cuda, and a device is named once"
        )
    return base, set(options)


class Torch(Backend):
    """``FamModel.step`` at the bundle's precision. The only backend that imports torch.

    Compiled for a GPU it is what a user of torch would pick: mode "reduce-overhead", which captures CUDA graphs, or
    "max-autotune", which also measures kernels while it compiles. TF32 is off unless the option says so; like the
    number of threads, that holds for the whole process.

    Args:
        config: the model's configuration, from the manifest.
        weights: the bundle's weight file; on the CPU its tensors stay memory-mapped.
        name: with options, as in ``parse_name``.
    """

    provider = "torch"

    def __init__(
        self,
        contract: StepContract,
        precision: str,
        config: FamConfig,
        weights: Path,
        threads: int | None = None,
        name: str = "torch",
    ) -> None:
        super().__init__(contract, precision)
        base, options = parse_name(name)
        self.name, self.device = name, "cuda" if "cuda" in options else "cpu"
        self.compiled = base == "torch-compile"
        try:
            import torch
        except ImportError as exc:
            raise MissingDependencyError("torch", "export", f"the backend {base}") from exc
        self.torch: Any = torch
        if self.device == "cuda":
            if not torch.cuda.is_available():
                raise IncompatibleError(f"torch {torch.__version__} sees no CUDA device; see nvidia-smi, or use {base}")
            torch.backends.cuda.matmul.allow_tf32 = "tf32" in options
        if threads:
            torch.set_num_threads(threads)
        self.model = model = load_model(contract, config, weights, self.device)

        def step(fed: Any, past: dict[str, Any]) -> Any:
            return _contiguous(model.step(fed, past, logits=contract.logits))

        def append(fed: Any, length: Any, past: dict[str, Any]) -> Any:
            return _contiguous(model.append(fed, length, past, logits=contract.logits))

        def commit(past: dict[str, Any]) -> Any:
            return _contiguous((None, model.commit(past)))

        self.calls: dict[str, Any] = {"step": step, "append": append, "commit": commit}
        if self.compiled:
            mode = None
            if self.device == "cuda":
                mode = "max-autotune" if "max-autotune" in options else "reduce-overhead"
            elif "max-autotune" in options:
                mode = "max-autotune-no-cudagraphs"
            self.calls = {
                graph: torch.compile(call, mode=mode, dynamic=False, fullgraph=True)
                for graph, call in self.calls.items()
            }

    def _open(self, batch: int) -> TorchLoop:
        return TorchLoop(self, batch)


def _contiguous(result: tuple[Any, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """So that all states are copied in one kernel; compiled, it is part of the one that computes them."""
    return result[0], {name: tensor.contiguous() for name, tensor in result[1].items()}


def load_model(contract: StepContract, config: FamConfig, weights: Path, device: str) -> Any:
    """``FamModel`` over a bundle's weight file, F_0 folded.

    Raises:
        BundleError: a weight is missing, or one too many.
    """
    import torch
    from safetensors import safe_open

    from famexport.model import FamModel

    with torch.device("meta"):
        model = FamModel(config).eval()
    model.rope = type(model.rope)(config).to(device)  # tables are computed, so they must not be on "meta"
    missing, names = set(dict(model.named_parameters())), read_header(weights)
    with safe_open(weights, framework="pt") as file:
        for name in names:
            tensor = file.get_tensor(name).to(device)
            if name == "fam_init":
                model.fam_init = tensor
            elif name in missing:
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(tensor, requires_grad=False))
                missing.remove(name)
            else:
                raise BundleError(f"{weights.name} holds {name}, which the model does not have")
    unused = {"model.fam_embeddings.weight"}  # F_0 is folded
    if contract.inputs[0].name == "inputs_embeds" and not config.tie_word_embeddings:
        unused.add("model.embed_tokens.weight")
    if missing - unused:
        raise BundleError(f"{weights.name} lacks {', '.join(sorted(missing - unused))}")
    return model
