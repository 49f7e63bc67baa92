"""The library that was built, checked before anything of it is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

from famexport.errors import IncompatibleError, UntrustedError
from famexport.kernels.build import COMMAND, LIBRARY, RECORD, file_hash, source_hash, written_by_others

FOLDER = "FAMEXPORT_KERNELS"  # an environment variable


def folder() -> Path:
    """Where the kernels are built to and looked for: ``$FAMEXPORT_KERNELS``, else beside this file."""
    return Path(os.environ.get(FOLDER) or Path(__file__).with_name("built")).absolute()  # a bare name is searched for


def find() -> Path | None:
    """The library for CUDA in ``folder()``; None where nothing was built.

    Raises:
        IncompatibleError: it was built from another version of the source, or for the CPU.
        UntrustedError: it is not the file that was built, or others may write it.
    """
    library, record = folder() / LIBRARY, folder() / RECORD
    again = f"build them again with: {COMMAND}"
    try:
        if not library.exists() and not record.exists():
            return None
        for path in (folder(), library, record):
            if written_by_others(path):
                raise UntrustedError(f"others may write {path}; chmod go-w {path} if it is yours, and {again}")
            if path != folder() and not path.is_file():  # opening a FIFO would wait for ever
                raise UntrustedError(f"{path} is no regular file; remove it, and {again}")
        said = json.loads(record.read_text())
        source, built, cuda = said["source"], said["library"], said["cuda"]
        got, now = file_hash(library), source_hash()
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as exc:
        raise UntrustedError(f"{record} does not say what {library.name} is: {exc!r:.200}; {again}") from exc
    if got != built:
        raise UntrustedError(f"{library} is not what was built: SHA-256 {got}, expected {built!s:.64}; {again}")
    if source != now:
        raise IncompatibleError(f"the kernels in {folder()} were built from another version of famexport; {again}")
    if cuda is not True:
        raise IncompatibleError(f"the kernels in {folder()} were built for the CPU; {again}")
    return library
