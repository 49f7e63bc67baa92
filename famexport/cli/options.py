"""Options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="The result on stdout as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no report, errors only.")]
Threads = Annotated[
    int | None, typer.Option(help="Threads for one operator.", min=1, show_default="the backend's choice")
]
Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint directory.", metavar="CKPT")]
Bundle = Annotated[Path, typer.Argument(help="A bundle directory.", metavar="BUNDLE")]


class Dtype(str, Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Precision(str, Enum):
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class Logits(str, Enum):
    all = "all"
    last = "last"


class Inputs(str, Enum):
    tokens = "tokens"
    inputs_embeds = "inputs_embeds"
