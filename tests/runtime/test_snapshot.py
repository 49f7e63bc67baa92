"""A saved stream goes on bit for bit, in another process too; what does not fit or is damaged is refused by name (R10)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import digests, random_input, same_state

import famexport as fx
from famexport.errors import FamExportError, SnapshotError, UsageError
from famexport.runtime import snapshot as snapshot_module
from famexport.runtime.session import Session

Sessions = Callable[..., Any]
BLOCKS, HERE = 1000, Path(__file__).parent


@pytest.mark.parametrize("name", ["text", "all_last"])  # one layer each: block_step alone, and all graphs
def test_cut_anywhere_and_continued_in_a_new_process(
    sessions: Sessions, bundles: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """N = 1,000 blocks cut at 0, 1, 137, 999 and 20 random blocks, and each time in the middle of one as well."""
    session = sessions(name)
    fed = random_input(session.contract, 8 * BLOCKS)
    blocks = [0, 1, 137, 999, *np.random.default_rng(0).integers(0, BLOCKS, 20).tolist()]
    cuts = sorted({8 * b + inside for i, b in enumerate(blocks) for inside in (0, 1 + i % 7)})
    np.save(tmp_path / "all.npy", fed)
    wanted, jobs = [], []
    pieces = np.split(fed, cuts, axis=1)
    with session.stream() as stream:
        for i, piece in enumerate(pieces):
            state, inputs = tmp_path / f"{i}.state", tmp_path / f"{i}.npy"
            stream.snapshot().save(state)
            np.save(inputs, np.concatenate(pieces[i : i + 3], axis=1))
            lengths = np.cumsum([p.shape[1] for p in pieces[i : i + 3]])[:-1].tolist()
            jobs.append([str(state), str(inputs), lengths])
            with session.stream() as uncut:
                uncut.restore(stream.snapshot())
                wanted.append(digests(uncut, pieces[i : i + 3]))
            for _ in stream.feed([piece]):
                pass
        assert stream.blocks == BLOCKS
        # the uncut stream itself, not a copy of it, is what the last job must equal
        with session.stream() as again:
            last = [digests(again, [piece]) for piece in pieces][-1]
            assert wanted[-1] == last
            assert same_state(stream, again)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    root = str(Path(fx.__file__).parents[1])
    command = [sys.executable, str(HERE / "snapshot_child.py"), str(bundles(name)), str(tmp_path / "jobs.json")]
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{HERE}"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=env)
    assert [json.loads(line) for line in done.stdout.splitlines()] == wanted


@pytest.mark.parametrize("backend", ["ort-cpu", "torch"])
@pytest.mark.parametrize("name", ["all", "all_rows", "plain", "rows", "bf16", "fp16", "no_fam", "no_memory"])
@pytest.mark.parametrize("held", [0, 3])
def test_save_load_and_continue_both(sessions: Sessions, tmp_path: Path, name: str, backend: str, held: int) -> None:
    session = sessions(name, backend)
    with session.stream() as stream, session.stream() as other:
        rows = stream.batch
        list(stream.feed([random_input(session.contract, 40 + held, rows, seed=1)]))
        list(other.feed([random_input(session.contract, 29, rows, seed=2)]))  # must not shine through
        other.restore(fx.Snapshot.load(stream.snapshot().save(tmp_path / "state")))
        assert same_state(stream, other)
        assert (other.blocks, other.held) == (stream.blocks, stream.held) == (5, held)
        assert np.array_equal(stream.last_logits, other.last_logits)
        for seed in (3, 4):
            fed = [random_input(session.contract, 13, rows, seed=seed)]
            assert digests(stream, fed) == digests(other, fed)


@pytest.mark.parametrize("name", ["all", "plain"])
def test_a_fork_shares_nothing(sessions: Sessions, name: str) -> None:
    session = sessions(name)
    with session.stream() as stream, session.stream() as a, session.stream() as b:
        list(stream.feed([random_input(session.contract, 21, seed=1)]))
        saved = stream.snapshot()
        kept = {key: array.copy() for key, array in saved.state.items()}
        for fork in (a, b):
            fork.restore(saved)
        same, other = random_input(session.contract, 20, seed=2), random_input(session.contract, 20, seed=3)
        assert digests(a, [same]) == digests(stream, [same]) != digests(b, [other])
        assert all(np.array_equal(saved.state[key], array) for key, array in kept.items())
        for array in saved.state.values():
            array[...] = 0
        fresh = session.stream()
        a.restore(replace(saved, state=kept))
        fresh.restore(replace(saved, state=kept))
        assert digests(fresh, [same, other]) == digests(a, [same, other])


def test_another_model_batch_or_engine_is_refused_by_name(sessions: Sessions) -> None:
    with sessions("all").stream() as stream:
        list(stream.feed([random_input(stream.contract, 19, seed=1)]))
        saved = stream.snapshot()
    with sessions("plain").stream() as plain:
        list(plain.feed([random_input(plain.contract, 24, seed=1)]))
        at_boundary = plain.snapshot()
    cases = [
        (saved, sessions("all_rows"), {}, "a batch of 1, this stream has 3"),
        (saved, sessions("no_memory"), {}, "it has the state 'past_key_00', which this model lacks"),
        (saved, sessions("no_fam"), {"any_engine": True}, "it is of model "),
        (saved, sessions("fp16"), {"any_engine": True}, "its state past_key_00 differs in dtype or shape"),
        (saved, sessions("all", "torch"), {}, r"it was taken on ort-cpu .* this is torch .*--any-engine"),
        (saved, sessions("plain"), {}, "it was taken on ort-cpu"),  # the same weights, other graphs
        (saved, sessions("plain"), {"any_engine": True}, "3 positions as keys and values, this bundle has block_step"),
    ]
    for snapshot, session, options, says in cases:
        with session.stream() as stream, session.stream() as spared:
            for s in (stream, spared):
                list(s.feed([random_input(session.contract, 11, s.batch, seed=2)]))
            with pytest.raises(SnapshotError, match=says):
                stream.restore(snapshot, **options)
            assert same_state(stream, spared)
            fed = [random_input(session.contract, 11, stream.batch, seed=3)]
            assert digests(stream, fed) == digests(spared, fed)
    with sessions("all").stream() as stream:  # at a boundary there is nothing that only one of them has
        stream.restore(at_boundary, any_engine=True)
        assert stream.blocks == 3


def test_a_snapshot_without_an_open_block_ends_the_one_that_is_open(sessions: Sessions) -> None:
    """A bundle with block_step alone has no state of it, so that nothing is written over what was there."""
    session = sessions("all")
    with sessions("plain").stream() as plain:
        list(plain.feed([random_input(plain.contract, 24, seed=1)]))
        saved = plain.snapshot()
    with session.stream() as stream, session.stream() as fresh:
        list(stream.feed([random_input(session.contract, 13, seed=2)]))
        assert stream.held == 5
        for s in (stream, fresh):
            s.restore(saved, any_engine=True)
        assert (stream.held, stream.blocks) == (0, 3)
        assert same_state(stream, fresh)
        fed = [random_input(session.contract, 21, seed=3)]
        assert digests(stream, fed) == digests(fresh, fed)


def test_of_a_module_of_ones_own_the_graph_is_the_model(sessions: Sessions) -> None:
    """The same weights under another graph are another model, which no ``any_engine`` lets through."""
    session, name = sessions("plain"), "block_step.onnx"

    def own(sha256: str) -> Session:
        manifest = session.bundle.manifest
        files = {**manifest.files, name: replace(manifest.files[name], sha256=sha256)}
        return Session(replace(session.bundle, manifest=replace(manifest, config=None, files=files)), session.backend)

    with own("0" * 64).stream() as stream, own("0" * 64).stream() as same, own("1" * 64).stream() as other:
        list(stream.feed([random_input(stream.contract, 11, seed=1)]))
        same.restore(stream.snapshot())
        assert same_state(same, stream)
        with pytest.raises(SnapshotError, match="it is of model "):
            other.restore(stream.snapshot(), any_engine=True)
        assert other.blocks == 0


def test_on_another_backend_within_tolerance(sessions: Sessions) -> None:
    """Measured: 2e-6 on logits of order 1."""
    fed = random_input(sessions("all").contract, 60, seed=1)
    with sessions("all").stream() as stream, sessions("all", "torch").stream() as other:
        list(stream.feed([fed[:, :29]]))
        other.restore(stream.snapshot(), any_engine=True)
        got, wanted = (np.concatenate(list(s.feed([fed[:, 29:]])), axis=1) for s in (other, stream))
        assert np.allclose(got, wanted, rtol=1e-4, atol=1e-4)
        assert not np.array_equal(got, wanted)  # or else the engine need not be named


@pytest.fixture
def saved(sessions: Sessions, tmp_path: Path) -> Path:
    with sessions("all").stream() as stream:
        list(stream.feed([random_input(stream.contract, 21, seed=1)]))
        return stream.snapshot().save(tmp_path / "state")


def test_damage_is_a_typed_error(saved: Path, tmp_path: Path) -> None:
    """300 seeded bit flips and 60 truncations: refused, or (in the padding of the header) the same snapshot."""
    data, whole = saved.read_bytes(), fx.Snapshot.load(saved)
    rng, path = np.random.default_rng(0), tmp_path / "damaged"
    header = 8 + int.from_bytes(data[:8], "little")
    places = [*rng.integers(0, header, 200).tolist(), *rng.integers(header, len(data), 100).tolist()]
    refused = 0
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            loaded = fx.Snapshot.load(path)
        except SnapshotError:
            refused += 1
            continue
        assert place < header  # damaged data is always refused
        assert loaded.origin.contract == whole.origin.contract
        assert {k: v.tobytes() for k, v in loaded.state.items()} == {k: v.tobytes() for k, v in whole.state.items()}
    assert refused > 250
    for size in (0, 1, 7, 8, 9, header - 1, header, *rng.integers(0, len(data), 53).tolist()):
        path.write_bytes(data[:size])
        with pytest.raises(SnapshotError):
            fx.Snapshot.load(path)


def test_another_schema_and_no_snapshot_at_all(saved: Path, bundles: Callable[[str], Path], tmp_path: Path) -> None:
    data = saved.read_bytes()
    old = b'\\"schema_version\\": 1, \\"sha256'
    assert old in data
    (tmp_path / "new").write_bytes(data.replace(old, old.replace(b"1", b"2")))
    with pytest.raises(SnapshotError, match="schema version 2, expected 1"):
        fx.Snapshot.load(tmp_path / "new")
    with pytest.raises(SnapshotError, match=r"weights\.safetensors is not a snapshot"):
        fx.Snapshot.load(bundles("all") / "weights.safetensors")
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UsageError, match=r"no such file: .*; write a snapshot with stream\.snapshot\(\)\.save"):
            fx.Snapshot.load(path)


def rewritten(saved: Path, path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Path:
    """``saved`` with its header changed: the tensors, and what the snapshot says of itself (or that as a text)."""
    data = saved.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    about = json.loads(header["__metadata__"]["famexport.snapshot"])
    header["__metadata__"]["famexport.snapshot"] = change(header, about) or json.dumps(about)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return path


def test_nothing_is_read_before_all_is_checked(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file claims a terabyte that its contract does not know, or of a state in another shape."""
    size = 2**40

    def unknown(header: dict[str, Any], _: dict[str, Any]) -> None:
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        header["zz"] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}

    def larger(header: dict[str, Any], _: dict[str, Any]) -> None:
        last = max((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        begin = header[last]["data_offsets"][0]
        width = {"F32": 4, "I64": 8}[header[last]["dtype"]]
        header[last] |= {"shape": [size // width], "data_offsets": [begin, begin + size]}

    read: list[str] = []
    monkeypatch.setattr(snapshot_module, "read_tensor", lambda path, entry: read.append(entry.name))
    for change, says in ((unknown, "unknown tensor 'zz'"), (larger, r"is \w+ \[\d{10,}\], expected")):
        path = rewritten(saved, tmp_path / "sparse", change)
        with open(path, "r+b") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(begin - 8))
            entries.pop("__metadata__")
            file.truncate(begin + max(entry["data_offsets"][1] for entry in entries.values()))
        with pytest.raises(SnapshotError, match=says):
            fx.Snapshot.load(path)
    assert read == []


def test_headers_that_are_no_text_or_a_terminals_commands(saved: Path, tmp_path: Path) -> None:
    def half(*_: dict[str, Any]) -> str:
        return "\ud800"

    def command(_: dict[str, Any], about: dict[str, Any]) -> None:
        about["engine"] = "\x1b]0;owned\x07"

    def long(_: dict[str, Any], about: dict[str, Any]) -> None:
        about["engine"] = "x" * 1000

    def state(_: dict[str, Any], about: dict[str, Any]) -> None:
        about["contract"]["states"][-1]["name"] = "past_z\x1b[2J"

    cases = (
        (half, "damaged safetensors header"),
        (command, r"its header has engine '\\x1b.*, expected at most 500 plain characters"),
        (long, "its header has engine 'xxx"),
        (state, r"tensor 'past_z\\x1b\[2J' is missing"),
    )
    for change, says in cases:
        with pytest.raises(SnapshotError, match=says) as caught:
            fx.Snapshot.load(rewritten(saved, tmp_path / "changed", change))
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 2000


def test_a_writer_that_dies_leaves_the_old_file(
    saved: Path, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()
    with sessions("all").stream() as stream:
        list(stream.feed([random_input(stream.contract, 30, seed=9)]))
        snapshot = stream.snapshot()
    real = snapshot_module.write_tensors

    def dying(write: Callable[[bytes], None], *args: Any, **options: Any) -> Any:
        def some(data: bytes) -> None:
            write(bytes(data)[: len(data) // 2])
            raise RuntimeError("killed")

        return real(some, *args, **options)

    monkeypatch.setattr(snapshot_module, "write_tensors", dying)
    with pytest.raises(RuntimeError, match="killed"):
        snapshot.save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["state"]
    with pytest.raises(FamExportError):
        snapshot.save(saved.parent)
