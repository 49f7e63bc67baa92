"""Publication is atomic: whatever happens to a writer, the target is the old one or the new one (rule R9)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import random
import shutil
import signal
import socket
import stat
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from famexport import publish
from famexport.errors import FamExportError, UsageError
from famexport.publish import atomic_write, check_output, staged_directory, staged_file, write_output

FILES = ("weights", "sub/more", "manifest.json")


def ours(path: Path) -> bool:
    return (path / "manifest.json").exists()


def put(folder: Path, version: str) -> None:
    (folder / "sub").mkdir()
    for name in FILES:
        (folder / name).write_text(version)


def write(target: Path, version: str) -> None:
    with staged_directory(target, ours, "bundle") as staged:
        put(staged, version)


def write_then(target: Path, work: Callable[[Path], object]) -> None:
    """Write version 2, and before it is published do ``work`` on the staged directory."""
    with staged_directory(target, ours, "bundle") as staged:
        put(staged, "2")
        work(staged)


class StopError(Exception):
    """Ends a writer's block."""


def stop(error: BaseException | None = None) -> Callable[[Path], object]:
    def work(staged: Path) -> None:
        raise error or StopError

    return work


def version(target: Path) -> str | None:
    """The one version all files of ``target`` have; None where it is absent. Anything else is a torn target."""
    if not os.path.lexists(target):
        return None
    assert sorted(p.name for p in target.iterdir()) == ["manifest.json", "sub", "weights"]
    (found,) = {(target / name).read_text() for name in FILES}
    return found


def litter(target: Path) -> list[str]:
    return sorted(name for name in os.listdir(target.parent) if name != target.name)


@pytest.fixture(params=["renameat2", "two renames"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to replace a directory; the second is for systems without renameat2."""
    if request.param == "two renames":
        monkeypatch.setattr(publish, "_libc_renameat2", lambda: None)
    return str(request.param)


def fork(work: Callable[[], object]) -> int:
    """Run ``work`` in a child process and return the child's id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child only touches files, never threads
        child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_renameat2_is_used_here() -> None:
    assert publish._libc_renameat2() is not None


def test_new_empty_and_old_targets(tmp_path: Path, either_way: str) -> None:
    target = tmp_path / "a" / "b" / "bundle"  # parents are made
    write(target, "1")
    assert version(target) == "1"
    write(target, "2")
    assert version(target) == "2"
    shutil.rmtree(target)
    target.mkdir()
    write(target, "3")
    assert version(target) == "3"
    assert litter(target) == []
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1), FileNotFoundError("input")])
def test_an_exception_leaves_the_old_target(tmp_path: Path, either_way: str, error: BaseException) -> None:
    target = tmp_path / "bundle"
    for old in (None, "1"):
        if old:
            write(target, old)
        with pytest.raises(type(error)) as caught:
            write_then(target, stop(error))
        assert caught.value is error
        assert version(target) == old
        assert litter(target) == []


def test_foreign_targets_are_refused_before_any_work(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(folder)
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    before = sorted(os.listdir(tmp_path))
    for target, got in [(canary, "a file"), (folder, "not a bundle"), (link, "a symbolic link"), (dangling, "a symb")]:
        with pytest.raises(UsageError, match=f"is .*{got}.*; expected nothing there.*; give another path"):
            write_then(target, lambda _: pytest.fail("the block must not run"))
    with pytest.raises(UsageError, match="a file is in the way"):
        write_then(canary / "bundle", lambda _: pytest.fail("the block must not run"))
    assert sorted(os.listdir(tmp_path)) == before
    assert canary.read_text() == (folder / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["n" * 300, "nul\0here"])
def test_impossible_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        write(tmp_path / name, "1")
    with pytest.raises(UsageError):
        atomic_write(tmp_path / name, b"1")
    with pytest.raises(UsageError):
        write(Path("/"), "1")
    assert os.listdir(tmp_path) == []


def test_a_target_that_turns_foreign_meanwhile_is_kept(tmp_path: Path, either_way: str) -> None:
    target = tmp_path / "bundle"

    def meanwhile(_: Path) -> None:
        target.mkdir()
        (target / "thesis.txt").write_text("mine")

    with pytest.raises(UsageError, match="not a bundle"):
        write_then(target, meanwhile)
    assert (target / "thesis.txt").read_text() == "mine"
    assert litter(target) == []


@pytest.mark.parametrize("kind", ["symlink", "hardlink", "fifo"])
def test_only_plain_files_are_published(tmp_path: Path, kind: str) -> None:
    canary, target = tmp_path / "canary", tmp_path / "bundle"
    canary.write_text("mine")

    def plant(staged: Path) -> None:
        odd = staged / "odd"
        if kind == "fifo":
            os.mkfifo(odd)
        else:
            (odd.symlink_to if kind == "symlink" else odd.hardlink_to)(canary)

    with pytest.raises(FamExportError, match="holds 'odd', a link or special file"):
        write_then(target, plant)
    assert litter(target) == ["canary"]
    assert canary.read_text() == "mine"


def test_everything_is_fsynced_the_manifest_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, synced = os.fsync, []

    def record(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    write(tmp_path / "bundle", "1")
    assert set(synced[:2]) == {"weights", "more"}
    assert synced[2] == "sub"
    assert synced[3].startswith(".bundle.tmp-")
    assert synced[4:] == ["manifest.json", tmp_path.name]


def test_two_renames_roll_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "_renameat2", lambda *_: False)
    target, real = tmp_path / "bundle", os.rename
    write(target, "1")
    for error in (OSError(errno.EIO, "broken"), KeyboardInterrupt()):

        def rename(source: Any, to: Any, error: BaseException = error) -> None:
            if ".tmp-" in str(source):
                raise error
            real(source, to)

        monkeypatch.setattr(os, "rename", rename)
        with pytest.raises((FamExportError, KeyboardInterrupt)):
            write(target, "2")
        assert version(target) == "1"
        assert litter(target) == []


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.EPERM])
def test_a_kernel_without_renameat2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object) -> int:
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(publish, "_libc_renameat2", lambda: refuse)
    for number in ("1", "2"):
        write(tmp_path / "bundle", number)
        assert version(tmp_path / "bundle") == number
        assert litter(tmp_path / "bundle") == []


def test_litter_of_the_dead_goes_and_the_rest_stays(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    write(target, "1")
    dead = [".bundle.tmp-0123456789abcdef", ".bundle.old-0123456789abcdef"]
    alike = [".bundle.tmp-notes", ".other.tmp-0123456789abcdef", "bundle.tmp-0123456789abcdef"]
    for name in (*dead, *alike):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    link = tmp_path / ".bundle.tmp-fedcba9876543210"
    link.symlink_to(tmp_path / alike[0])
    with staged_directory(target, ours, "bundle") as living:
        write(target, "2")  # a second writer, whose cleaner meets the first one's live directory
        put(living, "3")
    assert version(target) == "3"
    assert litter(target) == sorted([*alike, link.name])
    assert (tmp_path / alike[0] / "file").exists()


def test_an_old_target_left_aside_is_put_back(tmp_path: Path, either_way: str) -> None:
    target = tmp_path / "bundle"
    write(target, "1")
    target.rename(tmp_path / ".bundle.old-0123456789abcdef")
    with pytest.raises(StopError):
        write_then(target, stop())
    assert version(target) == "1"
    assert litter(target) == []


def test_an_old_target_in_use_is_left_aside(tmp_path: Path) -> None:
    aside = tmp_path / ".bundle.old-0123456789abcdef"
    write(aside, "1")
    lock = os.open(aside, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    write(tmp_path / "bundle", "2")
    assert version(aside) == "1"
    assert version(tmp_path / "bundle") == "2"
    os.close(lock)
    write(tmp_path / "bundle", "3")
    assert litter(tmp_path / "bundle") == []


def test_nothing_is_put_back_while_another_writer_swaps(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    for name, number in (("0" * 16, "stale"), ("1" * 16, "newer")):
        write(tmp_path / f".bundle.old-{name}", number)
    lock = os.open(tmp_path / f".bundle.old-{'1' * 16}", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # its owner is between the two renames
    absent = []
    write_then(target, lambda _: absent.append(not target.exists()))
    os.close(lock)
    assert absent == [True]


def test_half_removed_directories_never_look_like_ones_to_put_back(
    tmp_path: Path, either_way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, real, removed = tmp_path / "bundle", shutil.rmtree, []

    def rmtree(path: Path, **options: Any) -> None:
        removed.append(path.name)
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    write(target, "1")
    write(tmp_path / f".bundle.old-{'0' * 16}", "0")
    write(target, "2")
    assert len([name for name in removed if name.startswith(".bundle.tmp-")]) >= 3
    assert not [name for name in removed if name.startswith(".bundle.old-") and ".tmp-" not in name]
    assert litter(target) == []


def test_two_renames_wait_for_whoever_holds_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "_renameat2", lambda *_: False)
    monkeypatch.setattr(publish, "_ATTEMPTS", 3)
    target = tmp_path / "bundle"
    write(target, "1")
    lock = os.open(target, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(FamExportError, match="others keep changing it; try again"):
        write(target, "2")
    assert version(target) == "1"
    assert litter(target) == []
    os.close(lock)
    write(target, "2")
    assert version(target) == "2"


def test_a_target_replaced_while_it_is_judged_is_judged_again(tmp_path: Path) -> None:
    target, judged = tmp_path / "bundle", []
    write(target, "1")

    def judge(path: Path) -> bool:
        judged.append(path)
        if len(judged) > 1:
            return ours(path)
        write(target, "2")  # the one looked at is gone, so what was found in it says nothing
        return False

    with staged_directory(target, judge, "bundle") as staged:
        put(staged, "3")
    assert version(target) == "3"


STEPS = ["fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "open", "close", "write"]


def kill_at(n: int) -> None:
    """Make this process kill itself just before the n-th call that touches the disk."""
    left = n

    def hooked(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in STEPS:
        setattr(os, name, hooked(getattr(os, name)))
    publish._renameat2 = hooked(publish._renameat2)
    fcntl.flock = hooked(fcntl.flock)


def after_a_kill(target: Path) -> str | None:
    """What is there once the next writer came by, which here gives up: it must clean and not publish."""
    with pytest.raises(StopError):
        write_then(target, stop())
    assert litter(target) == []
    return version(target)


@pytest.mark.parametrize("first", [True, False])
def test_kill_at_every_step(tmp_path: Path, either_way: str, first: bool) -> None:
    seen = []
    for n in range(1000):
        target = tmp_path / str(n) / "bundle"
        if not first:
            write(target, "old")

        def work(target: Path = target, n: int = n) -> None:
            kill_at(n)
            write(target, "new")

        code = wait(fork(work))
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            break
        now = version(target)
        if either_way == "renameat2":
            assert now in (None if first else "old", "new")
        seen.append(after_a_kill(target))
        assert now is None or now == seen[-1]
    assert n > 20
    assert version(target) == "new"
    assert set(seen) == {None if first else "old", "new"}
    published = [now == "new" for now in seen]
    assert published == sorted(published)  # once new, new however late the kill


def test_kill_atomic_write_at_every_step(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for n in range(1000):
        path.write_bytes(b"old")

        def work(n: int = n) -> None:
            kill_at(n)
            atomic_write(path, b"new" * 1000)

        code = wait(fork(work))
        assert path.read_bytes() in (b"old", b"new" * 1000)
        if code == 0:
            break
        atomic_write(path, b"next")
        assert path.read_bytes() == b"next"
        assert litter(path) == []
    assert n > 5


def test_kill_at_random_times(tmp_path: Path, either_way: str) -> None:
    target, rng = tmp_path / "bundle", random.Random(1)
    write(target, "0")

    def work() -> None:
        for i in range(1_000_000):
            write(target, str(i))

    for _ in range(40):
        child = fork(work)
        time.sleep(rng.uniform(0.005, 0.04))
        os.kill(child, signal.SIGKILL)
        assert wait(child) == -signal.SIGKILL
        if either_way == "renameat2":
            assert version(target) is not None
        assert after_a_kill(target) is not None


def read_slowly(target: Path) -> set[str]:
    """The versions seen by a reader that opened the directory once; empty where it was replaced meanwhile."""
    folder = os.open(target, os.O_RDONLY)
    try:
        found = set()
        for name in FILES:
            file = os.open(name, os.O_RDONLY, dir_fd=folder)
            found.add(os.read(file, 100).decode())
            os.close(file)
        return found
    except FileNotFoundError:
        return set()
    finally:
        os.close(folder)


def test_two_writers_at_once(tmp_path: Path, either_way: str) -> None:
    target = tmp_path / "bundle"
    write(target, "0")

    def work(name: str) -> None:
        for i in range(60):
            write(target, f"{name}{i}")

    children = [fork(partial(work, name)) for name in "AB"]
    running, codes, reads = list(children), [], 0
    while running:
        for child in list(running):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                running.remove(child)
                codes.append(os.waitstatus_to_exitcode(status))
        try:
            found = read_slowly(target)
        except FileNotFoundError:
            assert either_way == "two renames"  # the one way with a moment without a target
            continue
        assert len(found) <= 1
        reads += len(found)
    assert codes == [0, 0]
    assert reads > 10
    assert version(target) in ("A59", "B59")
    assert litter(target) == []


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    target, path = tmp_path / "bundle", tmp_path / "file"
    write(target, "1")
    path.write_text("old")

    def expect(work: Callable[[], object], noun: str) -> None:
        with pytest.raises(FamExportError, match=f"cannot write the {noun} .*disk ran full .* make room") as caught:
            work()
        assert caught.value.__cause__ is not None
        assert version(target) == "1"
        assert path.read_text() == "old"
        assert litter(target) == ["file"]

    expect(lambda: write_then(target, stop(OSError(errno.ENOSPC, "No space left on device"))), "bundle")
    expect(lambda: write_then(target, stop(RuntimeError("I/O error: No space left on device (os error 28)"))), "bundle")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        expect(lambda: write(target, "2"), "bundle")
        expect(lambda: atomic_write(path, b"new"), "file")
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", full)
        expect(lambda: write(target, "2"), "bundle")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        expect(lambda: atomic_write(path, b"new"), "file")


def test_atomic_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file"
    atomic_write(path, b"")
    assert path.read_bytes() == b""
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))  # a short write is not an error
    atomic_write(path, b"x" * 100)
    assert path.read_bytes() == b"x" * 100
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, b"y")
    assert path.read_bytes() == b"x" * 100
    assert litter(path) == []
    with pytest.raises(UsageError, match="is a directory"):
        atomic_write(tmp_path, b"y")


def interrupted(real: Callable[..., Any], *, first: bool = False) -> Callable[..., Any]:
    """``real``, with a Ctrl-C before or after it."""

    def call(*args: Any, **options: Any) -> Any:
        if first:
            signal.raise_signal(signal.SIGINT)
        result = real(*args, **options)
        if not first:
            signal.raise_signal(signal.SIGINT)
        return result

    return call


def test_ctrl_c_when_something_is_just_made_leaves_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = len(os.listdir("/proc/self/fd"))
    for name in ("_claim", "_make_directory", "_make_file", "_flock"):
        with monkeypatch.context() as patch:
            patch.setattr(publish, name, interrupted(getattr(publish, name)))
            uses: list[Callable[[], object]] = [
                lambda: write_then(tmp_path / "target", lambda _: pytest.fail("it went on")),
                lambda: append_then(tmp_path / "target", lambda: pytest.fail("it went on")),
                lambda: check_output(tmp_path / "target"),
            ]
            unused = {"_make_directory": uses[1:], "_make_file": uses[:1]}.get(name, [])
            for use in (use for use in uses if use not in unused):
                with pytest.raises(KeyboardInterrupt):
                    use()
                assert os.listdir(tmp_path) == [], name
                assert len(os.listdir("/proc/self/fd")) == opened


def test_ctrl_c_while_cleaning_up_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "rmtree", interrupted(shutil.rmtree, first=True))
    with pytest.raises(KeyboardInterrupt):
        write_then(tmp_path / "bundle", stop())
    assert os.listdir(tmp_path) == []


def test_where_nothing_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says = "cannot write to /proc/here: nothing can be made in /proc; give a path in another directory"
    for use in (
        lambda path: write(path, "1"),
        check_output,
        lambda path: write_output(path, b""),
        lambda path: atomic_write(path, b""),
    ):
        with pytest.raises(UsageError, match=says):
            use(Path("/proc/here"))
    monkeypatch.setattr(publish, "_clean_litter", lambda target: target.parent.rmdir())
    with pytest.raises(FamExportError, match="No such file or directory.*; check the path and its permissions"):
        write(tmp_path / "gone" / "bundle", "1")


def test_a_cleaner_that_is_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes what is not locked yet for litter: before it is opened, or before it is locked."""
    real_open, real_flock, left = os.open, publish._flock, [1, 1]

    def slow_open(path: Any, *args: Any, **options: Any) -> int:
        if ".tmp-" in str(path) and left[0]:
            left[0] -= 1
            os.rmdir(path)
        return real_open(path, *args, **options)

    def slow_flock(descriptor: int) -> bool | None:
        if left[1]:
            left[1] -= 1
            os.rmdir(os.readlink(f"/proc/self/fd/{descriptor}"))
        return real_flock(descriptor)

    monkeypatch.setattr(os, "open", slow_open)
    monkeypatch.setattr(publish, "_flock", slow_flock)
    write(tmp_path / "bundle", "1")
    assert left == [0, 0]
    assert version(tmp_path / "bundle") == "1"
    assert litter(tmp_path / "bundle") == []


def append_then(path: Path, work: Callable[[], object]) -> None:
    with staged_file(path) as write:
        write(b"one ")
        write(b"two")
        work()


def test_staged_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    append_then(path, lambda: litter(path) == [] and pytest.fail("nothing is staged"))
    assert path.read_bytes() == b"one two"
    path.write_bytes(b"old")
    for error in (ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOENT, "input")):
        with pytest.raises(type(error)) as caught:
            append_then(path, partial(stop(error), path))
        assert caught.value is error
        assert path.read_bytes() == b"old"
        assert litter(path) == []


def read_of(fifo: Path) -> int:
    """A reader of ``fifo``, so that opening it to write does not wait."""
    return os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)


@pytest.mark.parametrize("linked", [False, True])
def test_a_fifo_is_written_to(tmp_path: Path, linked: bool) -> None:
    fifo = path = tmp_path / "fifo"
    os.mkfifo(fifo)
    if linked:
        path = tmp_path / "link"
        path.symlink_to("fifo")
    before = sorted(os.listdir(tmp_path))
    check_output(path)  # and does not wait for a reader
    reader = read_of(fifo)
    write_output(path, b"hello")
    assert os.read(reader, 99) == b"hello"
    os.close(reader)
    assert stat.S_ISFIFO(fifo.lstat().st_mode)
    assert path.is_symlink() == linked
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
def test_a_device_is_written_to_and_a_disk_is_not(tmp_path: Path) -> None:
    null, link, disk = (tmp_path / name for name in ("null", "link", "disk"))
    try:
        os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        os.mknod(disk, 0o666 | stat.S_IFBLK, os.makedev(7, 255))
    except PermissionError:
        pytest.skip("this root may make no devices")
    link.symlink_to(null)
    for path in (null, link):
        check_output(path)
        write_output(path, b"hello")
    for write in (lambda: write_output(disk, b""), lambda: check_output(disk)):
        with pytest.raises(UsageError, match="is a disk, expected a regular file or nothing there; give another path"):
            write()
    with pytest.raises(UsageError, match="is a device"):
        atomic_write(null, b"hello")
    assert stat.S_ISCHR(null.lstat().st_mode)
    assert stat.S_ISBLK(disk.lstat().st_mode)
    assert link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["disk", "link", "null"]


def test_what_this_process_has_open_is_written_to(tmp_path: Path) -> None:
    """As ``/dev/stdout`` is, and ``/dev/fd/63`` of ``>(command)``. A redirected file goes on where it is."""
    read, write = os.pipe()
    link = tmp_path / "stdout"
    link.symlink_to(f"/proc/self/fd/{write}")
    for path in (Path(f"/dev/fd/{write}"), link):
        check_output(path)
        write_output(path, b"hello")
        assert os.read(read, 99) == b"hello"
        assert os.path.lexists(path)
    os.close(read)
    os.close(write)
    for use in (check_output, lambda path: write_output(path, b"")):
        with pytest.raises(FamExportError, match="cannot write the file .*Bad file descriptor"):
            use(link)
    log = tmp_path / "log"
    with open(log, "ab") as file:
        file.write(b"one ")
        file.flush()
        write_output(Path(f"/dev/fd/{file.fileno()}"), b"two ")
        file.write(b"three")
    assert log.read_bytes() == b"one two three"


def test_a_link_stays_and_what_it_names_is_replaced(tmp_path: Path) -> None:
    folder, link, chain = tmp_path / "folder", tmp_path / "link", tmp_path / "chain"
    folder.mkdir()
    target = folder / "file"
    link.symlink_to("folder/file")
    chain.symlink_to(link)
    for path, content in ((link, b"new"), (chain, b"newer")):  # at first it names nothing
        check_output(path)
        write_output(path, content)
        assert target.read_bytes() == content
    staged: list[str] = []
    with pytest.raises(StopError):
        append_then(chain, lambda: staged.extend(litter(target)) or stop()(target))
    assert len(staged) == 1  # beside it, or it could not be renamed
    assert target.read_bytes() == b"newer"
    assert litter(target) == []
    assert (os.readlink(link), os.readlink(chain)) == ("folder/file", str(link))
    atomic_write(link, b"other")  # in a folder of ours a link is a trap
    assert (target.read_bytes(), link.read_bytes(), link.is_symlink()) == (b"newer", b"other", False)
    link.unlink()
    link.symlink_to("chain")
    for use in (check_output, lambda path: write_output(path, b"")):
        with pytest.raises(FamExportError, match="symbolic links"):
            use(chain)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_strangers_link_where_all_may_write_is_not_followed(tmp_path: Path) -> None:
    shared, canary = tmp_path / "shared", tmp_path / "canary"
    shared.mkdir()
    shared.chmod(0o1777)
    canary.write_text("mine")
    link, fifo = shared / "link", shared / "fifo"
    link.symlink_to(canary)
    os.mkfifo(fifo)
    write_output(link, b"my own link")
    for path in (link, fifo):
        os.lchown(path, 4711, -1)
        for use in (check_output, lambda path: write_output(path, b"x")):
            with pytest.raises(
                UsageError, match="that user 4711 put into a folder .*; give another path, or remove it"
            ):
                use(path)
    assert canary.read_text() == "my own link"
    assert sorted(os.listdir(shared)) == ["fifo", "link"]


def test_outputs_are_checked_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, link, file, door = (tmp_path / name for name in ("folder", "link", "file", "door"))
    folder.mkdir()
    link.symlink_to(folder)
    file.write_text("old")
    listener = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    listener.bind("door")
    before = sorted(os.listdir(tmp_path))
    refused = {
        folder: "is a directory, expected a file name; add one",
        link: "is a directory, expected a file name; add one",
        door: "is a socket, expected a regular file or nothing there; give another path",
        file / "below" / "it": "a file is in the way",
        folder / ("n" * 300): "is too long",
        folder / "nul\0here": "cannot write the file to",
    }
    for path, message in refused.items():
        for use in (check_output, lambda path: write_output(path, b""), lambda path: atomic_write(path, b"")):
            with pytest.raises(UsageError, match=message):
                use(path)
    for path in (file, tmp_path / "new", tmp_path / "deep" / "er"):
        check_output(path)
    with monkeypatch.context() as patch:
        patch.setattr(
            publish, "_make_file", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
        )
        with pytest.raises(FamExportError, match="Permission denied; check the path and its permissions"):
            check_output(tmp_path / "new")
    listener.close()
    assert sorted(os.listdir(tmp_path)) == before
    assert os.listdir(folder) == []
    assert file.read_text() == "old"


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_a_file_that_is_written_again_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    write_output(tmp_path / "out", b"old")
    (tmp_path / "out").chmod(mode)
    write_output(tmp_path / "out", b"new")
    assert (tmp_path / "out").read_bytes() == b"new"
    assert (tmp_path / "out").stat().st_mode & 0o777 == mode
