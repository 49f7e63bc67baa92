"""Publish a directory or a file atomically: whoever looks sees the old one or the new one, never a mixture.

A writer fills a hidden sibling ``.NAME.tmp-<16 hex digits>`` and holds flock on it while it lives. The kernel drops
that lock with the process, so the next writer can tell the litter of a dead one from work in progress. Everything is
fsynced before one rename makes it visible: renameat2 with RENAME_NOREPLACE or RENAME_EXCHANGE (man 2 rename). Where the
system lacks renameat2, an existing target first moves aside to ``.NAME.old-<16 hex digits>``; a writer killed between
the two renames leaves no target, and the next writer moves that one back.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from famexport.errors import FamExportError, UsageError

_NOREPLACE, _EXCHANGE, _AT_FDCWD = 1, 2, -100
# EPERM as well: sandboxes answer unknown system calls with it, and where it is genuine the plain rename says so too.
_NO_RENAMEAT2 = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}
_OTHER_WRITER = {errno.EAGAIN, errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY}
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_ATTEMPTS = 500
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextmanager
def staged_directory(target: Path, is_ours: Callable[[Path], bool], what: str) -> Iterator[Path]:
    """Yield an empty directory that becomes ``target`` when the block ends without an exception.

    Until then, and after any exception, ``target`` is as it was. Of two writers at once, the last to end wins.

    Args:
        target: what to publish. Missing parents are made. May exist if it is empty or ``is_ours``; it is then replaced.
        is_ours: whether an existing directory is one that may be replaced.
        what: a noun for messages, for example ``"bundle"``.

    Raises:
        UsageError: the target is a symlink, a file or someone else's directory; nothing was done.
        FamExportError: the disk is full or refuses.
    """
    target = _absolute(target, what)
    with _mapped(target, what):
        _make_parent(target, what)
        _clean_litter(target)
        _check_target(target, is_ours, what)
        staged, lock = _claim(target, _make_directory)
    try:
        with _mapped(target, what, only=_DISK):
            yield staged
        with _mapped(target, what):
            _fsync_tree(staged, what)
            _publish(staged, target, is_ours, what)
    finally:
        # Before publishing this path is the unfinished work, after an exchange it is the old directory: both must go.
        os.close(lock)  # first: the lock is on what is published now, and the next writer may wait for it
        shutil.rmtree(staged, ignore_errors=True)


def atomic_write(path: Path, data: bytes) -> None:
    """Write ``data`` as the whole content of the file ``path``: it is there as before or as given, never in part.

    Raises:
        UsageError: the path is a directory.
        FamExportError: the disk is full or refuses.
    """
    with staged_file(path) as write:
        write(data)


@contextmanager
def staged_file(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Give a function that appends bytes to a file; the file appears as ``path`` when the block ends without an error.

    Raises: as ``atomic_write``.
    """
    path = _absolute(path, "file")
    with _mapped(path, "file"):
        if os.path.isdir(path):
            raise UsageError(f"{path} is a directory, expected a file name; add one")
        _make_parent(path, "file")
        _clean_litter(path)
        staged, lock = _claim(path, _make_file)

    def write(data: bytes) -> None:
        with _mapped(path, "file"):
            view = memoryview(data)
            while view:
                view = view[os.write(lock, view) :]

    try:
        yield write
        with _mapped(path, "file"):
            os.fsync(lock)
            os.replace(staged, path)
            _fsync(path.parent)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(staged)
        os.close(lock)


def _absolute(target: Path, what: str) -> Path:
    if "\0" in str(target) or not (path := Path(os.path.abspath(target))).name:
        raise UsageError(f"cannot write the {what} to {str(target)!r:.200}; give the path of a {what}")
    return path


def _make_parent(target: Path, what: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as exc:
        raise UsageError(f"cannot write the {what} to {target}: a file is in the way at {exc.filename}") from exc


def _check_target(target: Path, is_ours: Callable[[Path], bool], what: str) -> None:
    mode = 0
    for _ in range(_ATTEMPTS):
        with suppress(FileNotFoundError):
            mode = (before := os.lstat(target)).st_mode
            if stat.S_ISDIR(mode) and (not os.listdir(target) or is_ours(target)):
                return
            if os.path.samestat(before, os.lstat(target)):
                break  # else another writer replaced it while it was looked at
        if not os.path.lexists(target):
            return
    kinds = {stat.S_IFDIR: f"a directory that is not a {what}", stat.S_IFLNK: "a symbolic link"}
    got = kinds.get(stat.S_IFMT(mode), "a file")
    raise UsageError(
        f"{target} is {got}; expected nothing there, an empty directory or an earlier {what}; "
        "give another path, or move what is there away"
    )


def _make_directory(path: Path) -> int:
    os.mkdir(path)  # not mkdtemp: its mode 0700 would stay on the published directory
    return os.open(path, _READ | os.O_DIRECTORY)


def _make_file(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _claim(target: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """Make a hidden sibling of ``target`` and lock it; return it and the descriptor that holds the lock."""
    for _ in range(_ATTEMPTS):
        staged = _sibling(target, "tmp")
        with suppress(FileNotFoundError):  # a cleaner took it for litter before it was locked
            lock = make(staged)
            if _flock(lock) is not False and os.path.lexists(staged):
                return staged, lock
            os.close(lock)
    raise FamExportError(f"cannot make a temporary sibling of {target}: it is removed each time; is a cleaner running?")


def _flock(descriptor: int) -> bool | None:
    """Lock without waiting: True, False where someone else holds it, None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _clean_litter(target: Path) -> None:
    """Remove what dead writers of ``target`` left; put the old target back if one died between two renames."""
    ours = re.compile(rf"\.{re.escape(target.name)}\.(tmp|old)-[0-9a-f]{{16}}", re.DOTALL)
    old, swapping = f".{target.name}.old-", False
    found: dict[Path, int] = {}
    for path in filter(lambda path: ours.fullmatch(path.name), target.parent.iterdir()):
        with suppress(FileNotFoundError):
            found[path] = path.lstat().st_ctime_ns
    for path in sorted(found, key=found.__getitem__, reverse=True):  # newest first
        with suppress(OSError):  # another cleaner was faster, or the litter is another user's: neither may stop us
            lock = os.open(path, _READ)
            try:
                if not _flock(lock):
                    swapping |= path.name.startswith(old)
                    continue
                if path.name.startswith(old):
                    if not os.path.lexists(target):
                        if not swapping and not _renameat2(path, target, _NOREPLACE):
                            os.rename(path, target)
                        continue
                    path = path.rename(_sibling(target, "tmp"))  # half of it must not look like something to move back
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    os.unlink(path)
            finally:
                os.close(lock)


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(8)}")


def _publish(staged: Path, target: Path, is_ours: Callable[[Path], bool], what: str) -> None:
    for _ in range(_ATTEMPTS):
        _check_target(target, is_ours, what)  # again: it may have appeared since
        try:
            if not os.path.lexists(target):
                if not _renameat2(staged, target, _NOREPLACE):
                    os.rename(staged, target)
            elif not _renameat2(staged, target, _EXCHANGE):
                _swap_by_two_renames(staged, target)
        except OSError as exc:
            if exc.errno not in _OTHER_WRITER or not staged.is_dir():
                raise
            continue
        return _fsync(target.parent)
    raise FamExportError(f"cannot publish the {what} {target}: others keep changing it; try again")


def _swap_by_two_renames(staged: Path, target: Path) -> None:
    """As RENAME_EXCHANGE does: the new directory ends up at ``target``, the old one at ``staged``."""
    aside = _sibling(target, "old")
    lock, replaced = os.open(target, _READ | os.O_DIRECTORY), False
    try:
        # Locked, so that no cleaner moves it back or removes it while it is aside.
        if _flock(lock) is False or not os.path.samestat(os.fstat(lock), os.lstat(target)):
            time.sleep(0.01)
            raise BlockingIOError(errno.EAGAIN, "another writer is publishing it")
        try:
            os.rename(target, aside)
            os.rename(staged, target)
            replaced = True
        finally:
            if not replaced and not os.path.lexists(target):
                os.rename(aside, target)
        os.rename(aside, staged)  # before it is removed: half of it must not look like something to move back
    finally:
        os.close(lock)


@cache
def _libc_renameat2() -> Any:
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Rename with flags; False where the C library, the kernel or the file system cannot."""
    function = _libc_renameat2()
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_RENAMEAT2:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, _READ)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno != errno.EINVAL or not path.is_dir():  # some file systems cannot fsync a directory
            raise
    finally:
        os.close(descriptor)


def _fsync_tree(root: Path, what: str) -> None:
    """Everything under ``root`` to the disk, ``manifest.json`` last: if it is whole, so is all that it names."""

    def fail(exc: OSError) -> None:
        raise exc

    manifest = root / "manifest.json"
    files, folders = [], []
    for folder, subfolders, names in os.walk(root, onerror=fail):
        folders.append(Path(folder))
        for path in (Path(folder, name) for name in (*subfolders, *names)):
            info = os.lstat(path)
            if stat.S_ISREG(info.st_mode) and info.st_nlink == 1:
                if path != manifest:
                    files.append(path)
            elif not stat.S_ISDIR(info.st_mode):
                raise FamExportError(f"the {what} holds {path.name!r}, a link or special file; expected plain files")
    for path in (*files, *reversed(folders), *(m for m in [manifest] if m.exists())):
        _fsync(path)


@contextmanager
def _mapped(target: Path, what: str, only: set[int] | None = None) -> Iterator[None]:
    """Turn disk errors into FamExportError; with ``only``, leave other errors of the caller's block as they are."""
    try:
        yield
    except FamExportError:
        raise
    except Exception as exc:
        code = exc.errno if isinstance(exc, OSError) else None
        if code is None and "(os error 28)" in str(exc):  # safetensors reports a full disk in its own exception
            code = errno.ENOSPC
        if code is None or (only is not None and code not in only):
            raise
        if code == errno.ENAMETOOLONG:
            raise UsageError(f"the name of the {what} is too long: {target.name!r:.80}; use a shorter one") from exc
        todo = "check the path and its permissions"
        if code in (errno.ENOSPC, errno.EDQUOT):
            free_mb = shutil.disk_usage(next(p for p in target.parents if p.exists())).free // 1_000_000
            todo = f"the disk ran full ({free_mb} MB free now): make room there or give a path on another disk"
        raise FamExportError(f"cannot write the {what} {target}: {exc}; {todo}") from exc
