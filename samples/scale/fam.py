"""A random checkpoint of a preset, its bundle, and a long stream through the public API."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import famexport as fx
from famexport.bundle import Bundle, is_bundle, open_bundle
from famexport.checkpoint import EMBED_WEIGHT, Checkpoint, parameter_shapes, random_weight, write_checkpoint
from famexport.config import FamConfig
from famexport.contract import ITEM_BYTES, PRECISION_DTYPE, contract_for
from famexport.export.pipeline import export_bundle
from famexport.tensorfile import TensorEntry
from samples.scale.meter import Phases, Stages, machine, memory, say, stream

PLACES = (Path("/dev/shm"), Path(tempfile.gettempdir()))  # noqa: S108 - in memory first
OTHER_BYTES = 200e6  # of a bundle: graphs, golden rollout
STD = 0.02
ON_CPU = ("ort-cpu", "torch", "torch-compile")
INPUTS = 16  # different blocks, in turn


def measure(config: FamConfig, options: argparse.Namespace) -> dict[str, Any]:
    """The report of one preset."""
    phases, device = Phases(), "cpu" if options.backend in ON_CPU else "cuda"
    report = {"mode": "fam", "preset": options.preset, "precision": options.precision, "config": config.to_dict()}
    report |= {"parameters": config.parameters, "backend": options.backend, "phases_s": phases.seconds}
    with ExitStack() as cleanup:
        if options.bundle and is_bundle(options.bundle):
            with phases("open"):
                bundle = open_bundle(options.bundle)
            if bundle.manifest.config != config.to_dict() or bundle.manifest.precision != options.precision:
                raise SystemExit(f"{options.bundle} holds another model or precision; give another path")
        else:
            bundle = export(config, options, phases, report, cleanup)
        parity = bundle.manifest.parity
        report["parity"] = {name: parity[name] for name in ("blocks", "tolerance", "logits_error", "state_error")}
        before = memory(device)
        with phases("load"):
            session = cleanup.enter_context(fx.load(bundle, backend=options.backend))
            streamed = cleanup.enter_context(session.stream())
        with phases("warm up"):
            getattr(streamed.loop, "warm_up", lambda: None)()
        report["loop"] = getattr(streamed.loop, "info", {})
        say(f"  {report['loop']}, state {session.contract.state_bytes()} bytes")
        random = np.random.default_rng(0)
        shape = (INPUTS, *session.contract.inputs[0].sized(1))
        tokens = random.integers(0, config.vocab_size, shape, dtype=np.int64)
        logits = np.empty(session.contract.outputs[0].sized(1), np.float32)
        with phases("stream"):
            measured = stream(
                lambda: streamed.step(tokens[streamed.blocks % INPUTS], logits),
                blocks=options.blocks,
                block_size=config.block_size,
                lengths=options.lengths,
                device=device,
            )
        assert np.isfinite(logits).all()
    free = {at.get("free_bytes") for at in (*measured["at_block"].values(), *measured["at_tokens"])}
    report |= {"constant_to_the_byte": len(free) == 1 if device == "cuda" else None}
    return report | {"state_bytes": session.contract.state_bytes(), "before_load": before} | measured | machine(device)


def export(
    config: FamConfig, options: argparse.Namespace, phases: Phases, report: dict[str, Any], cleanup: ExitStack
) -> Bundle:
    """Make the checkpoint, export it, remove it. The bundle goes when ``cleanup`` closes, unless it is to be kept."""
    dtype = PRECISION_DTYPE[options.precision]
    spooled = contract_for(config, options.precision).state_bytes() * options.parity_blocks
    needed = int(config.parameters * ITEM_BYTES[dtype] + spooled + OTHER_BYTES)
    places = options.dir or PLACES
    for place in options.dir or ():
        place.mkdir(parents=True, exist_ok=True)
    home = options.bundle.absolute().parent if options.bundle else with_room(places, needed)
    if home is None:
        raise SystemExit(f"no room for a bundle of {needed / 1e9:.1f} GB: {rooms(places)}; give a --dir")
    home.mkdir(parents=True, exist_ok=True)
    other = None if options.unwritten else with_room(places, needed, beside=home)
    say(f"{config.parameters / 1e9:.2f}e9 parameters, {needed / 1e9:.1f} GB; {rooms([*places, home])}")
    say(f"checkpoint in {other or 'no file: weights are made when they are asked for'}, bundle in {home}")
    if other is None and not options.unwritten:
        say("  (a checkpoint beside the bundle has no room)")
    report["checkpoint"] = "written" if other else "unwritten"

    def folder(parent: Path) -> Path:
        made = Path(tempfile.mkdtemp(dir=parent, prefix="famexport-"))
        cleanup.callback(shutil.rmtree, made, ignore_errors=True)
        return made

    where = folder(other or home)
    with phases("checkpoint"):
        make = maker(config, getattr(torch, dtype), "cuda" if torch.cuda.is_available() else "cpu")
        checkpoint: Path | Checkpoint = unwritten(where, config, dtype, make)
        if other:
            stages = Stages()
            checkpoint = write_checkpoint(
                where / "checkpoint",
                config,
                {EMBED_WEIGHT: dtype},
                make,
                fam_trained=False,
                progress=lambda done, total: stages("checkpoint", done, total),
            )
    with phases("export"):
        stages = Stages()
        bundle = export_bundle(
            checkpoint,
            options.bundle or folder(home) / "bundle",
            precision=options.precision,
            logits="last",
            parity_blocks=options.parity_blocks,
            progress=stages,
        )
    report["export_s"] = stages.seconds
    shutil.rmtree(where)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return bundle


def with_room(places: Sequence[Path], needed: int, beside: Path | None = None) -> Path | None:
    """The first place with ``needed`` bytes free, ``beside`` having so many spoken for; None where there is none."""
    for place in places:
        taken = needed if beside and os.stat(place).st_dev == os.stat(beside).st_dev else 0
        if shutil.disk_usage(place).free - taken > needed:
            return place
    return None


def rooms(places: Sequence[Path]) -> str:
    return ", ".join(
        f"{place} has {shutil.disk_usage(place).free / 1e9:.1f} GB free" for place in dict.fromkeys(places)
    )


def maker(config: FamConfig, dtype: torch.dtype, device: str) -> Callable[[str], Tensor]:
    """Gives a weight by its name, always the same: that of ``random_weight``, or where there is a GPU one like it, made
    there. A CPU makes some 2e8 values a second."""
    shapes, ends = parameter_shapes(config), ("o_proj.weight", "down_proj.weight")

    def make(name: str) -> Tensor:
        shape = shapes[name]
        if device == "cpu" or len(shape) == 1:
            return random_weight(name, shape, 0, config.num_hidden_layers).to(dtype)
        random = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        std = STD / math.sqrt(2 * config.num_hidden_layers) if name.endswith(ends) else STD
        made = torch.empty(shape, dtype=dtype, device=device).normal_(std=std, generator=random)
        return torch.empty(shape, dtype=dtype, pin_memory=True).copy_(made)  # torch keeps pinned memory for the next

    return make


@dataclass(frozen=True)
class Unwritten(Checkpoint):
    """A checkpoint in no file: a weight is made anew whenever it is asked for."""

    make: Callable[[str], Tensor]

    def tensor(self, name: str) -> Tensor:
        return self.make(name)


def unwritten(folder: Path, config: FamConfig, dtype: str, make: Callable[[str], Tensor]) -> Unwritten:
    """
    Args:
        folder: an empty one, which has no tokenizer.
    """
    tensors = {name: TensorEntry(name, dtype, shape) for name, shape in parameter_shapes(config).items()}
    return Unwritten(folder, config, False, tensors, {}, make)
