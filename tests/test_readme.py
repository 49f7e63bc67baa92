"""What the README says to type runs as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(start: str) -> list[str]:
    """The code blocks of the README that begin with ``start``, fence and all, without their fences."""
    found = re.findall(r"^```\w*\n.*?^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    return [block.partition("\n")[2].removesuffix("```") for block in found if block.startswith(start)]


@pytest.mark.slow
def test_the_random_checkpoint_and_the_script(tmp_path: Path) -> None:
    """Word for word, one after the other: the script exports the checkpoint that ``init`` made."""
    (commands,) = blocks("```\nfamexport init ")
    (script,) = blocks("```python")
    famexport = tmp_path / "bin" / "famexport"
    famexport.parent.mkdir()
    famexport.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m famexport "$@"\n')
    famexport.chmod(0o755)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{famexport.parent}{os.pathsep}{os.environ['PATH']}"}
    for words in (["sh", "-ec", commands], [sys.executable, "-c", script]):
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "BUNDLE" / "append_step.onnx").is_file()


def test_the_extras_it_names_are_there() -> None:
    declared = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    known = set(re.findall(r"^(\w+) = ", declared, re.M))
    for page in ("README.md", "docs/jetson.md"):
        text = (ROOT / page).read_text()
        named = {extra for group in re.findall(r"'(?:\.|famexport)\[([\w,]+)\]'", text) for extra in group.split(",")}
        assert {"cpu", "text"} <= named <= known, page
        assert text.count("pip install 'famexport[") <= 1, page  # there is no package index to have it from
