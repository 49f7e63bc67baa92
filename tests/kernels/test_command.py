"""``famexport kernels``, and what ``famexport doctor`` and ``bench`` say of the kernels."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from famexport import doctor
from famexport.cli import _run
from famexport.kernels.build import COMMAND, LIBRARY, RECORD
from famexport.kernels.library import FOLDER, find
from tests.kernels.fake_nvcc import FAILS, MAKES, script
from tests.runtime.fake_cuda import FakeCuda

Nvcc = Callable[[str], Path]
Says = Callable[..., tuple[str, str]]


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Says:
    """Runs a command that must end with ``code``: its stdout and stderr."""

    def run(*arguments: object, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        got = _run([str(argument) for argument in arguments], False)
        out, err = capsys.readouterr()
        assert got == code, err
        return out, err

    return run


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where kernels are looked for, and no nvcc but what a test puts there."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/bin")
    monkeypatch.setenv(FOLDER, str(tmp_path / "built"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "built"


@pytest.fixture
def nvcc(tmp_path: Path) -> Nvcc:
    return lambda text: script(tmp_path / "bin", text)


def test_it_builds_where_kernels_are_looked_for(
    says: Says, place: Path, nvcc: Nvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc(MAKES)
    out, err = says("kernels")
    assert out.startswith(f"{place / LIBRARY}: ")
    assert out.endswith(" B, for native\n")
    assert (out.count("\n"), err) == (1, "")
    assert find() == place / LIBRARY
    out, err = says("kernels", "--arch", "sm_87", "--json")
    assert json.loads(out) == {
        "library": str(place / LIBRARY),
        "bytes": (place / LIBRARY).stat().st_size,
        "arch": "sm_87",
    }
    assert "-arch=sm_87" in (place / LIBRARY).read_text()
    assert says("kernels", "--quiet") == ("", "")
    assert says("kernels", "--out", "built")[0].count("\n") == 1  # the same folder needs no hint
    monkeypatch.setenv(FOLDER, "built")
    assert says("kernels", "--out", place)[0].count("\n") == 1


def test_it_says_how_another_folder_is_used(
    says: Says, place: Path, nvcc: Nvcc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc(MAKES)
    _, hint = says("kernels", "--out", "my kernels")[0].splitlines()
    assert hint == f"to have it used: export {FOLDER}='{tmp_path / 'my kernels'}'"
    assert find() is None
    monkeypatch.setenv(FOLDER, str(tmp_path / "my kernels"))
    assert find() == tmp_path / "my kernels" / LIBRARY


def test_errors_are_one_line(says: Says, place: Path, nvcc: Nvcc) -> None:
    out, without = says("kernels", code=5)
    assert "needs nvcc" in without
    nvcc(FAILS)
    more, failed = says("kernels", "--json", code=1)
    assert "nvcc cannot compile the kernels (exit code 2): attention.h(1): error: line 1 attention.h(2)" in failed
    place.mkdir()
    place.chmod(0o777)
    less, unsafe = says("kernels", code=4)
    assert "others may write" in unsafe
    assert out == more == less == ""
    for err in (without, failed, unsafe):
        assert err.startswith("error: ")
        assert err.count("\n") == 1


# doctor


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device, and an onnxruntime that has a provider for it."""
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    runtime = SimpleNamespace(__version__="1.31.1", get_available_providers=lambda: providers)
    monkeypatch.setattr(doctor, "Cuda", FakeCuda)
    monkeypatch.setattr(doctor, "import_onnxruntime", lambda: runtime)


def row(says: Says) -> tuple[bool, str, str | None]:
    """What doctor has of ort-cuda: works, detail, what adds it; and the table says the same."""
    found = json.loads(says("doctor", "--json")[0])
    (mine,) = (backend for backend in found["backends"] if backend["backend"] == "ort-cuda")
    (line,) = (line for line in says("doctor")[0].splitlines() if line.startswith("│ ort-cuda"))
    assert (COMMAND in line) == (mine["add"] == COMMAND)
    return mine["works"], mine["detail"], mine["add"]


def test_doctor_says_whether_kernels_are_built(says: Says, place: Path, nvcc: Nvcc, gpu: None) -> None:
    assert row(says) == (True, "onnxruntime 1.31.1; kernels not built, slower without", COMMAND)
    nvcc(MAKES)
    says(*COMMAND.split()[1:])
    assert row(says) == (True, "onnxruntime 1.31.1; kernels built", None)


def test_doctor_names_kernels_of_another_version(
    says: Says, place: Path, nvcc: Nvcc, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ort-cuda runs without them."""
    nvcc(MAKES)
    says("kernels")
    monkeypatch.setattr("famexport.kernels.library.source_hash", lambda: "0" * 64)
    works, detail, add = row(says)
    assert (works, add) == (True, COMMAND)
    assert detail.endswith("were built from another version of famexport")


@pytest.mark.parametrize("harm", ["changed", "open", "no record", "nonsense"])
def test_doctor_says_that_a_library_is_not_trusted(says: Says, place: Path, nvcc: Nvcc, gpu: None, harm: str) -> None:
    """ort-cuda refuses to load with it."""
    nvcc(MAKES)
    says("kernels")
    if harm == "open":
        place.chmod(0o777)
    elif harm == "no record":
        (place / RECORD).unlink()
    else:
        (place / {"changed": LIBRARY, "nonsense": RECORD}[harm]).write_text("[")
    works, detail, add = row(says)
    assert (works, add) == (False, COMMAND)
    assert {"changed": "is not what was built", "open": "others may write"}.get(harm, "does not say what") in detail


def test_doctor_says_it_where_ort_cuda_does_not_work_and_asks_for_none(says: Says, place: Path, nvcc: Nvcc) -> None:
    """They can be compiled on a machine that has no GPU (``--arch``)."""
    works, detail, add = row(says)
    assert (works, add) == (False, "pip install 'famexport[gpu]'")
    assert detail.endswith(" has no CUDA provider; kernels not built, slower without")
    nvcc(MAKES)
    says("kernels", "--arch", "sm_87")
    assert row(says)[1].endswith(" has no CUDA provider; kernels built")
