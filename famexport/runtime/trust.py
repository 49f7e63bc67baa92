"""Which engines were built here (R5): an engine is executable code, so no other is ever deserialised.

The store is a directory of this user alone with one empty file per SHA-256: adding is atomic, and no file of it is
ever parsed. ``FAMEXPORT_TRUST`` names another place. It is no protection from a hostile user with the same uid.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from famexport.errors import FamExportError, UntrustedError


def store() -> Path:
    """Where the store is; it need not exist yet."""
    if given := os.environ.get("FAMEXPORT_TRUST"):
        return Path(given)
    base = os.environ.get("XDG_DATA_HOME") or os.path.join(os.path.expanduser("~"), ".local", "share")
    return Path(base) / "famexport" / "trusted-engines"


def trust(sha256: str) -> None:
    """Note that the engine with this digest was built here.

    Raises:
        FamExportError: the store cannot be written.
        UntrustedError: others can write it.
    """
    folder = store()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check(folder)
        os.close(os.open(folder / sha256, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    except OSError as exc:
        raise FamExportError(
            f"cannot note the engine in the trust store {folder}: {exc.strerror}; set FAMEXPORT_TRUST to a directory "
            "of yours"
        ) from exc


def is_trusted(sha256: str) -> bool:
    """Whether the engine with this digest was built here.

    Raises:
        UntrustedError: others can write the store, so it vouches for nothing.
    """
    folder = store()
    if not folder.is_dir():
        return False
    _check(folder)
    return (folder / sha256).is_file()


def _check(folder: Path) -> None:
    info = os.lstat(folder)
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
        raise UntrustedError(
            f"the trust store {folder} must be a directory of this user that no other can write; chmod 700 it, "
            "or set FAMEXPORT_TRUST to another"
        )
