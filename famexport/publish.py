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
from famexport.interrupts import uninterrupted

_NOREPLACE, _EXCHANGE, _AT_FDCWD = 1, 2, -100
# EPERM as well: sandboxes answer unknown system calls with it, and where it is genuine the plain rename says so too.
_NO_RENAMEAT2 = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}
_OTHER_WRITER = {errno.EAGAIN, errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY}
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_ATTEMPTS = 500
_LINKS = 40  # in a row, as Linux has it
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
    claimed: tuple[Path, int] | None = None
    try:
        with _mapped(target, what), uninterrupted():  # else Ctrl-C could leave a directory that nobody knows of
            claimed = staged, _ = _claim(target, _make_directory)
        with _mapped(target, what, only=_DISK):
            yield staged
        with _mapped(target, what):
            _fsync_tree(staged, what)
            _publish(staged, target, is_ours, what)
    finally:
        with uninterrupted():
            # Before publishing it is the unfinished work, after an exchange it is the old directory: both must go.
            if claimed is not None:
                staged, lock = claimed
                os.close(lock)  # first: the lock is on what is published now, and the next writer may wait for it
                shutil.rmtree(staged, ignore_errors=True)


def atomic_write(path: Path, data: bytes) -> None:
    """Write ``data`` as the whole content of the file ``path``: it is there as before or as given, never in part.

    For files in folders of ours: a symbolic link there is replaced, never written through. For a path that someone
    typed, ``write_output``.

    Raises:
        UsageError: the path is a directory or a special file.
        FamExportError: the disk is full or refuses.
    """
    path = _absolute(path, "file")
    with _mapped(path, "file"):
        _refuse_special(path, stat.S_IFDIR if os.path.isdir(path) else _mode(path))  # a link to a directory, too
    with _staged(path) as write:
        write(data)


def write_output(path: Path, data: bytes) -> None:
    """Write ``data`` to where a user said, as ``staged_file`` does."""
    with staged_file(path) as write:
        write(data)


@contextmanager
def staged_file(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Give a function that appends bytes to a file; the file appears as ``path`` when the block ends without an error.

    ``path`` is what a user named. Through a symbolic link the file that it names is replaced, and the link stays. What
    cannot be replaced gets the bytes as they come, with no promise: a FIFO, a character device such as ``/dev/null``,
    and what this process has open, which is what ``/dev/stdout`` and the ``/dev/fd/63`` of ``>(command)`` name.

    Raises:
        UsageError: the path is a directory, a socket or a disk, or someone else's trap (``_check_owner``).
        FamExportError: the disk is full or refuses.
    """
    path = _absolute(path, "file")
    with _mapped(path, "file"):
        target = _followed(path)
        opened = _open_special(target)
    if opened is None:
        with _staged(target) as write:
            yield write
        return
    try:
        yield _writer(opened, path)
    finally:
        os.close(opened)


def check_output(path: Path) -> None:
    """Raise now what ``staged_file`` would, for what is written after hours of work. Nothing is left behind."""
    path = _absolute(path, "file")
    with _mapped(path, "file"):
        target = _followed(path)
        if (number := _descriptor(target)) is not None:
            os.fstat(number)
        elif _is_written_to(_mode(target)):
            if not os.access(target, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
        else:
            _refuse_special(target, _mode(target))
            folder = next(parent for parent in target.parents if os.path.lexists(parent))
            if not folder.is_dir():
                raise UsageError(f"cannot write the file to {path}: a file is in the way at {folder}")
            with uninterrupted():
                staged, lock = _claim(folder / target.name, _make_file)
                os.unlink(staged)
                os.close(lock)


@contextmanager
def _staged(path: Path) -> Iterator[Callable[[bytes], None]]:
    with _mapped(path, "file"):
        _make_parent(path, "file")
        _clean_litter(path)
    claimed: tuple[Path, int] | None = None
    try:
        with _mapped(path, "file"), uninterrupted():
            claimed = staged, lock = _claim(path, _make_file)
        yield _writer(lock, path)
        with _mapped(path, "file"):
            if stat.S_ISREG(mode := _mode(path)):  # who may read it is the user's to say
                os.fchmod(lock, mode & 0o777)
            os.fsync(lock)
            os.replace(staged, path)
            _fsync(path.parent)
    finally:
        with uninterrupted():
            if claimed is not None:
                staged, lock = claimed
                with suppress(FileNotFoundError):
                    os.unlink(staged)
                os.close(lock)


def _writer(descriptor: int, path: Path) -> Callable[[bytes], None]:
    def write(data: bytes) -> None:
        with _mapped(path, "file"):
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]

    return write


def _mode(path: Path) -> int:
    """Of ``path`` itself, not of what a link names; 0 where there is nothing."""
    try:
        return os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _is_written_to(mode: int) -> bool:
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _refuse_special(path: Path, mode: int) -> None:
    """Raise UsageError unless a file may be put at ``path``, where something of that mode is."""
    if stat.S_ISDIR(mode):
        raise UsageError(f"{path} is a directory, expected a file name; add one")
    kinds = {stat.S_IFSOCK: "a socket", stat.S_IFBLK: "a disk", stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device"}
    if (kind := stat.S_IFMT(mode)) in kinds:
        raise UsageError(f"{path} is {kinds[kind]}, expected a regular file or nothing there; give another path")


def _followed(path: Path) -> Path:
    """``path``, or what it names through symbolic links; those of this process's open files are left to be taken."""
    for _ in range(_LINKS):
        if _descriptor(path) is not None:
            return path
        mode = _mode(path)
        if stat.S_ISLNK(mode) or _is_written_to(mode):
            _check_owner(path)
        if not stat.S_ISLNK(mode):
            return path
        path = path.parent / os.readlink(path)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def _check_owner(path: Path) -> None:
    """In a folder where all may write, refuse the link or FIFO of a stranger, who would choose where the bytes go. It
    is what Linux does for ``open`` (fs.protected_symlinks and fs.protected_fifos), which is not asked here."""
    info, folder = os.lstat(path), os.stat(path.parent)
    if folder.st_mode & stat.S_IWOTH and info.st_uid not in (os.geteuid(), folder.st_uid):
        raise UsageError(
            f"{path} is a link or special file that user {info.st_uid} put into a folder where all may write; "
            "give another path, or remove it"
        )


def _descriptor(path: Path) -> int | None:
    """Which of this process's open files ``path`` is another name of: N of ``/dev/fd/N`` and ``/proc/self/fd/N``."""
    if re.fullmatch("[0-9]{1,9}", path.name) and os.path.realpath(path.parent) == os.path.realpath("/dev/fd"):
        return int(path.name)
    return None


def _open_special(path: Path) -> int | None:
    """A descriptor to write to where nothing can be staged and replaced; None for a regular file or nothing."""
    if (number := _descriptor(path)) is not None:
        return os.dup(number)  # not opened anew: that would start at the beginning of a file, and fails on a socket
    if _is_written_to(mode := _mode(path)):
        return os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC)  # waits for a FIFO's reader
    _refuse_special(path, mode)
    return None


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


def _make_directory(path: Path) -> int | None:
    os.mkdir(path)  # not mkdtemp: its mode 0700 would stay on the published directory
    with suppress(FileNotFoundError):
        return os.open(path, _READ | os.O_DIRECTORY)
    return None  # a cleaner took it for litter before it was locked


def _make_file(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _claim(target: Path, make: Callable[[Path], int | None]) -> tuple[Path, int]:
    """Make a hidden sibling of ``target`` and lock it; return it and the descriptor that holds the lock."""
    for _ in range(_ATTEMPTS):
        staged = _sibling(target, "tmp")
        try:
            lock = make(staged)
        except FileNotFoundError as exc:
            if not target.parent.is_dir():
                raise
            raise UsageError(  # as /proc says it
                f"cannot write to {target}: nothing can be made in {target.parent}; give a path in another directory"
            ) from exc
        if lock is None:
            continue
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
