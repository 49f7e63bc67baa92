"""The sample exports, streams, prints one line, and is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import famexport as fx
from samples import own_module


def test_it_exports_streams_and_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_module.main(str(tmp_path / "sensor"))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("100 blocks, scores (1, 8, 2), state 200 bytes, differs from torch by ")

    bundle = fx.open_bundle(tmp_path / "sensor")
    assert bundle.contract == own_module.SensorModel.contract
    assert bundle.manifest.parity["blocks"] == 256
    torch.manual_seed(0)
    model = own_module.SensorModel().eval()
    state = {spec.name: torch.zeros([int(n) for n in spec.shape]) for spec in model.contract.states}
    rng, outputs = np.random.default_rng(5), []
    with fx.load(bundle, threads=1) as session, session.stream() as stream, session.stream() as other:
        for block in range(40):
            frames = rng.standard_normal((1, 8, 6), np.float32)
            with torch.no_grad():
                wanted, state = model.step(torch.from_numpy(frames), state)
            outputs.append(stream.step(frames))
            assert np.allclose(outputs[-1], wanted.numpy(), atol=1e-5), block
            other.step(frames + 1)
        for name, array in stream.state().items():
            assert np.allclose(array, state[name].numpy(), atol=1e-5), name
        last = outputs[-1]
        assert not np.allclose(other.step(frames), last, atol=1e-2)  # the state matters
    source = Path(own_module.__file__).read_text()
    assert len(source.splitlines()) < 60
