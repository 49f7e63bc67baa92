from __future__ import annotations

import subprocess
import sys

import pytest

from famexport.checkpoint import init_checkpoint, open_checkpoint
from famexport.config import preset
from famexport.convert import convert
from famexport.errors import CheckpointError, InvalidInputError, UsageError


@pytest.fixture
def source(tmp_path):
    return init_checkpoint(tmp_path / "source", preset("tiny"))


@pytest.mark.parametrize("name", ["nothing/at/all", "/nothing", "nothing.gguf", "a/b.gguf", "a b/c", "../x", "x"])
def test_no_such_path(name, tmp_path, monkeypatch):
    monkeypatch.setattr("famexport.convert.hf.download", lambda name: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no such path"):
        convert(name, tmp_path / "out")


def test_a_misspelt_local_path_is_no_hub_id(source, tmp_path, monkeypatch):
    monkeypatch.setattr("famexport.convert.hf.download", lambda name: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no such path"):
        convert("source/modle", "out")


def test_hub_id(source, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def fake(name, **options):
        asked.update(options, name=name)
        return str(source)

    monkeypatch.setattr(hub, "snapshot_download", fake)
    open_checkpoint(convert("owner/name-1.5B", tmp_path / "out"))
    assert asked["name"] == "owner/name-1.5B"
    allowed = set(asked["allow_patterns"])
    assert {"config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json"} <= allowed
    assert not [pattern for pattern in allowed if pattern.endswith((".bin", ".py", ".pt", ".pth", "*", ".pkl"))]


def test_hub_errors_are_one_typed_error(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    for error in (OSError("no route to host\nmore"), ValueError("odd"), ConnectionError()):

        def fail(name, error=error, **options):
            raise error

        monkeypatch.setattr(hub, "snapshot_download", fail)
        with pytest.raises(UsageError, match=rf"owner/name is no local path.*{type(error).__name__}.*offline"):
            convert("owner/name", tmp_path / "out")


def test_offline_is_said(tmp_path):
    pytest.importorskip("huggingface_hub")
    code = f"from famexport.convert import convert; convert('owner/name', {str(tmp_path / 'out')!r})"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "UsageError: owner/name is no local path, and the hub does not give it" in done.stderr.splitlines()[-1]


def test_a_source_is_never_replaced(source, tmp_path):
    before = (source / "model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(source)
    for target in (source, source / ".", tmp_path / "link", tmp_path, source / ".." / "source"):
        with pytest.raises(UsageError, match="would replace its own source"):
            convert(source, target)
    (tmp_path / "source" / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="would replace its own source"):
        convert(source / "m.gguf", source)
    assert (source / "model.safetensors").read_bytes() == before


def test_targets(source, tmp_path):
    convert(source, tmp_path / "new" / "deep")
    convert(source, tmp_path / "new" / "deep")  # an earlier checkpoint is replaced
    for name in ("file", "foreign", "plain"):
        path = tmp_path / name
        if name == "file":
            path.write_text("x")
        elif name == "foreign":
            path.mkdir()
            (path / "thesis.txt").write_text("x")
        else:  # somebody's Hugging Face model
            path.mkdir()
            (path / "config.json").write_text("{}")
            (path / "model.safetensors").write_bytes(b"x")
        with pytest.raises(UsageError, match="expected nothing there"):
            convert(source, path)
    assert (tmp_path / "plain/model.safetensors").read_bytes() == b"x"


def test_files_that_are_no_models(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x" * 50)
    with pytest.raises(UsageError, match="is not a model"):
        convert(tmp_path / "a.bin", tmp_path / "out")
    (tmp_path / "a.gguf").write_bytes(b"x" * 50)
    (tmp_path / "b.bin").write_bytes(b"GGUF" + b"x" * 50)  # known by its magic bytes
    for name in ("a.gguf", "b.bin"):
        with pytest.raises(InvalidInputError):
            convert(tmp_path / name, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        convert(tmp_path / "empty", tmp_path / "out")


def test_progress_reaches_the_end(source, tmp_path):
    calls = []
    convert(source, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] > 0
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_import_is_light():
    code = "import sys, famexport.convert, famexport.text; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"torch", "transformers", "gguf", "tokenizers", "huggingface_hub", "safetensors"}
