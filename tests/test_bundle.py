"""A bundle is opened only if every byte of it is as it was published (rules R1, R2, R3)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from famexport import bundle as bundle_module
from famexport import onnx_wire
from famexport.bundle import Bundle, Signature, describe_files, is_bundle, open_bundle, write_manifest
from famexport.contract import GRAPH_KEY, METADATA_KEY, StepContract, TensorSpec
from famexport.errors import BundleError, UsageError
from famexport.manifest import KIND, FileEntry, GraphFiles, Manifest, check_name, strict_json
from famexport.publish import staged_directory

WEIGHTS, GRAPH, VARIANT = "weights.safetensors", "block_step.onnx", "block_step.ort-cpu.onnx"
CONTRACT = StepContract(
    block_size=2,
    memory_segments=1,
    fam_length=1,
    vocab_size=3,
    batch=1,
    logits="all",
    inputs=(TensorSpec("tokens", "int64", (1, 2)),),
    states=(TensorSpec("past_count", "int64", (1,)),),
)


def graph_bytes(
    *,
    op: str = "Identity",
    domain: str = "",
    body: bool = False,
    location: str = WEIGHTS,
    length: int = 16,
    contract: str | None = None,
    name: str | None = "block_step",
    opset: int = 20,
) -> bytes:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": str(length)}.items():
        weight.external_data.add(key=key, value=value)
    nodes = [helper.make_node(op, ["w"], ["y"], domain=domain)]
    if body:
        nodes[0].attribute.append(helper.make_attribute("body", helper.make_graph([], "body", [], [])))
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    model = helper.make_model(
        helper.make_graph(nodes, "step", [], [out], [weight]), opset_imports=[helper.make_opsetid("", opset)]
    )
    model.ir_version = 10
    about = {METADATA_KEY: contract or CONTRACT.to_json(), GRAPH_KEY: name}
    about = {key: value for key, value in about.items() if value is not None and contract != ""}
    helper.set_model_props(model, about)
    data: bytes = model.SerializeToString()
    return data


def fill(folder: Path, **graph: Any) -> None:
    (folder / GRAPH).write_bytes(graph_bytes(**graph))
    (folder / VARIANT).write_bytes(graph_bytes(**{"opset": 21, **graph}))
    (folder / WEIGHTS).write_bytes(np.arange(1000, dtype=np.float32).tobytes())
    (folder / "golden.safetensors").write_bytes(b"golden")
    (folder / "tokenizer.json").write_bytes(b"{}")


def manifest_of(folder: Path, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "contract": CONTRACT,
        "config": {"model_type": "llama", "rope": {"theta": 1e-05, "scale": [1, 2.5, None, True]}},
        "fam_trained": False,
        "precision": "fp32",
        "opset": 20,
        "ir_version": 10,
        "graphs": {"block_step": GraphFiles(GRAPH, {"ort-cpu": VARIANT})},
        "weights": WEIGHTS,
        "tokenizer": "tokenizer.json",
        "golden": "golden.safetensors",
        "files": describe_files(folder),
        "versions": {"famexport": "0.1.0", "torch": "2.13"},
        "parity": {"worst": 1.5e-06, "blocks": 256, "note": "größte"},
        "cost": {"flops_per_block": 12345678901},
    }
    return Manifest(**{**fields, **changes})


def make(path: Path, **graph: Any) -> Path:
    with staged_directory(path, is_bundle, "bundle") as staged:
        fill(staged, **graph)
        write_manifest(staged, manifest_of(staged))
    return path


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make(tmp_path / "bundle")


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Bytes handed to the graph parser."""
    calls: list[bytes] = []
    real = onnx_wire.graph_facts

    def record(data: bytes) -> Any:
        calls.append(data)
        return real(data)

    monkeypatch.setattr(bundle_module, "graph_facts", record)
    return calls


# -- a good bundle


def test_round_trip(made: Path, parsed: list[bytes]) -> None:
    reports: list[tuple[int, int]] = []
    opened = open_bundle(str(made), progress=lambda done, total: reports.append((done, total)))
    assert opened.path == made
    assert opened.contract == CONTRACT
    assert opened.manifest == manifest_of(made)
    assert opened.id == hashlib.sha256((made / "manifest.json").read_bytes()).hexdigest()
    total = sum(entry.bytes for entry in opened.manifest.files.values())
    assert reports[-1] == (total, total)
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    assert sorted(parsed) == sorted([(made / GRAPH).read_bytes(), (made / VARIANT).read_bytes()])
    assert opened.read(WEIGHTS) == (made / WEIGHTS).read_bytes()
    assert opened.file(GRAPH) == made / GRAPH
    for bad in ("manifest.json", "../secret", "nothing", ""):
        with pytest.raises(BundleError, match="has no file"):
            opened.read(bad)
        with pytest.raises(BundleError, match="has no file"):
            opened.file(bad)
    assert is_bundle(made)


def test_the_same_manifest_gives_the_same_bytes(made: Path) -> None:
    manifest = manifest_of(made)
    data = manifest.to_bytes()
    assert data == (made / "manifest.json").read_bytes()
    backwards = {name: manifest.files[name] for name in reversed(manifest.files)}
    assert dataclasses.replace(manifest, files=backwards).to_bytes() == data
    assert Manifest.parse(data) == manifest
    assert Manifest.parse(data).to_bytes() == data


def test_minimal_manifest(tmp_path: Path) -> None:
    (tmp_path / GRAPH).write_bytes(b"x")
    graphs = {"block_step": GraphFiles(GRAPH)}
    none = dict.fromkeys(("config", "fam_trained", "weights", "tokenizer", "golden"))
    manifest = manifest_of(tmp_path, graphs=graphs, versions={}, parity={}, cost={}, **none)
    assert Manifest.parse(manifest.to_bytes()) == manifest


def test_without_verify_files_are_checked_when_asked_for(made: Path, parsed: list[bytes]) -> None:
    (made / GRAPH).write_bytes(flip((made / GRAPH).read_bytes(), 99))
    opened = open_bundle(made, verify=False)
    assert opened.file(WEIGHTS) == made / WEIGHTS
    for ask in (opened.file, opened.read):
        with pytest.raises(BundleError, match=r"block_step\.onnx has .* SHA-256"):
            ask(GRAPH)
    assert parsed == []
    assert opened.file(VARIANT) == made / VARIANT
    assert len(parsed) == 1


def test_a_file_that_changes_after_opening_is_noticed(made: Path) -> None:
    opened = open_bundle(made)
    (made / WEIGHTS).write_bytes(flip((made / WEIGHTS).read_bytes(), 5))
    for ask in (opened.file, opened.read):
        with pytest.raises(BundleError, match=r"weights.safetensors has .* SHA-256 .*again"):
            ask(WEIGHTS)
    shutil.rmtree(made)
    for ask in (opened.file, opened.read):
        with pytest.raises(UsageError, match="there is no bundle"):
            ask(WEIGHTS)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read."""
    names: list[str] = []
    real = bundle_module._read

    def record(folder: int, name: str, *arguments: Any, **options: Any) -> Any:
        names.append(name)
        return real(folder, name, *arguments, **options)

    monkeypatch.setattr(bundle_module, "_read", record)
    return names


def publish(path: Path, **changes: Any) -> dict[Signature, FileEntry]:
    hashes: dict[Signature, FileEntry] = {}
    with staged_directory(path, is_bundle, "bundle") as staged:
        fill(staged)
        files = describe_files(staged, hashes)
        write_manifest(staged, manifest_of(staged, **{"files": files, **changes}))
    return hashes


def test_what_was_hashed_before_it_was_published_is_not_read_again(made: Path, hashed: list[str]) -> None:
    hashes = publish(made)  # in the place of another
    hashed.clear()
    opened = open_bundle(made, hashes=hashes)
    assert sorted(hashed) == [GRAPH, VARIANT]  # what they say is checked against the manifest
    assert opened.file(WEIGHTS) == made / WEIGHTS
    assert open_bundle(made, hashes=hashes, verify=False).file(WEIGHTS) == made / WEIGHTS
    assert sorted(hashed) == [GRAPH, VARIANT]
    assert open_bundle(made) == opened
    assert sorted(hashed[2:]) == sorted(opened.manifest.files)


@pytest.mark.parametrize("when", ["in place", "another file", "before it is opened without verify"])
def test_a_file_that_changes_between_hashing_and_opening_is_noticed(made: Path, when: str) -> None:
    hashes, file = publish(made), made / WEIGHTS
    before = file.stat()
    data = flip(file.read_bytes(), 5)
    if when == "another file":
        file.unlink()
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BundleError, match=r"weights.safetensors has 4000 bytes with SHA-256"):
        open_bundle(made, hashes=hashes, verify=not when.startswith("before")).file(WEIGHTS)


def test_a_hash_that_is_not_the_manifests_is_noticed(made: Path) -> None:
    """Whatever was hashed: the manifest is what counts."""
    wrong = {name: FileEntry(e.bytes, "0" * 64) if name == WEIGHTS else e for name, e in describe_files(made).items()}
    hashes = publish(made, files=wrong)
    with pytest.raises(BundleError, match=f"weights.safetensors has 4000 bytes .* expected 4000 with {'0' * 64}"):
        open_bundle(made, hashes=hashes)


def test_hashing_takes_constant_memory(tmp_path: Path) -> None:
    import tracemalloc

    with (tmp_path / "big").open("wb") as file:
        file.truncate(64 * 2**20)
    tracemalloc.start()
    try:
        entry = describe_files(tmp_path)["big"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert entry == FileEntry(64 * 2**20, hashlib.sha256(bytes(64 * 2**20)).hexdigest())
    assert peak < 4 * 2**20


def test_a_bundle_replaced_while_it_is_read(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, once = bundle_module._listing_problems, list[int]()

    def replace_first(folder: int, manifest: Manifest) -> list[str]:
        if not once:
            once.append(1)
            shutil.rmtree(made)  # as a writer does with the old directory once the new one is in place
            make(made, opset=20)
        return real(folder, manifest)

    monkeypatch.setattr(bundle_module, "_listing_problems", replace_first)
    assert open_bundle(made).read(GRAPH) == graph_bytes()


# -- the manifest


def flip(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_every_prefix_and_1000_bit_flips_of_a_manifest(made: Path) -> None:
    """Thanks to the checksum this holds for free text and numbers too: an error, or the very same manifest."""
    data = (made / "manifest.json").read_bytes()
    manifest, rng, same, slowest = Manifest.parse(data), random.Random(0), 0, 0.0
    damaged = [data[:size] for size in range(len(data))]
    damaged += [flip(data, bit) for bit in rng.sample(range(8 * len(data)), 1000)]
    for case in damaged:
        start = time.perf_counter()
        try:
            assert Manifest.parse(case) == manifest
            same += 1
        except BundleError:
            pass
        slowest = max(slowest, time.perf_counter() - start)
    assert 0 < same < 50  # the last prefix lacks only the newline; some flips turn a newline into another space
    assert slowest < 1


def edited(manifest: Manifest, edit: Callable[[dict[str, Any]], object]) -> bytes:
    """A manifest changed by ``edit``, with a checksum that fits: damage cannot do this, only intent."""
    tree = json.loads(manifest.to_bytes())
    edit(tree)
    tree.pop("checksum")
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    tree["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(tree).encode()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update(extra=1), "manifest has the unknown key 'extra'"),
        (lambda t: t.pop("parity"), "manifest lacks the key 'parity'"),
        (lambda t: t.update(schema_version=2), "schema version 2, expected 1; export again or upgrade"),
        (lambda t: t.update(schema_version=True), "schema version True, expected 1"),
        (lambda t: t.update(kind="other"), f"expected kind {KIND!r}; make a bundle with: famexport export"),
        (lambda t: t.update(config=[]), "config of manifest must be dict or NoneType, got list"),
        (lambda t: t.update(fam_trained=1), "fam_trained of manifest must be bool or NoneType, got int"),
        (lambda t: t.update(opset=True), "opset of manifest must be int, got bool"),
        (lambda t: t.update(opset=0), "opset is 0, expected at least 1"),
        (lambda t: t.update(ir_version=10.0), "ir_version of manifest must be int, got float"),
        (lambda t: t.update(precision="fp64"), "precision is 'fp64', expected one of fp32, fp16"),
        (lambda t: t["contract"].update(block_size=0), "block_size must be at least 1"),
        (lambda t: t["contract"].update(extra=0), "unknown key 'extra'"),
        (lambda t: t["graphs"].update(append_step={"file": GRAPH, "variants": {}}), "graphs are .* the contract has"),
        (lambda t: t["graphs"]["block_step"].update(extra=0), "graph 'block_step' has the unknown key 'extra'"),
        (lambda t: t["graphs"]["block_step"].update(file="x.onnx"), "names the file 'x.onnx', which is not in files"),
        (lambda t: t["graphs"]["block_step"].update(variants={"trt": {}}), "names the file {}, which is not in files"),
        (lambda t: t.update(weights="w"), "weights names the file 'w', which is not in files"),
        (lambda t: t.update(golden="g"), "golden names the file 'g', which is not in files"),
        (lambda t: t.update(versions={"a": 1}), "versions must be strings"),
        (lambda t: t["files"][WEIGHTS].update(bytes=-1), f"file '{WEIGHTS}' has -1 bytes"),
        (lambda t: t["files"][WEIGHTS].update(bytes=True), "bytes of file .* must be int, got bool"),
        (lambda t: t["files"][WEIGHTS].update(sha256="A" * 64), "expected 64 hexadecimal digits"),
        (lambda t: t["files"][WEIGHTS].update(mode=0), "has the unknown key 'mode'"),
        (lambda t: t["files"].update(more=[]), "file 'more' must be an object, got list"),
    ],
)
def test_manifest_rules(made: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        Manifest.parse(edited(manifest_of(made), edit))
    assert "checksum" not in str(caught.value)


def test_all_problems_are_reported_at_once(made: Path) -> None:
    def edit(tree: dict[str, Any]) -> None:
        tree.update(precision="x", opset=0, weights="w", more=1)
        del tree["cost"]

    with pytest.raises(BundleError, match="5 problems") as caught:
        Manifest.parse(edited(manifest_of(made), edit))
    for part in ("precision is", "opset is", "weights names", "'more'", "'cost'", "export again"):
        assert part in str(caught.value)
    many = {f"k{i}" * 30: 1 for i in range(1000)}
    with pytest.raises(BundleError, match="1000 problems, of which the first 50 are") as caught:
        Manifest.parse(edited(manifest_of(made), lambda tree: tree.update(many)))
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
        ("[" * 40 + "]" * 40, "nests deeper than 32"),
        ('{"a": {"b": 1, "b": 2, "c": 1, "c": 1, "c": 1}}', "2 problems: key 'b' occurs 2 times; key 'c' occurs 3"),
        ("NaN", "not finite"),
        ("[-Infinity]", "not finite"),
        ("1e999", "not finite"),
        ("9" * 20, "does not fit 64 bits"),
        ("-" + "9" * 900_000, "does not fit 64 bits"),
        (r'"\ud800"', "not valid JSON"),
        (r'{"\ud800": 1}', "not valid JSON"),
        ("{} {}", "not valid JSON"),
        ('"\n"', "not valid JSON"),
    ],
)
def test_strict_json(text: str, message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(BundleError, match=message):
        strict_json(text.encode(), "data")
    assert time.perf_counter() - start < 1
    with pytest.raises(BundleError):
        Manifest.parse(text.encode())


def test_strict_json_reads_json() -> None:
    text = '{"a": [1, -9223372036854775, 1.5, 1e-5, "größte", true, null, {}], "b": {"a": 1}}'
    assert strict_json(text.encode(), "data") == json.loads(text)
    for data in (b"\xff", '"x"'.encode("utf-16"), b"\xef\xbb\xbf{}"):
        with pytest.raises(BundleError, match="not valid JSON"):
            strict_json(data, "data")


def test_size_limit(made: Path) -> None:
    big = dataclasses.replace(manifest_of(made), parity={"text": "x" * 2**20})
    with pytest.raises(BundleError, match="expected at most 1048576"):
        big.to_bytes()
    with pytest.raises(BundleError, match="expected at most 1048576"):
        Manifest.parse(b" " * (2**20 + 1))
    (made / "manifest.json").write_bytes((made / "manifest.json").read_bytes() + b" " * 2**20)
    with pytest.raises(BundleError, match="expected at most 1048576"):
        open_bundle(made)


def test_a_manifest_that_could_not_be_read_is_not_written(made: Path) -> None:
    nested: list[Any] = []
    for _ in range(2000):
        nested = [nested]
    for bad in (float("nan"), np.int64(1), {1, 2}, "\ud800", 2**70, nested, b"x"):
        with pytest.raises(BundleError):
            dataclasses.replace(manifest_of(made), parity={"value": bad}).to_bytes()
    with pytest.raises(BundleError, match="precision"):
        dataclasses.replace(manifest_of(made), precision="x").to_bytes()


def test_write_manifest_wants_the_files_it_names(made: Path) -> None:
    manifest, before = manifest_of(made), (made / "manifest.json").read_bytes()
    (made / "extra").touch()
    with pytest.raises(BundleError, match="'extra' is not in the manifest"):
        write_manifest(made, manifest)
    (made / "extra").unlink()
    (made / WEIGHTS).write_bytes(b"")
    with pytest.raises(BundleError, match="has 0 bytes, expected 4000"):
        write_manifest(made, manifest)
    assert (made / "manifest.json").read_bytes() == before


# -- names

BAD_NAMES = ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", ".hidden", "nul\0", "x" * 201, "x" * 300]
BAD_NAMES += ["manifest.json", "engines", "new\nline", "name\n", "größe", "sp ace", "~", "-\x7f"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names(made: Path, name: str, parsed: list[bytes]) -> None:
    canary = made.parent / "x"
    canary.write_text("untouched")
    with pytest.raises(BundleError, match=r"file name .* is not allowed"):
        check_name(name)

    def edit(tree: dict[str, Any]) -> None:
        tree["files"][name] = tree["files"].pop(WEIGHTS)
        tree["weights"] = name

    (made / "manifest.json").write_bytes(edited(manifest_of(made), edit))
    with pytest.raises(BundleError, match=r"file name .* is not allowed"):
        open_bundle(made)
    manifest = manifest_of(made)
    files = {**manifest.files, name: FileEntry(0, "0" * 64)}
    with pytest.raises(BundleError):
        write_manifest(made, dataclasses.replace(manifest, files=files))
    assert parsed == []
    assert canary.read_text() == "untouched"


def test_good_names() -> None:
    for name in ("a", "A-b_c.onnx", "x" * 200, "-", "manifest.json.bak"):
        check_name(name)


# -- the directory


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(BundleError) as caught:
        open_bundle(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)


def test_what_is_no_bundle(tmp_path: Path) -> None:
    for missing in (tmp_path / "nothing", tmp_path / ("x" * 300), Path("nul\0")):
        with pytest.raises(UsageError, match="famexport export CKPT -o BUNDLE"):
            open_bundle(missing)
        assert not is_bundle(missing)
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is a file", "famexport export CKPT -o BUNDLE")
    with pytest.raises(UsageError):
        open_bundle(tmp_path / "file" / "deeper")
    refused(tmp_path, "no manifest.json", "famexport export CKPT -o BUNDLE")
    assert not is_bundle(tmp_path)
    for text in ("", "[]", '{"kind": "other"}', '{"kind": "famexport-bundle"', '{"kind": ["famexport-bundle"]}'):
        (tmp_path / "manifest.json").write_text(text)
        refused(tmp_path, "manifest.json")
        assert not is_bundle(tmp_path)
    (tmp_path / "manifest.json").write_text('{"kind": "famexport-bundle"}')
    assert is_bundle(tmp_path)  # broken, but ours: an export may replace it
    (tmp_path / "manifest.json").rename(tmp_path / "elsewhere")
    (tmp_path / "manifest.json").symlink_to("elsewhere")
    refused(tmp_path, "manifest.json")
    assert not is_bundle(tmp_path)


FILES = [GRAPH, VARIANT, WEIGHTS, "golden.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("name", FILES)
def test_truncated_flipped_and_missing_files(made: Path, name: str, parsed: list[bytes]) -> None:
    path, rng = made / name, random.Random(name)
    data, digest = path.read_bytes(), hashlib.sha256(path.read_bytes()).hexdigest()
    for size in {0, 1, len(data) // 2, len(data) - 1} - {len(data)}:
        path.write_bytes(data[:size])
        refused(made, f"{name} has {size} bytes, expected {len(data)}", "again")
    path.write_bytes(data + b"x")
    refused(made, f"{name} has {len(data) + 1} bytes, expected {len(data)}")
    for _ in range(20):
        path.write_bytes(flip(data, rng.randrange(8 * len(data))))
        refused(made, f"{name} has {len(data)} bytes with SHA-256", digest, "again")
    path.unlink()
    refused(made, f"{name} is missing")
    assert parsed == []
    path.write_bytes(data)
    open_bundle(made)


def test_swapped_and_extra_files(made: Path, parsed: list[bytes]) -> None:
    first, second = (made / GRAPH).read_bytes(), (made / VARIANT).read_bytes()
    assert len(first) == len(second)  # only the hash can tell
    (made / GRAPH).write_bytes(second)
    (made / VARIANT).write_bytes(first)
    refused(made, "2 problems", f"{GRAPH} has", f"{VARIANT} has")
    (made / GRAPH).write_bytes(first)
    (made / VARIANT).write_bytes(second)
    (made / ".hidden").touch()
    (made / "engines").mkdir()
    os.mkdir(os.fsencode(made) + b"/\xff\n")
    refused(made, "2 problems", "'.hidden' is not in the manifest", r"'\udcff\n' is not")
    assert parsed == []


def test_an_engines_directory_is_allowed_and_nothing_else_of_that_name(made: Path) -> None:
    write_manifest(made, manifest_of(made))
    (made / "engines").symlink_to("/")
    refused(made, "'engines' is not in the manifest")
    (made / "engines").unlink()
    (made / "engines").mkdir()  # where a build was killed before the manifest named its engines
    assert open_bundle(made).manifest.engines == {}
    (made / "engines").rmdir()
    (made / "engines").touch()
    refused(made, "'engines' is not in the manifest")


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_links_and_special_files(made: Path, name: str, parsed: list[bytes]) -> None:
    path, canary = made / name, made.parent / "canary"
    shutil.copy(path, canary)
    before = canary.read_bytes()
    opened = open_bundle(made)
    parsed.clear()

    def check(message: str) -> None:
        start = time.perf_counter()
        refused(made, name, message)
        if name != "manifest.json":
            for ask in (opened.read, opened.file):
                with pytest.raises(BundleError, match=name):
                    ask(name)
        assert time.perf_counter() - start < 1  # a FIFO must not block
        assert parsed == []
        assert canary.read_bytes() == before

    path.unlink()
    path.symlink_to(canary)
    check("is a symbolic link")
    path.unlink()
    path.hardlink_to(canary)
    check("has 2 hard links")
    path.unlink()
    os.mkfifo(path)
    check("regular file")
    path.unlink()
    path.mkdir()
    check("regular file")


def test_staging_is_held_to_the_same_rules(tmp_path: Path) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "folder"
    canary.write_text("untouched")
    folder.mkdir()
    odd = folder / "weights"
    for plant in (odd.symlink_to, odd.hardlink_to, lambda _: os.mkfifo(odd), lambda _: odd.mkdir()):
        plant(canary)
        with pytest.raises(BundleError, match="weights"):
            describe_files(folder)
        odd.rmdir() if odd.is_dir() else odd.unlink()
    (folder / ".hidden").touch()
    with pytest.raises(BundleError, match=r"'\.hidden' is not allowed"):
        describe_files(folder)
    (folder / ".hidden").unlink()
    (folder / "manifest.json").symlink_to(canary)
    fill(folder)
    write_manifest(folder, manifest_of(folder))  # replaces the link, does not write through it
    assert canary.read_text() == "untouched"
    open_bundle(folder)


# -- graphs against the manifest


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ({"location": "../canary"}, "refers to data in ['../canary'], expected only 'weights.safetensors'"),
        ({"location": "/etc/passwd"}, "refers to data in ['/etc/passwd']"),
        ({"location": "golden.safetensors"}, "refers to data in ['golden.safetensors']"),
        ({"location": "*/_ORT_MEM_ADDR_/*"}, "refers to data in ['*/_ORT_MEM_ADDR_/*']"),
        ({"length": 4001}, "refers to byte 4001 of weights.safetensors, which has 4000"),
        ({"contract": ""}, "carries no contract"),
        ({"contract": "{"}, "carries a damaged contract"),
        ({"contract": "[]"}, "carries a damaged contract"),
        ({"contract": dataclasses.replace(CONTRACT, vocab_size=4).to_json()}, "differs from the manifest's"),
        ({"name": "commit_block"}, "says it is 'commit_block', the manifest has it as block_step"),
        ({"name": None}, "says it is None, the manifest has it as block_step"),
        ({"op": "If"}, "uses If; a step graph has no control flow"),
        ({"op": "Loop"}, "uses Loop"),
        ({"op": "Scan"}, "uses Scan"),
        ({"op": "Sampling", "domain": "com.microsoft"}, "uses ['com.microsoft.Sampling']; besides ONNX's own"),
        ({"op": "EPContext", "domain": "com.microsoft"}, "uses ['com.microsoft.EPContext']"),  # an engine
        ({"op": "EPContext"}, "uses ['.EPContext']"),
        ({"op": "SkipNorm", "domain": "trt.plugins"}, "uses ['trt.plugins.SkipNorm']"),
        ({"op": "Gelu", "body": True}, "uses graphs in nodes; a step graph has no control flow"),
        ({"opset": 19}, "has opset and IR version (19, 10), the manifest says (20, 10)"),
    ],
)
def test_graph_rules(tmp_path: Path, graph: dict[str, Any], message: str) -> None:
    made = make(tmp_path / "bundle", **graph)
    refused(made, f"{GRAPH} ", message, "again")
    opened = open_bundle(made, verify=False)
    with pytest.raises(BundleError):
        opened.file(GRAPH)


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_operators_of_onnx_may_say_so(tmp_path: Path, domain: str) -> None:
    open_bundle(make(tmp_path / "bundle", domain=domain))
    open_bundle(make(tmp_path / "another", op="FastGelu", domain="com.microsoft"))


@pytest.mark.parametrize("name", ["block_step.ort", "block_step", "block_step.onnx.ort", "block_step.ONNX"])
def test_a_graph_is_an_onnx_file_by_name(made: Path, name: str) -> None:
    """onnxruntime chooses its parser by it, and one file can be sound in two formats."""
    manifest = manifest_of(made)
    (made / GRAPH).rename(made / name)
    (made / "manifest.json").unlink()
    files = {name if key == GRAPH else key: entry for key, entry in manifest.files.items()}
    graphs = {"block_step": dataclasses.replace(manifest.graphs["block_step"], file=name)}
    with pytest.raises(BundleError, match="expected one that ends in .onnx"):
        write_manifest(made, dataclasses.replace(manifest, files=files, graphs=graphs))


def test_a_variant_is_checked_too_and_all_graphs_are_reported(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    fill(folder)
    (folder / GRAPH).write_bytes(numpy_helper.from_array(np.zeros(3)).SerializeToString())
    (folder / VARIANT).write_bytes(graph_bytes(op="Loop", location="elsewhere"))
    write_manifest(folder, manifest_of(folder))
    refused(folder, "3 problems", f"{GRAPH}: ONNX file", f"{VARIANT} refers to", f"{VARIANT} uses Loop")


def test_external_data_without_a_weight_file(made: Path) -> None:
    write_manifest(made, manifest_of(made, weights=None))
    refused(made, "refers to data in ['weights.safetensors'], expected only None")


def test_the_id_covers_every_byte(made: Path, tmp_path: Path) -> None:
    ids = {open_bundle(made).id, open_bundle(make(tmp_path / "same")).id}
    assert len(ids) == 1
    write_manifest(made, manifest_of(made, parity={"worst": 0.0}))
    assert open_bundle(made).id not in ids
    assert isinstance(open_bundle(made), Bundle)
