"""A module of your own, neither text nor transformer, exported, loaded and streamed like the built-in model.

It watches a sensor: frames of 6 readings come in blocks of 8, and each frame gets 2 scores. The last frames go into the
next block's convolution (``past_tail``), and a gated memory keeps what was seen (``past_memory``). A step gives new
tensors for its state and keeps nothing itself; zeros must be a good start.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor, nn

import famexport as fx
from famexport import TensorSpec as Spec

BLOCK, READINGS, SCORES, WIDTH, TAPS = 8, 6, 2, 32, 4


class SensorModel(nn.Module):
    contract = fx.StepContract(
        block_size=BLOCK,
        memory_segments=0,
        fam_length=0,
        vocab_size=SCORES,  # the width of what comes out
        batch=1,
        logits="all",
        inputs=(Spec("frames", "float32", (1, BLOCK, READINGS)),),
        states=(Spec("past_memory", "float32", (1, WIDTH)), Spec("past_tail", "float32", (1, TAPS - 1, READINGS))),
    )

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(READINGS, WIDTH, TAPS)
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, SCORES)

    def step(self, frames: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        seen, memory = torch.cat([state["past_tail"], frames], 1), state["past_memory"]
        x = torch.tanh(self.conv(seen.mT).mT)  # [1, BLOCK, WIDTH]
        keep = torch.sigmoid(self.gate(x.mean(1) - memory))
        new = {"past_memory": keep * memory + (1 - keep) * x.mean(1), "past_tail": seen[:, 1 - TAPS :]}
        return self.head(x + memory[:, None]), new


def main(out: str = "sensor-bundle") -> None:
    torch.manual_seed(0)
    parity = fx.export_bundle(SensorModel(), out).manifest.parity
    with fx.load(out) as session, session.stream() as stream:
        for frames in np.random.default_rng(0).standard_normal((100, 1, BLOCK, READINGS), np.float32):
            scores = stream.step(frames)
    worst, size = max(*parity["logits_error"], *parity["state_error"]), session.contract.state_bytes()
    print(f"{stream.blocks} blocks, scores {scores.shape}, state {size} bytes, differs from torch by {worst:.0e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
