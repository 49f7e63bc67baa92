"""Exports shared by the tests: each case is traced once in a session, when a test first asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from famexport.contract import GraphIO
from famexport.export import pipeline
from famexport.export.pipeline import export_bundle
from tests.export.helpers import CASES, Export, config_of, random_weights, save


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only cost time at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _shared_traces() -> Iterator[None]:
    """Checkpoints of one configuration share a trace, which reads no weight. Each export gets a copy of its own."""
    real, made = pipeline.trace_step, {}

    def trace_step(module: Any, step: Any, io: GraphIO, opset: int, device: str = "meta") -> Any:
        if device != "meta":  # a module of one's own
            return real(module, step, io, opset, device)
        # A chunk of one position has the same form whichever logits are asked for: such exports share a trace as well.
        key = (str(module.config), repr(io), opset, io.name)
        if key not in made:
            made[key] = real(module, step, io, opset, device)
        return made[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "trace_step", trace_step)
        yield


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Export]:
    """The export of a case in ``CASES``. Parity over 2 blocks only: the tests compare over more, on their own."""
    made: dict[str, Export] = {}

    def get(name: str) -> Export:
        if name not in made:
            case, config, reports = CASES[name], config_of(name), []
            folder = tmp_path_factory.mktemp(name)
            weights = random_weights(config, case.seed, case.peak)
            checkpoint = save(folder / "checkpoint", config, weights)
            bundle = export_bundle(
                checkpoint,
                folder / "bundle",
                parity_blocks=2,
                progress=lambda *report: reports.append(report),
                **case.options,
            )
            made[name] = Export(case, config, weights, checkpoint, bundle, reports)
        return made[name]

    return get
