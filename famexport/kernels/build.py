"""Compiling the kernels: with nvcc for the machine's GPU, or with a C++ compiler alone for the CPU, as tests do.

A build is two files in one folder: the library, and ``kernels.json`` with the hashes of the library and of its source.
``library.find`` opens nothing that is not what these say.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from famexport.errors import FamExportError, IncompatibleError, UntrustedError

SOURCE = Path(__file__).with_name("csrc")
LIBRARY, RECORD = "libfamexport_kernels.so", "kernels.json"
COMMAND = "famexport kernels"
_FLAGS = ("-std=c++17", "-shared", "-O3")


def source_hash() -> str:
    """SHA-256 over the names and contents of all source files."""
    digest = hashlib.sha256()
    for file in sorted((*SOURCE.glob("*.h"), *SOURCE.glob("*.cc"))):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def build(out: Path, *, cuda: bool = True, arch: str = "native") -> Path:
    """Compile into the folder ``out``, in place of what is there, and return the library's path.

    Args:
        cuda: with nvcc, else for the CPU alone (float32) with ``$CXX`` or g++.
        arch: nvcc's -arch: "native" is the GPU of this machine, "all-major" any, "sm_87" Jetson Orin.
    Raises:
        IncompatibleError: the compiler is missing, or there is no GPU here for "native".
        UntrustedError: others may write ``out``, so nothing in it would be loaded.
        FamExportError: the compiler failed, or ``out`` cannot be written.
    """
    compiler = "nvcc" if cuda else os.environ.get("CXX") or "g++"
    if not (found := shutil.which(compiler)):
        hint = "install the CUDA toolkit, or add its bin folder to PATH" if cuda else "sudo apt-get install g++"
        raise IncompatibleError(f"building the kernels needs {compiler}, which is not on the PATH; {hint}")
    command = [found, *_FLAGS]
    if cuda:
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", f"-arch={arch}", "-x", "cu"]
    else:
        command += ["-fPIC", "-fvisibility=hidden", "-x", "c++"]
    if cuda:
        _check_gpu(_run([*command, "--dryrun", str(SOURCE / "library.cc"), "-o", LIBRARY])[2])  # before half a minute
    fresh: list[Path] = []
    try:
        fresh += (folder for folder in (out, *out.parents) if not folder.exists())
        out.mkdir(mode=0o755, parents=True, exist_ok=True)
        if written_by_others(out):
            raise UntrustedError(
                f"others may write {out}, so nothing in it is loaded; use another --out, or chmod go-w it"
            )
        with tempfile.TemporaryDirectory(dir=out) as temp:
            made = Path(temp, LIBRARY)
            _compile([*command, str(SOURCE / "library.cc"), "-o", str(made)], made)
            record = {
                "source": source_hash(),
                "library": file_hash(made),
                "compiler": _version(found),
                "cuda": cuda,
                "arch": arch,
            }
            Path(temp, RECORD).write_text(json.dumps(record, indent=2) + "\n")
            for name in (LIBRARY, RECORD):  # between the two the record does not fit, and nothing is loaded
                Path(temp, name).chmod(0o644 if name == RECORD else 0o755)  # whatever the umask
                Path(temp, name).replace(out / name)
    except OSError as exc:
        raise FamExportError(f"cannot write the kernels to {out}: {exc}; name another folder with --out") from exc
    finally:
        for folder in fresh:
            with suppress(OSError):  # not empty: it was built
                folder.rmdir()
    return out / LIBRARY


def _compile(command: list[str], made: Path) -> None:
    code, out, err = _run(command)
    if code or not made.is_file():
        said = "\n".join((err.strip() or out.strip() or "it said nothing").splitlines()[:6])
        raise FamExportError(f"{Path(command[0]).name} cannot compile the kernels (exit code {code}):\n{said}")
    _check_gpu(err)


def _check_gpu(said: str) -> None:
    if "Cannot find valid GPU" in said:  # nvcc takes an old architecture then
        raise IncompatibleError(
            "nvcc sees no GPU here to compile for; name one: --arch sm_90 for an H100, sm_87 for Jetson Orin, "
            "all-major for any"
        )


def _version(compiler: str) -> str:
    said = _run([compiler, "--version"])[1].strip().splitlines()
    return next((line for line in said if "release" in line), said[0] if said else compiler)


def _run(command: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")  # noqa: S603 - our arguments
    except OSError as exc:
        raise FamExportError(f"{command[0]} does not start: {exc.strerror}") from exc
    return done.returncode, done.stdout, done.stderr


def written_by_others(path: Path) -> bool:
    """Whether anyone but this user and root may write it."""
    info = path.stat()
    return info.st_uid not in (0, os.geteuid()) or bool(info.st_mode & 0o022)


def file_hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
