"""Options that several commands share."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

BACKENDS = "auto, tensorrt, tensorrt-rtx, ort-cuda, ort-tensorrt, ort-cpu, torch, torch-compile (both also :cuda)."
Json = Annotated[bool, typer.Option("--json", help="The result on stdout as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no report, errors only.")]
MAX_THREADS = max(64, 4 * (os.cpu_count() or 1))  # of every graph: 1,024 took 40 s to start on two cores
Threads = Annotated[
    int | None,
    typer.Option(help="Threads for one operator.", min=1, max=MAX_THREADS, show_default="the backend's choice"),
]
Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint directory.", metavar="CKPT")]
Bundle = Annotated[Path, typer.Argument(help="A bundle directory.", metavar="BUNDLE")]


Temperature = Annotated[float, typer.Option(help="0 takes the most likely token; above, tokens are drawn.", min=0.0)]
TopK = Annotated[int | None, typer.Option(help="Draw from the k most likely tokens.", min=1, show_default="all")]
TopP = Annotated[
    float | None, typer.Option(help="Draw from the fewest tokens with this much probability.", show_default="all")
]
Seed = Annotated[int | None, typer.Option(help="Seed of the draw.", min=0, show_default="a fresh one")]


Recipe = Annotated[
    str | None, typer.Option(help="A recipe, by name or path; options typed here go before it.", show_default="none")
]


def check_outputs(*paths: Path | None) -> None:
    """Before the work: that the files it ends with can be written.

    Raises:
        UsageError, FamExportError: one cannot be.
    """
    from famexport.publish import check_output

    for path in paths:
        if path is not None:
            check_output(path)


def is_typed(context: typer.Context, parameter: str) -> bool:
    """Whether a parameter was given on the command line, not left at its default."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


class Dtype(str, Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Precision(str, Enum):
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"


class Graphs(str, Enum):
    block = "block"
    all = "all"


class Mode(str, Enum):
    block = "block"
    token = "token"  # noqa: S105 - no password


class Logits(str, Enum):
    all = "all"
    last = "last"


class Inputs(str, Enum):
    tokens = "tokens"
    inputs_embeds = "inputs_embeds"


class Engine(str, Enum):
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


class Attention(str, Enum):
    decomposable = "decomposable"
    fused = "fused"


class Hardware(str, Enum):
    none = "none"
    ampere_plus = "ampere-plus"
    same_compute_capability = "same-compute-capability"
