"""Tiny models, and the bundles made of them: each is exported once in a session, the first time a test asks for it."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from famexport.config import FamConfig, preset

PARITY_BLOCKS = 9  # at least golden's 8; the exporter's own tests go further
TEXT = "a stone falls into the water and the ring grows until it meets the shore "

# name -> (changes to the preset "tiny", options of the export)
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "rows": ({}, {"batch": 3}),
    "dynamic": ({"num_hidden_layers": 1}, {"batch": "dynamic"}),
    "text": ({"num_hidden_layers": 1}, {}),  # the one with a tokenizer
    "embeds": ({"num_hidden_layers": 1}, {"inputs": "inputs_embeds"}),
    "last": ({"num_hidden_layers": 1}, {"logits": "last"}),
    "no_fam": ({"num_hidden_layers": 1, "fam_length": 0}, {}),
    "no_memory": ({"num_hidden_layers": 1, "memory_segments": 0}, {}),
    "fp16": ({"num_hidden_layers": 1}, {"precision": "fp16"}),
    "bf16": ({"num_hidden_layers": 1}, {"precision": "bf16"}),
    # with append_step and commit_block
    "all": ({}, {"graphs": "all", "chunks": (1, 3)}),
    "all_rows": ({}, {"graphs": "all", "chunks": (1, 3), "batch": 3}),
    "all_dynamic": ({"num_hidden_layers": 1}, {"graphs": "all", "batch": "dynamic"}),
    "all_embeds": ({"num_hidden_layers": 1}, {"graphs": "all", "inputs": "inputs_embeds", "batch": "dynamic"}),
    "all_bf16": ({"num_hidden_layers": 1}, {"graphs": "all", "chunks": (3,), "precision": "bf16"}),
    "all_last": ({"num_hidden_layers": 1}, {"graphs": "all", "chunks": (1, 3), "logits": "last"}),
}


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell starts what it puts into the background with Ctrl-C ignored, and Python leaves it at that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def tiny_tokenizer() -> bytes:
    """A word-level ``tokenizer.json``; words it does not know are ``<unk>``."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", *sorted(set(TEXT.split()))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    text: str = tokenizer.to_str()
    return text.encode()


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Path]:
    def make(target: Path, config: FamConfig, *, tokenizer: bytes | None = None, seed: int = 0) -> Path:
        """Random weights large enough that memory and FAM change the logits, which those of ``init`` hardly do."""
        import torch

        from famexport.checkpoint import EMBED_WEIGHT, parameter_shapes, write_checkpoint

        shapes = parameter_shapes(config)

        def weight(name: str) -> Any:
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            random = np.random.default_rng(list(digest)).standard_normal(shapes[name])
            scaled = random * 1.5 / np.sqrt(shapes[name][-1]) if random.ndim > 1 else 1 + 0.1 * random
            if name == EMBED_WEIGHT:
                scaled = random
            return torch.from_numpy(scaled.astype(np.float32))

        extra = {"tokenizer.json": tokenizer} if tokenizer else None
        return write_checkpoint(target, config, {EMBED_WEIGHT: "float32"}, weight, fam_trained=True, extra=extra)

    return make


@pytest.fixture(scope="session")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]
) -> Callable[[str], Path]:
    """The path of the checkpoint that the bundle of that name is made of. Do not change what is there."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            tokenizer = tiny_tokenizer() if name == "text" else None
            target = tmp_path_factory.mktemp("checkpoints") / name
            made[name] = make_checkpoint(target, preset("tiny", **MODELS[name][0]), tokenizer=tokenizer)
        return made[name]

    return get


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[[str], Path]) -> Callable[[str], Path]:
    """The path of the bundle ``name`` (a key of ``MODELS``). Do not change what is there: copy it first."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            import torch

            from famexport.export.pipeline import export_bundle

            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # threads only cost time at these sizes
            try:
                target = tmp_path_factory.mktemp("bundles") / name
                export_bundle(checkpoints(name), target, parity_blocks=PARITY_BLOCKS, **MODELS[name][1])
            finally:
                torch.set_num_threads(threads)
            made[name] = target
        return made[name]

    return get


@pytest.fixture(scope="session")
def sessions(bundles: Callable[[str], Path]) -> Iterator[Callable[..., Any]]:
    """A loaded session over the bundle ``name``, one thread, shared by all tests: open streams on it, do not close it."""
    import famexport as fx

    made: dict[tuple[str, str], Any] = {}

    def get(name: str, backend: str = "ort-cpu") -> Any:
        if (name, backend) not in made:
            made[name, backend] = fx.load(bundles(name), backend, threads=1)
        return made[name, backend]

    yield get
    for session in made.values():
        session.close()


@pytest.fixture(scope="session")
def kernels_for_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of operators, built for the CPU: the same source, and the same maths where it is not a CUDA kernel."""
    from famexport.kernels.build import build

    return build(tmp_path_factory.mktemp("kernels"), cuda=False)
