"""What a build of the kernels leaves, and what is checked before a library is loaded."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from famexport.errors import FamExportError, IncompatibleError, UntrustedError
from famexport.kernels import build as builder
from famexport.kernels.build import COMMAND, LIBRARY, RECORD, build, file_hash, source_hash
from famexport.kernels.library import FOLDER, find, folder
from tests.kernels.fake_nvcc import FAILS, MAKES, RELEASE, SEES_NO_GPU, SEES_NO_GPU_LATE, script


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts an nvcc of that text in front on the PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return lambda text: script(tmp_path / "bin", text)


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where kernels are looked for; not there yet."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "deep" / "built"))
    return folder()


@pytest.fixture
def built(out: Path, nvcc: Callable[[str], Path]) -> Path:
    """That folder, with a "CUDA" build in it."""
    nvcc(MAKES)
    build(out)
    return out


def rewrite(built: Path, **changes: Any) -> None:
    record = json.loads((built / RECORD).read_text())
    (built / RECORD).write_text(json.dumps({**record, **changes}))


def contents(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir()}


# build


def test_a_build_is_a_library_and_a_record_of_it(built: Path) -> None:
    assert find() == built / LIBRARY
    assert set(contents(built)) == {LIBRARY, RECORD}  # nothing temporary
    assert json.loads((built / RECORD).read_text()) == {
        "source": source_hash(),
        "library": file_hash(built / LIBRARY),
        "compiler": RELEASE,
        "cuda": True,
        "arch": "native",
    }
    said = (built / LIBRARY).read_text().split()
    assert {"-arch=native", "-shared"} <= set(said)
    build(built, arch="sm_87")
    assert "-arch=sm_87" in (built / LIBRARY).read_text()
    assert find() == built / LIBRARY


def test_the_source_is_all_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "csrc"
    place.mkdir()
    monkeypatch.setattr(builder, "SOURCE", place)
    hashes = [source_hash()]
    for name, text in (("a.h", "int a;"), ("a.h", "int b;"), ("b.h", ""), ("b.h", "int"), ("a.h", "")):
        (place / name).write_text(text)
        hashes.append(source_hash())
    assert len(set(hashes)) == 6


def test_a_failed_compile_leaves_the_earlier_build(built: Path, nvcc: Callable[[str], Path]) -> None:
    before = contents(built)
    nvcc(FAILS)
    with pytest.raises(FamExportError, match=r"nvcc cannot compile the kernels \(exit code 2\)") as caught:
        build(built)
    lines = str(caught.value).splitlines()
    assert lines[1:] == [f"attention.h({i}): error: line {i}" for i in range(1, 7)]
    assert contents(built) == before
    assert find() == built / LIBRARY


def test_a_failed_compile_with_another_compiler(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(script(tmp_path / "bin", FAILS, "c++")))
    with pytest.raises(FamExportError, match=r"c\+\+ cannot compile the kernels \(exit code 2\):\nattention.h\(1\)"):
        build(out, cuda=False)
    assert not out.parent.exists()
    assert find() is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("#!/bin/sh\nexit 1\n", r"\(exit code 1\):\nit said nothing"),
        ("#!/bin/sh\nexit 0\n", r"\(exit code 0\):\nit said nothing"),  # and made nothing
        ("#!/bin/sh\necho 'on stdout'\nexit 1\n", "on stdout"),
        ("#!/bin/sh\nprintf 'caf\\351' >&2\nexit 1\n", "caf\ufffd"),
        ("#!/no/such/interpreter\n", "nvcc does not start: No such file or directory"),
    ],
)
def test_compilers_that_are_none(out: Path, nvcc: Callable[[str], Path], text: str, says: str) -> None:
    nvcc(text)
    with pytest.raises(FamExportError, match=says):
        build(out)
    assert not out.parent.exists()  # nor the folders on the way to it
    out.mkdir(parents=True)
    with pytest.raises(FamExportError, match=says):
        build(out)
    assert contents(out) == {}  # what was there stays


def test_without_a_compiler(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(IncompatibleError, match="needs nvcc, .* install the CUDA toolkit"):
        build(out)
    with pytest.raises(IncompatibleError, match=r"needs g\+\+, .* apt-get install"):
        build(out, cuda=False)
    assert not out.exists()


@pytest.mark.parametrize("fails", [LIBRARY, RECORD])
def test_a_failure_between_the_files_leaves_nothing_that_is_loaded(
    built: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    real, before = Path.replace, contents(built)

    def replace(self: Path, target: Path) -> Path:
        if self.name == fails:
            raise OSError(28, "No space left on device")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(FamExportError, match="cannot write the kernels to .*No space left"):
            build(built, arch="sm_87")
    if fails == LIBRARY:
        assert contents(built) == before
        assert find() == built / LIBRARY
        return
    with pytest.raises(UntrustedError, match=f"is not what was built: .*{COMMAND}"):
        find()
    build(built)
    assert find() == built / LIBRARY


def test_a_folder_that_cannot_be(nvcc: Callable[[str], Path], tmp_path: Path) -> None:
    nvcc(MAKES)
    (tmp_path / "file").write_text("a file")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FamExportError, match=f"cannot write the kernels to {place}: .*--out"):
            build(place)
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_somebody_elses(nvcc: Callable[[str], Path], tmp_path: Path) -> None:
    nvcc(MAKES)
    place = tmp_path / "theirs"
    place.mkdir(mode=0o555)
    with pytest.raises(FamExportError, match=r"cannot write the kernels to .*Permission denied.*--out"):
        build(place)


def test_no_build_where_others_may_write(nvcc: Callable[[str], Path], tmp_path: Path) -> None:
    """Or half a minute of compiling would end in a library that is not loaded."""
    nvcc(MAKES)
    place = tmp_path / "open"
    place.mkdir()
    place.chmod(0o1777)
    with pytest.raises(UntrustedError, match="others may write .*--out"):
        build(place)
    assert contents(place) == {}


def test_a_build_under_a_umask_that_allows_all(out: Path, nvcc: Callable[[str], Path]) -> None:
    nvcc(MAKES)
    before = os.umask(0)
    try:
        build(out)
    finally:
        os.umask(before)
    assert find() == out / LIBRARY


# find


def test_nothing_was_built(out: Path) -> None:
    assert find() is None
    out.mkdir(parents=True)
    assert find() is None


def test_where_it_is_looked_for(built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "elsewhere"))
    assert find() is None
    for unset in ("", None):
        monkeypatch.setenv(FOLDER, unset) if unset is not None else monkeypatch.delenv(FOLDER)
        assert folder() == Path(builder.__file__).parent / "built"


def test_a_build_for_the_cpu_is_not_for_ort_cuda(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(script(tmp_path / "bin", MAKES, "c++")))
    build(out, cuda=False)
    with pytest.raises(IncompatibleError, match=f"built for the CPU; build them again with: {COMMAND}"):
        find()


def test_a_build_of_another_source(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("famexport.kernels.library.source_hash", lambda: "0" * 64)
        with pytest.raises(IncompatibleError, match=f"another version of famexport; build .*{COMMAND}"):
            find()
    assert find() == built / LIBRARY


def test_a_library_that_was_changed(built: Path) -> None:
    library = built / LIBRARY
    good = library.read_bytes()
    for bad in (good[:-1], good + b"\0", bytes([good[0] ^ 1]) + good[1:], b""):
        library.write_bytes(bad)
        with pytest.raises(UntrustedError, match=f"{LIBRARY} is not what was built: .*{COMMAND}"):
            find()
    library.write_bytes(good)
    assert find() == library


def test_another_library_in_its_place_is_not_passed_by_a_later_check(built: Path) -> None:
    """Of a library that is not what was built it matters little what it says it is."""
    (built / LIBRARY).write_bytes(b"\x7fELF")
    rewrite(built, source="another", cuda=False)
    with pytest.raises(UntrustedError):
        find()


@pytest.mark.parametrize("lacking", [LIBRARY, RECORD])
def test_half_a_build(built: Path, lacking: str) -> None:
    (built / lacking).unlink()
    with pytest.raises(UntrustedError, match=f"does not say what {LIBRARY} is.*No such file.*{COMMAND}"):
        find()
    (built / lacking).mkdir()
    with pytest.raises(UntrustedError, match=f"no regular file; remove it, and build them again with: {COMMAND}"):
        find()


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"null", b"[]", b'"text"', b"17", b"{}", b'{"source": "a", "library": "b"}', b"\xff\xfe", b"[" * 9999],
)
def test_a_record_that_is_none(built: Path, text: bytes) -> None:
    (built / RECORD).write_bytes(text)
    with pytest.raises(UntrustedError, match=f"does not say what {LIBRARY} is"):
        find()


@pytest.mark.parametrize("wrong", [None, 1, True, [], {}, "x" * 9999])
def test_hashes_of_another_type(built: Path, wrong: Any) -> None:
    rewrite(built, library=wrong)
    with pytest.raises(UntrustedError, match="is not what was built") as caught:
        find()
    assert len(str(caught.value)) < 1000
    rewrite(built, library=file_hash(built / LIBRARY), source=wrong)
    with pytest.raises(IncompatibleError, match="another version"):
        find()


@pytest.mark.parametrize("wrong", [None, 1, "yes", "true", [True], False])
def test_only_true_is_cuda(built: Path, wrong: Any) -> None:
    rewrite(built, cuda=wrong)
    with pytest.raises(IncompatibleError, match="for the CPU"):
        find()


@pytest.mark.parametrize("mode", [0o002, 0o020])
@pytest.mark.parametrize("name", ["", LIBRARY, RECORD])
def test_what_others_may_write(built: Path, name: str, mode: int) -> None:
    path = built / name
    before = path.stat().st_mode
    path.chmod(before | mode)
    with pytest.raises(UntrustedError, match=f"others may write {path}; chmod go-w {path} if it is yours, and build"):
        find()
    path.chmod(before)
    assert find() == built / LIBRARY


@pytest.mark.parametrize("name", [LIBRARY, RECORD])
def test_a_fifo_is_not_waited_for(built: Path, name: str) -> None:
    (built / name).unlink()
    os.mkfifo(built / name, 0o644)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(10)
    try:
        with pytest.raises(UntrustedError, match=f"{name} is no regular file; .*{COMMAND}"):
            find()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_what_is_somebody_elses(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    if (built / LIBRARY).stat().st_uid == 0:
        os.chown(built / LIBRARY, 4712, -1)
    with pytest.raises(UntrustedError, match="others may write"):
        find()


def test_a_relative_folder_names_no_library_that_is_searched_for(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dlopen looks for a bare name where ``LD_LIBRARY_PATH`` says, not where it was checked."""
    monkeypatch.chdir(built)
    monkeypatch.setenv("FAMEXPORT_KERNELS", ".")
    assert (found := find()) == built / LIBRARY
    assert found.is_absolute()


@pytest.mark.parametrize("text", [SEES_NO_GPU, SEES_NO_GPU_LATE], ids=["before it compiles", "after"])
def test_native_needs_a_gpu(out: Path, nvcc: Callable[[str], Path], text: str) -> None:
    nvcc(text)
    with pytest.raises(IncompatibleError, match="sees no GPU here .*--arch sm_90"):
        build(out)
    assert not out.parent.exists()


def test_a_folder_that_cannot_be_looked_into(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exists(self: Path, **options: Any) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", exists)
    with pytest.raises(UntrustedError, match="Permission denied"):
        find()
