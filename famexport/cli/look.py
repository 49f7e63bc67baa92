"""Commands that look: inspect, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from famexport.cli import options as opt
from famexport.cli.output import out, print_facts, print_json, size


def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint, a bundle, an .onnx, a .safetensors or a .plan file.")],
    json: opt.Json = False,
) -> None:
    """Say what a path is, what it needs, and whether it can run here."""
    from famexport.inspection import inspect as look

    facts = look(path)
    if json:
        print_json({"path": str(path), **facts})
    else:
        print_facts(str(path), facts)


def doctor(json: opt.Json = False) -> None:
    """Say what this machine has, which backends work, and the command that adds what is missing."""
    from famexport.doctor import examine

    found = examine()
    if json:
        print_json(found)
        return
    device = found["device"]
    out.print(
        f"{device['processor']}, {device['cores']} cores, {size(device['memory_bytes'])}, {device['system']}, "
        f"Python {device['python']}",
        markup=False,
    )
    command = Column("to add it", no_wrap=True)  # it is there to be copied
    table = Table(
        Column("backend", no_wrap=True), Column("works", no_wrap=True), Column("detail", overflow="fold"), command
    )
    for backend in found["backends"]:
        table.add_row(backend["backend"], "yes" if backend["works"] else "no", backend["detail"], backend["add"] or "")
    out.print(table)
    table = Table("package", "version", "for", command.copy())
    for package in found["packages"]:
        table.add_row(package["package"], package["version"] or "-", package["purpose"], package["add"] or "")
    out.print(table)
