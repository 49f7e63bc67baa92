"""The built-in model in PyTorch over a bundle's own weights: the reference that other backends are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from famexport.config import FamConfig
from famexport.contract import StepContract
from famexport.errors import BundleError, MissingDependencyError
from famexport.runtime.backend import STORAGE, Backend
from famexport.runtime.host import HostLoop
from famexport.tensorfile import read_header


class TorchCpu(Backend):
    """``FamModel.step``, eager, at the bundle's precision. The only backend that imports torch.

    Args:
        config: the model's configuration, from the manifest.
        weights: the bundle's weight file; its tensors stay memory-mapped.
    """

    name = "torch"
    provider = "torch"
    device = "cpu"

    def __init__(
        self, contract: StepContract, precision: str, config: FamConfig, weights: Path, threads: int | None = None
    ) -> None:
        super().__init__(contract, precision)
        try:
            import torch
            from safetensors import safe_open

            from famexport.model import FamModel
        except ImportError as exc:
            raise MissingDependencyError("torch", "export", "the backend torch") from exc
        if threads:
            torch.set_num_threads(threads)
        with torch.device("meta"):
            self.model = FamModel(config).eval()
        self.model.rope = type(self.model.rope)(config)  # tables are computed, so they must not be on "meta"
        missing = set(dict(self.model.named_parameters()))
        with safe_open(weights, framework="pt") as file:
            for name in read_header(weights):
                tensor = file.get_tensor(name)
                if name == "fam_init":
                    self.model.fam_init = tensor
                elif name in missing:
                    owner, _, leaf = name.rpartition(".")
                    setattr(self.model.get_submodule(owner), leaf, torch.nn.Parameter(tensor, requires_grad=False))
                    missing.remove(name)
                else:
                    raise BundleError(f"{weights.name} holds {name}, which the model does not have")
        unused = {"model.fam_embeddings.weight"}  # F_0 is folded
        if contract.inputs[0].name == "inputs_embeds" and not config.tie_word_embeddings:
            unused.add("model.embed_tokens.weight")
        if missing - unused:
            raise BundleError(f"{weights.name} lacks {', '.join(sorted(missing - unused))}")

    def _open(self, batch: int) -> TorchLoop:
        return TorchLoop(self, batch)


class TorchLoop(HostLoop):
    def __init__(self, backend: TorchCpu, batch: int) -> None:
        super().__init__(backend.contract, batch)
        import torch

        self._torch, self._model = torch, backend.model
        dtypes = {spec.name: getattr(torch, spec.dtype) for spec in self.contract.all_states}

        def view(name: str, array: np.ndarray) -> Any:
            return torch.from_numpy(array).view(dtypes[name]) if array.dtype == np.uint16 else torch.from_numpy(array)

        spec = self.contract.inputs[0]
        self._host = np.zeros(spec.sized(batch), STORAGE[spec.dtype])  # torch warns of arrays that are read-only
        self._fed = torch.from_numpy(self._host)
        self._views = [{n: view(n, a) for n, a in buffers.items()} for buffers in self.buffers]
        self._open_views = [{n: view(n, a) for n, a in buffers.items()} for buffers in self.open_buffers]

    def advance(self, fed: np.ndarray, out: np.ndarray) -> None:
        np.copyto(self._host, fed)
        with self._torch.inference_mode():
            logits, new = self._model.step(self._fed, self._past(), logits=self.contract.logits)
            self._keep(new)
            self._torch.from_numpy(out).copy_(logits)
        self._computed(True, False)

    def append(self, fed: np.ndarray, length: np.ndarray, out: np.ndarray) -> None:
        chunk, count = (self._torch.from_numpy(array.copy()) for array in (fed, length))
        with self._torch.inference_mode():
            logits, new = self._model.append(chunk, count, self._past(), logits=self.contract.logits)
            self._keep(new)
            self._torch.from_numpy(out).copy_(logits)
        self._computed(False, True)

    def end_block(self) -> None:
        with self._torch.inference_mode():
            self._keep(self._model.commit(self._past()))
        self._computed(True, True)

    def _past(self) -> dict[str, Any]:
        return {**self._views[self.current], **self._open_views[self.open_current]}

    def _keep(self, new: dict[str, Any]) -> None:
        present = {**self._views[1 - self.current], **self._open_views[1 - self.open_current]}
        for name, tensor in new.items():
            present[name].copy_(tensor)
