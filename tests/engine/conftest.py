"""Bundles with engines, and a trust store of the test's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def trust_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAMEXPORT_TRUST", str(tmp_path / "trust"))
    return tmp_path / "trust"


@pytest.fixture
def bundle(bundles: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the bundle of that name, to build into."""

    def get(name: str) -> Path:
        target = tmp_path / f"bundle-{name}"
        if not target.exists():
            shutil.copytree(bundles(name), target)
        return target

    return get
