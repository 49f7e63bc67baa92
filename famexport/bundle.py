"""The directory that ships: a manifest, and files that are checked against it before anything parses them (R1, R2, R3).

``open_bundle`` goes from cheap to dear and stops after the first stage that finds problems, naming all of that stage:
the manifest; what the directory holds; sizes and SHA-256; what the graphs say about themselves.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from famexport.contract import GRAPH_KEY, METADATA_KEY, StepContract
from famexport.engines import EngineEntry
from famexport.errors import BundleError, ContractError, FamExportError, UntrustedError, UsageError
from famexport.manifest import (
    AGAIN,
    ENGINES,
    KIND,
    MAKE_ONE,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    name_problems,
    report_problems,
    strict_json,
)
from famexport.onnx_wire import graph_facts
from famexport.publish import atomic_write

MAX_GRAPH_BYTES, CHUNK_BYTES = 2**31 - 1, 2**20
SUBGRAPH_OPS = {"If", "Loop", "Scan", "SequenceMap"}
# Operators that a graph may have besides ONNX's own. Others can hold code: EPContext carries an engine (R5).
OPERATORS = {
    "com.microsoft": (
        "FastGelu", "FusedMatMul", "Gelu", "MatMulIntegerToFloat", "MatMulNBits", "MultiHeadAttention", "QuickGelu",
        "RotaryEmbedding",
    ),
    "famexport": (
        "BlockMemory", "BlockMemorySplit", "GatedAct", "NormThinGated", "NormThinMatMul", "SkipNorm", "ThinGated",
        "ThinMatMul", "TokenAttention",
    ),
}  # fmt: skip

Signature = tuple[int, ...]  # device, inode, size, times of writing and change: a file that keeps them kept its content


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. ``id`` is the SHA-256 of the manifest's bytes, and so of all but the engines."""

    path: Path
    manifest: Manifest
    id: str
    _checked: dict[str, Signature] = field(default_factory=dict, repr=False, compare=False)

    @property
    def contract(self) -> StepContract:
        return self.manifest.contract

    def read(self, name: str) -> bytes:
        """The content of a file; size and hash are checked on the very bytes returned.

        Raises:
            BundleError: no such name in the manifest, or the file is not what the manifest says.
        """
        entry = self._entry(name)
        with _directory(self.path) as folder, _about(self.path):
            return _read(folder, name, entry, keep=True).data

    def file(self, name: str) -> Path:
        """The path of a file, which is checked now unless it was checked before and did not change since.

        Raises:
            BundleError: as ``read``.
        """
        self._entry(name)
        with _directory(self.path) as folder:
            try:
                same = self._checked.get(name) == _signature_of(folder, name)
            except OSError:
                same = False
            if not same:
                self._check(folder, [name])
        return self.path / name

    def is_unchanged(self) -> bool:
        """Whether files that were checked still hold what was checked: for whoever opened them by their paths since."""
        try:
            for name in list(self._checked):
                self.file(name)
        except FamExportError:
            return False
        return True

    def _entry(self, name: str) -> FileEntry:
        if name not in self.manifest.files:
            raise BundleError(f"{self.path} has no file {name!r:.80}; it has {', '.join(sorted(self.manifest.files))}")
        return self.manifest.files[name]

    def _trust(self, folder: int, hashes: Mapping[Signature, FileEntry]) -> None:
        """Take files that hashed to what the manifest says as checked; graphs not, they are looked into as well."""
        for name in self.manifest.files.keys() - self.manifest.graph_files():
            with suppress(OSError):  # whoever asks for the file is told
                signature = _signature_of(folder, name)
                if hashes.get(signature) == self.manifest.files[name]:
                    self._checked[name] = signature

    def _check(self, folder: int, names: Iterable[str], progress: Callable[[int, int], None] | None = None) -> None:
        """Hash files; only if all are as expected, look into the graphs among them."""
        entries = {name: self.manifest.files[name] for name in names}
        total, done, problems = sum(entry.bytes for entry in entries.values()), 0, list[str]()
        graphs = dict.fromkeys(sorted(self.manifest.graph_files() & set(entries)), b"")
        seen = {}

        def tick(count: int) -> None:
            nonlocal done
            done += count
            if progress:
                progress(done, total)

        for name, entry in entries.items():
            if name in graphs and entry.bytes > MAX_GRAPH_BYTES:
                problems.append(f"{name} has {entry.bytes} bytes; an ONNX file has at most {MAX_GRAPH_BYTES}")
                continue
            try:
                content = _read(folder, name, entry, keep=name in graphs, tick=tick)
            except BundleError as exc:
                problems.append(str(exc))
                continue
            seen[name] = content.signature
            if name in graphs:
                graphs[name] = content.data
        report_problems(str(self.path), problems)
        for name, data in graphs.items():
            problems += _graph_problems(name, data, self.manifest)
        report_problems(str(self.path), problems)
        self._checked.update(seen)


def open_bundle(
    path: str | Path,
    *,
    verify: bool = True,
    hashes: Mapping[Signature, FileEntry] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Bundle:
    """Open a bundle and check it.

    Args:
        verify: hash all files and check the graphs now. Otherwise only the manifest, the names and the sizes are
            checked, and ``Bundle.file`` and ``Bundle.read`` check each file when it is asked for.
        hashes: from ``describe_files``: files that have not changed since are not read again.
        progress: called with (bytes hashed, bytes in all).
    Raises:
        UsageError: no such path.
        BundleError: not a bundle, or not as it was published; everything wrong is named.
    """
    for attempt in (1, 2, 3):
        with _directory(path) as folder:
            try:
                data = _manifest_bytes(path, folder)
                manifest = Manifest.parse(data, f"{path}: {MANIFEST}")
                report_problems(str(path), _listing_problems(folder, manifest))
                bundle = Bundle(Path(os.path.abspath(path)), manifest, hashlib.sha256(data).hexdigest())
                bundle._trust(folder, hashes or {})
                if verify:
                    bundle._check(folder, [name for name in manifest.files if name not in bundle._checked], progress)
                return bundle
            except BundleError:
                if attempt == 3 or _is_still(path, folder):
                    raise  # otherwise someone published a new bundle here while this one was read
    raise AssertionError("unreachable")


def is_bundle(path: Path) -> bool:
    """Whether ``path`` is a directory with the manifest of a bundle, sound or not: one that an export may replace."""
    try:
        with _directory(path) as folder:
            tree = strict_json(_manifest_bytes(path, folder), MANIFEST)
    except FamExportError:
        return False
    return isinstance(tree, dict) and tree.get("kind") == KIND


def describe_files(directory: Path, hashes: dict[Signature, FileEntry] | None = None) -> dict[str, FileEntry]:
    """Size and hash of everything in ``directory``, for ``Manifest.files``.

    Args:
        hashes: takes them by the files' signatures, for ``open_bundle`` once the directory is published.
    Raises:
        BundleError: a name that may not be in a bundle, or something other than a regular file.
    """
    with _directory(directory) as folder:
        names = sorted(name for name in os.listdir(folder) if name not in (MANIFEST, ENGINES))
        report_problems(str(directory), [problem for name in names for problem in name_problems(name)])
        with _about(directory):
            contents = {name: _read(folder, name) for name in names}
    if hashes is not None:
        hashes.update({content.signature: content.entry for content in contents.values()})
    return {name: content.entry for name, content in contents.items()}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest, after every other file is in place.

    Raises:
        BundleError: the manifest breaks its own rules, or the directory holds something else than it says.
    """
    data = manifest.to_bytes()
    with _directory(directory) as folder:
        report_problems(str(directory), _listing_problems(folder, manifest))
    atomic_write(directory / MANIFEST, data)


def engine_bytes(bundle: Bundle, entry: EngineEntry) -> bytes:
    """The plan of an engine; size and hash are checked on the very bytes returned.

    Raises:
        UntrustedError: it is not there as it was built; an engine is code, so it is not loaded.
    """
    try:
        with _directory(bundle.path / ENGINES / entry.target) as folder:
            return _read(folder, entry.file, FileEntry(entry.bytes, entry.sha256), keep=True).data
    except FamExportError as exc:
        raise UntrustedError(
            f"the engine {entry.name} of {bundle.path} is not as it was built: {exc}; build it again with: "
            f"famexport build {bundle.path} --target {entry.target} --engine {entry.engine}"
        ) from exc


@contextmanager
def _about(path: str | Path) -> Iterator[None]:
    """Say which bundle an error is about."""
    try:
        yield
    except BundleError as exc:
        raise BundleError(f"{path}: {exc}; {AGAIN}") from exc


@contextmanager
def _directory(path: str | Path) -> Iterator[int]:
    """A descriptor of the directory: names are looked up in it, whatever its path comes to mean meanwhile."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as exc:
        if isinstance(exc, NotADirectoryError) and os.path.lexists(path):
            raise BundleError(f"{path} is a file, expected the directory of a bundle; {MAKE_ONE}") from exc
        if isinstance(exc, PermissionError):
            raise BundleError(f"{path} cannot be read: {exc.strerror}; check its permissions") from exc
        raise UsageError(f"there is no bundle at {str(path)!r:.200}; {MAKE_ONE}") from exc
    try:
        yield folder
    finally:
        os.close(folder)


def _is_still(path: str | Path, folder: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(folder))
    except OSError:
        return False


def _manifest_bytes(path: str | Path, folder: int) -> bytes:
    if MANIFEST not in os.listdir(folder):
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}; {MAKE_ONE}")
    with _about(path), _opened(folder, MANIFEST) as (descriptor, _):
        return os.read(descriptor, MAX_MANIFEST_BYTES + 1)


def _listing_problems(folder: int, manifest: Manifest) -> list[str]:
    present, expected = set(os.listdir(folder)) - {MANIFEST}, set(manifest.files)
    problems = [f"{name} is missing" for name in sorted(expected - present)]
    for name in sorted(present):
        try:
            info = os.lstat(name, dir_fd=folder)
        except OSError as exc:
            problems.append(f"{name!r:.80} cannot be read: {exc.strerror}")
            continue
        if name in expected:
            problems += _file_problems(name, info, manifest.files[name].bytes)
        elif not (name == ENGINES and stat.S_ISDIR(info.st_mode)):  # what no manifest names in there is never read
            problems.append(f"{name!r:.80} is not in the manifest")
    return problems


def _file_problems(name: str, info: os.stat_result, size: int | None) -> list[str]:
    if not stat.S_ISREG(info.st_mode):
        got = "a symbolic link" if stat.S_ISLNK(info.st_mode) else "no regular file"
        return [f"{name} is {got}, expected a regular file"]
    if info.st_nlink != 1:
        return [f"{name} has {info.st_nlink} hard links, expected a file of its own"]
    if size is not None and info.st_size != size:
        return [f"{name} has {info.st_size} bytes, expected {size}"]
    return []


def _signature(info: os.stat_result) -> Signature:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _signature_of(folder: int, name: str) -> Signature:
    return _signature(os.stat(name, dir_fd=folder, follow_symlinks=False))


@contextmanager
def _opened(folder: int, name: str, size: int | None = None) -> Iterator[tuple[int, os.stat_result]]:
    """Open a regular file and nothing else; a FIFO or device does not block, a link is not followed."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, dir_fd=folder)
    except OSError as exc:
        got = "is a symbolic link" if exc.errno == errno.ELOOP else f"cannot be opened ({exc.strerror})"
        raise BundleError(f"{name} {got}, expected a regular file") from exc
    try:
        info = os.fstat(descriptor)
        for problem in _file_problems(name, info, size):
            raise BundleError(problem)
        yield descriptor, info
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class _Content:
    entry: FileEntry
    data: bytes
    signature: Signature  # before the first byte was read


def _read(
    folder: int,
    name: str,
    expected: FileEntry | None = None,
    *,
    keep: bool = False,
    tick: Callable[[int], None] = lambda count: None,
) -> _Content:
    """Hash a file in constant memory, or with ``keep`` return the bytes that were hashed."""
    digest, kept, size, buffer = hashlib.sha256(), bytearray(), 0, memoryview(bytearray(CHUNK_BYTES))
    with _opened(folder, name, expected.bytes if expected else None) as (descriptor, info):
        while True:
            try:
                count = os.readv(descriptor, [buffer])
            except OSError as exc:
                raise BundleError(f"{name} cannot be read: {exc.strerror}") from exc
            if not count or (expected and size > expected.bytes):
                break
            size += count
            digest.update(buffer[:count])
            if keep:
                kept += buffer[:count]
            tick(count)
    entry = FileEntry(size, digest.hexdigest())
    if expected and entry != expected:
        raise BundleError(
            f"{name} has {size} bytes with SHA-256 {entry.sha256}, expected {expected.bytes} with {expected.sha256}"
        )
    return _Content(entry, bytes(kept), _signature(info))


def _is_known(domain: str, kind: str) -> bool:
    return kind in OPERATORS.get(domain, ()) if domain else kind != "EPContext"


def _graph_problems(name: str, data: bytes, manifest: Manifest) -> list[str]:
    """What a graph says about itself against what the manifest says."""
    try:
        facts = graph_facts(data)
    except BundleError as exc:
        return [f"{name}: {exc}"]
    problems = []
    if strange := facts.external_locations - {manifest.weights}:
        problems.append(f"{name} refers to data in {sorted(strange)!r:.200}, expected only {manifest.weights!r}")
    elif facts.external and manifest.weights:
        end, size = max(d.offset + (d.length or 0) for d in facts.external), manifest.files[manifest.weights].bytes
        if end > size:
            problems.append(f"{name} refers to byte {end} of {manifest.weights}, which has {size}")
    text = facts.metadata.get(METADATA_KEY)
    if text is None:
        problems.append(f"{name} carries no contract (metadata key {METADATA_KEY!r})")
    else:
        try:
            if StepContract.from_dict(strict_json(text.encode(), "contract")) != manifest.contract:
                problems.append(f"{name} carries a contract that differs from the manifest's")
        except (BundleError, ContractError) as exc:
            problems.append(f"{name} carries a damaged contract: {exc}")
    expected = {n: graph for graph, files in manifest.graphs.items() for n in (files.file, *files.variants.values())}
    if (graph := facts.metadata.get(GRAPH_KEY)) != expected[name]:
        problems.append(f"{name} says it is {graph!r:.80}, the manifest has it as {expected[name]}")
    control = SUBGRAPH_OPS & {kind for _, kind in facts.operators}
    if control or facts.subgraphs:
        what = ", ".join(sorted(control)) or "graphs in nodes"
        problems.append(f"{name} uses {what}; a step graph has no control flow")
    if strangers := [f"{domain}.{kind}" for domain, kind in facts.operators if not _is_known(domain, kind)]:
        problems.append(
            f"{name} uses {sorted(strangers)!r:.200}; besides ONNX's own, only operators that famexport uses are loaded"
        )
    if name in {graph.file for graph in manifest.graphs.values()}:
        got, wanted = (facts.opset, facts.ir_version), (manifest.opset, manifest.ir_version)
        if got != wanted:
            problems.append(f"{name} has opset and IR version {got}, the manifest says {wanted}")
    return problems
