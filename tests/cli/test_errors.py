"""What a new user gets wrong: one line on stderr with what was got, what was expected and what to type; the exit code."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from famexport.cli import _run, main
from famexport.cli.options import MAX_THREADS
from famexport.errors import BundleError

ROOT = Path(__file__).parents[2]
Paths = Callable[[str], Path]
USAGE, INVALID, INCOMPATIBLE, NUMERIC, INTERRUPTED = 2, 3, 5, 6, 130


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(code: int, *arguments: object, says: tuple[str, ...] = ()) -> str:
        """Run a command that must fail with ``code``, nothing on stdout and one line on stderr; return that line."""
        capsys.readouterr()
        got = _run([str(argument) for argument in arguments], False)
        out, err = capsys.readouterr()
        assert (got, out) == (code, ""), err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert "Traceback" not in err
        for text in says:
            assert text in err
        return err

    return run


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return give


@pytest.fixture
def no_litter(tmp_path: Path) -> Iterator[None]:
    """Nothing hidden is left beside the targets."""
    yield
    assert [path for path in tmp_path.rglob(".*")] == []


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Paths


@pytest.mark.parametrize("command", ["run", "bench", "verify", "inspect"])
def test_a_path_that_does_not_exist(fails: Callable[..., str], tmp_path: Path, command: str) -> None:
    fails(USAGE, command, tmp_path / "none", says=(str(tmp_path / "none"),))


def test_what_is_not_a_bundle_or_checkpoint(fails: Callable[..., str], tmp_path: Path, checkpoints: Paths) -> None:
    fails(INVALID, "verify", tmp_path, says=("is not a bundle", "famexport export CKPT -o BUNDLE"))
    fails(INVALID, "verify", checkpoints("plain"), says=("is not a bundle", "famexport export CKPT -o BUNDLE"))
    fails(
        INVALID, "verify", checkpoints("plain") / "config.json", says=("is a file, expected the directory of a bundle",)
    )
    fails(INVALID, "inspect", tmp_path, says=("holds neither manifest.json (a bundle) nor config.json (a checkpoint)",))
    (tmp_path / "notes.txt").write_text("hello")
    fails(
        INVALID,
        "inspect",
        tmp_path / "notes.txt",
        says=("is not a bundle, a checkpoint, an .onnx, a .safetensors or a .plan",),
    )
    fails(USAGE, "export", tmp_path / "none", "-o", tmp_path / "out", says=("no such path", "none"))
    fails(INVALID, "export", tmp_path, "-o", tmp_path / "out", says=("has no config.json", "Hugging Face form"))
    assert not (tmp_path / "out").exists()


def test_a_path_of_several_lines_is_still_one(fails: Callable[..., str], tmp_path: Path) -> None:
    fails(USAGE, "inspect", tmp_path / "a\nb", says=("a b",))


# Damaged and foreign input


@pytest.mark.parametrize("file", ["weights.safetensors", "block_step.onnx", "manifest.json", "golden.safetensors"])
def test_a_truncated_file_in_a_bundle(fails: Callable[..., str], bundles: Paths, tmp_path: Path, file: str) -> None:
    copy = Path(shutil.copytree(bundles("plain"), tmp_path / "bundle"))
    data = (copy / file).read_bytes()
    (copy / file).write_bytes(data[: len(data) // 2])
    for command in (["verify"], ["run", "-i", os.devnull], ["bench", "--blocks", "2"], ["inspect"]):
        fails(INVALID, command[0], copy, *command[1:], says=(str(copy), file, "again"))


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors"])
def test_inspect_a_damaged_file(fails: Callable[..., str], bundles: Paths, tmp_path: Path, suffix: str) -> None:
    good = bundles("plain") / {".onnx": "block_step.onnx", ".safetensors": "weights.safetensors"}[suffix]
    path = tmp_path / f"a{suffix}"
    for data in (b"", b"hello" * 9, good.read_bytes()[:-1], b"\xff" * 100):
        path.write_bytes(data)
        fails(INVALID, "inspect", path, says=(path.name,))


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors", ".plan"])
def test_inspect_does_not_wait_for_a_fifo(bundles: Paths, tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"a{suffix}")
    with process("inspect", tmp_path / f"a{suffix}") as child:
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (INVALID, "")
    assert f"a{suffix} is no regular file" in err


def test_inspect_a_plan_outside_of_a_bundle(
    fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.plan").write_bytes(b"some bytes")
    says = ("is in no bundle; expected BUNDLE/engines/TARGET/p.plan",)
    fails(INVALID, "inspect", tmp_path / "p.plan", says=says)
    monkeypatch.setattr(os.path, "abspath", lambda path: "/p.plan")  # too few folders to go up
    fails(INVALID, "inspect", tmp_path / "p.plan", says=says)


def test_configurations_that_are_not_implemented(
    fails: Callable[..., str], checkpoints: Paths, tmp_path: Path, no_litter: None
) -> None:
    copy = Path(shutil.copytree(checkpoints("plain"), tmp_path / "ckpt"))
    config = json.loads((copy / "config.json").read_text())

    def export(says: tuple[str, ...], **changes: Any) -> None:
        (copy / "config.json").write_text(json.dumps({**config, **changes}))
        for command in (["export", copy, "-o", tmp_path / "out"], ["inspect", copy]):
            fails(INVALID, *command, says=says)
        assert not (tmp_path / "out").exists()

    export(("['MambaForCausalLM'] is not supported", "LlamaForCausalLM"), architectures=["MambaForCausalLM"])
    export(("famexport convert",), fam=None)
    export(("block_size", "fam_length"), fam={**config["fam"], "block_size": 0, "fam_length": -1})
    export(("weights do not fit config.json", "missing model.layers.2."), num_hidden_layers=3)
    export(("weights do not fit config.json", "has shape"), intermediate_size=65)
    (copy / "config.json").write_text("{")
    fails(INVALID, "export", copy, "-o", tmp_path / "out", says=("config.json is not valid JSON",))


def test_truncated_weights_in_a_checkpoint(fails: Callable[..., str], checkpoints: Paths, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoints("plain"), tmp_path / "ckpt"))
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:-4])
    fails(INVALID, "export", copy, "-o", tmp_path / "out", says=("model.safetensors",))
    (copy / "model.safetensors").unlink()
    fails(INVALID, "export", copy, "-o", tmp_path / "out", says=("has no *.safetensors file",))
    assert not (tmp_path / "out").exists()


# Input to run


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", ("the input is empty", "expected at least one token")),
        (b" \n\n", ("the input is empty",)),
        (
            b"Once upon a time",
            ("text where token ids are expected: 'Once'", "whitespace-separated integers", "tokenizer.json"),
        ),
        (b"1 2\n3 x4", ("line 2", "'x4'")),
        (b"1 2 3.5", ("'3.5'",)),
        (b"1 96 2", ("token id 96 at position 1", "vocabulary of 96")),
        (b"1 -1", ("token id -1 at position 1", "vocabulary of 96")),
        (b"\xff\xfe\x00", ("token ids",)),
    ],
)
def test_input_that_is_no_token_ids(
    fails: Callable[..., str],
    bundles: Paths,
    tmp_path: Path,
    stdin: Callable[[bytes], None],
    no_litter: None,
    data: bytes,
    says: tuple[str, ...],
) -> None:
    """From a file and from stdin; the file of scores does not appear."""
    (tmp_path / "input").write_bytes(data)
    stdin(data)
    for source in (tmp_path / "input", "-"):
        fails(INVALID, "run", bundles("plain"), "-i", source, "--scores", tmp_path / "scores", says=says)
        assert not (tmp_path / "scores").exists()


def test_input_files_that_cannot_be_read(fails: Callable[..., str], bundles: Paths, tmp_path: Path) -> None:
    plain, text = bundles("plain"), bundles("text")
    fails(USAGE, "run", plain, "-i", tmp_path / "none", says=("no such file", "none"))
    fails(USAGE, "run", plain, "-i", tmp_path, says=("cannot read", "directory"))
    fails(USAGE, "run", text, "-i", tmp_path, says=("cannot read", "directory"))
    np.save(tmp_path / "floats.npy", np.zeros(9))
    fails(INVALID, "run", plain, "-i", tmp_path / "floats.npy", says=("float64 [9]", "one axis of integers"))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "floats.npy").read_bytes()[:50])
    fails(INVALID, "run", plain, "-i", tmp_path / "cut.npy", says=("is not a .npy array of token ids",))
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    fails(INVALID, "run", text, "-i", tmp_path / "latin1.txt", says=("invalid UTF-8 at byte 3", "UTF-8"))
    fails(INVALID, "run", text, "-i", os.devnull, says=("the input is empty",))
    fails(INVALID, "run", plain, "-i", os.devnull, says=("the input is empty",))


def test_bundles_that_run_cannot_stream(
    fails: Callable[..., str], bundles: Paths, stdin: Callable[[bytes], None]
) -> None:
    stdin(b"1 2 3")
    fails(USAGE, "run", bundles("embeds"), says=("takes inputs_embeds", "drive it from Python"))
    fails(USAGE, "run", bundles("rows"), says=("a batch of 3", "--batch 1"))
    fails(USAGE, "run", bundles("last"), "--scores", "scores.txt", says=("--logits all",))
    assert not Path("scores.txt").exists()


# Options


@pytest.mark.parametrize("command", ["run", "bench", "verify"])
def test_an_unknown_backend(fails: Callable[..., str], bundles: Paths, command: str) -> None:
    fails(
        USAGE,
        command,
        bundles("plain"),
        "--backend",
        "cuda",
        says=("no backend 'cuda'", "auto, tensorrt, tensorrt-rtx, ort-cuda, ort-tensorrt, ort-cpu, torch"),
    )


def test_options_that_cannot_be(fails: Callable[..., str], bundles: Paths, checkpoints: Paths, tmp_path: Path) -> None:
    out, plain = tmp_path / "out", checkpoints("plain")
    twice = ["--backend", "torch", "--backend", "torch"]
    fails(USAGE, "bench", bundles("plain"), *twice, says=("named twice: torch, torch",))
    for batch in ("0", "-1", "many", "1.5", ""):
        fails(
            USAGE, "export", plain, "-o", out, "--batch", batch, says=("batch must be a positive number or 'dynamic'",)
        )
    fails(USAGE, "export", plain, "-o", out, "--opset", "12", says=("opset 12 is not supported", "20"))
    fails(USAGE, "init", "-o", out, "--preset", "huge", says=("no preset 'huge'", "tiny, edge"))
    fails(INVALID, "init", "-o", out, "--fam-length", "9", says=("fam_length (9) must not exceed block_size (8)",))
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["export"], "Missing"),
        (["export", "ckpt"], "-o"),
        (["export", "ckpt", "-o", "out", "--precision", "fp8"], "fp8"),
        (["export", "ckpt", "-o", "out", "--parity-blocks", "1"], "parity-blocks"),
        (["export", "ckpt", "-o", "out", "--tolerance", "-1"], "tolerance"),
        (["run", "bundle", "--threads", "0"], "threads"),
        (["chat", "bundle", "--threads", "100000"], f"less than or equal to {MAX_THREADS}"),
        (["bench", "bundle", "--blocks", "1"], "blocks"),
        (["init", "-o", "out", "--block-size", "no"], "--block-size"),
        (["verify", "bundle", "--no-such-option"], "--no-such-option"),
    ],
)
def test_what_typer_refuses(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Usage errors of the parser: Typer's own form, which ends in one line that starts with ``Error:``."""
    assert _run(arguments, False) == USAGE
    out, err = capsys.readouterr()
    assert out == ""
    *_, last = err.splitlines()
    assert last.startswith("Error: ")
    assert says in last
    assert "Usage: " in err


# Targets


def test_somebody_elses_directory_is_left_alone(
    fails: Callable[..., str], checkpoints: Paths, tmp_path: Path, no_litter: None
) -> None:
    theirs = tmp_path / "thesis"
    theirs.mkdir()
    (theirs / "chapter1.txt").write_text("years of work")
    model = Path(shutil.copytree(checkpoints("plain"), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "fam"}))
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to(theirs)
    before = listing(tmp_path)
    for target, says in (
        (theirs, "is a directory that is not a"),
        (model, "is a directory that is not a"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "link", "is a symbolic link"),
        (tmp_path / "file" / "below", "a file is in the way"),
    ):
        fails(USAGE, "export", checkpoints("plain"), "-o", target, says=(str(target), says))
        fails(USAGE, "init", "-o", target, says=(str(target), says))
    assert listing(tmp_path) == before
    fails(USAGE, "run", "bundle", "--scores", theirs, says=("is a directory, expected a file",))
    assert listing(tmp_path) == before


def test_where_no_file_can_be(fails: Callable[..., str], bundles: Paths, checkpoints: Paths) -> None:
    says = ("cannot write to /proc/out: nothing can be made in /proc; give a path in another directory",)
    fails(USAGE, "export", checkpoints("plain"), "-o", "/proc/out", says=says)
    fails(USAGE, "run", bundles("plain"), "--scores", "/proc/out", says=says)


@pytest.mark.parametrize("option", ["--scores", "--save-state", "--json", "--samples", "--html"])
def test_outputs_are_checked_before_the_work(
    fails: Callable[..., str], bundles: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    from famexport.bench import measure

    def work(*args: Any, **options: Any) -> None:
        pytest.fail("it worked first")

    read, write = os.pipe()
    os.write(write, b"1 2 3")
    os.close(write)
    monkeypatch.setattr(measure, "bench", work)
    command = "run" if option in ("--scores", "--save-state") else "bench"
    with open(read) as given:
        monkeypatch.setattr(sys, "stdin", given)
        fails(USAGE, command, bundles("plain"), option, tmp_path, says=(f"{tmp_path} is a directory, expected a file",))
        assert os.read(read, 99) == b"1 2 3"
    assert list(tmp_path.iterdir()) == []


def test_outputs_on_stdout(bundles: Paths, tmp_path: Path) -> None:
    with process("run", bundles("plain"), "-q", "--scores", "/dev/stdout", stdin=subprocess.PIPE) as child:
        out, err = child.communicate("1 2 3", timeout=60)
    assert (child.returncode, err) == (0, "")
    assert out.startswith("nan\n")
    assert len(out.splitlines()) == 3


@pytest.mark.parametrize("command", [["run"], ["chat"]])
def test_stdin_that_is_closed(bundles: Paths, command: list[str]) -> None:
    shell = ["/bin/sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-m", "famexport", *command, str(bundles("text"))]
    done = subprocess.run(shell, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert done.stderr.startswith("error: stdin is closed, expected something to read there")
    assert "--input" in done.stderr


# What files say, on a terminal


TRAP = "\x1b]0;pwned\x07\x9b31m\u202e"


def test_errors_hold_no_commands_for_a_terminal(
    fails: Callable[..., str], bundles: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    import famexport.runtime.selftest as selftest

    for error, code in ((BundleError, INVALID), (ZeroDivisionError, 1)):
        monkeypatch.setattr(selftest, "verify", lambda *_, e=error, **__: (_ for _ in ()).throw(e(f"tensor {TRAP} é")))
        said = fails(code, "verify", bundles("plain"), says=(r"\x1b]0;pwned\x07\x9b31m\u202e é",))
        assert said[:-1].isprintable()


def test_names_hold_no_commands_for_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx

    node = onnx.helper.make_node(f"Op{TRAP}", ["x"], ["y"], domain="other")
    graph = onnx.helper.make_graph([node], "g", [], [])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    onnx.helper.set_model_props(model, {f"key{TRAP}": f"value{TRAP}\nstep contract: yes"})
    path = tmp_path / f"{TRAP}.onnx"
    path.write_bytes(model.SerializeToString())
    assert _run(["inspect", str(path)], False) == 0
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.split("\n"))
    for word in ("Op", "key", "value"):
        assert rf"{word}\x1b]0;pwned\x07" in out
    assert r"\nstep contract: yes" in out


def test_too_small_a_tolerance(fails: Callable[..., str], checkpoints: Paths, tmp_path: Path, no_litter: None) -> None:
    options = ["--tolerance", "1e-12", "--parity-blocks", "2"]
    says = ("differs from the float32 torch step at block 0", "allowed is 1e-12", "nothing was published")
    fails(NUMERIC, "export", checkpoints("last"), "-o", tmp_path / "out", *options, says=says)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_device_is_a_numeric_error(
    fails: Callable[..., str], bundles: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    from famexport.runtime.ort import OrtLoop

    monkeypatch.setattr(OrtLoop, "commit", lambda self: None)
    says = ("golden rollout differs on this device", "allowed is")
    fails(NUMERIC, "verify", bundles("plain"), says=says)
    fails(NUMERIC, "verify", bundles("plain"), "--json", says=says)
    with monkeypatch.context() as patch:
        patch.setattr("famexport.bench.roofline.measure_ceilings", lambda: None)
        fails(NUMERIC, "bench", bundles("plain"), "--backend", "ort-cpu", "--backend", "torch", says=("disagree",))


@pytest.mark.parametrize(
    ("package", "extra", "arguments"),
    [
        ("onnxruntime", "cpu", ["verify", "BUNDLE"]),
        ("torch", "export", ["verify", "BUNDLE", "--backend", "torch"]),
        ("torch", "export", ["export", "CKPT", "-o", "OUT"]),
        ("onnx_ir", "export", ["export", "CKPT", "-o", "OUT"]),
        ("torch", "export", ["inspect", "CKPT"]),
        ("torch", "export", ["init", "-o", "OUT"]),
        ("tokenizers", "text", ["run", "TEXT", "-i", "TEXT/manifest.json"]),
    ],
)
def test_a_missing_package(
    bundles: Paths, checkpoints: Paths, tmp_path: Path, package: str, extra: str, arguments: list[str]
) -> None:
    """In a process where the package cannot be imported: which it is, and the command that adds it."""
    paths = {"BUNDLE": bundles("plain"), "TEXT": bundles("text"), "CKPT": checkpoints("plain"), "OUT": tmp_path / "out"}
    for word, path in paths.items():
        arguments = [
            str(path) + argument[len(word) :] if argument.startswith(word) else argument for argument in arguments
        ]
    code = f"import sys; sys.modules[{package!r}] = None; from famexport.cli import main; main({arguments!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stdout) == (INCOMPATIBLE, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert f"needs the package {package.replace('_', '-')!r}" in done.stderr
    assert f"pip install 'famexport[{extra}]'" in done.stderr


def test_anything_else(fails: Callable[..., str], bundles: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    import famexport.runtime.selftest as selftest

    def explode(*args: Any, **options: Any) -> None:
        raise ZeroDivisionError("division by zero\nand a second line")

    monkeypatch.setattr(selftest, "verify", explode)
    says = ("ZeroDivisionError: division by zero (run again with --debug for the traceback)",)
    fails(1, "verify", bundles("plain"), says=says)

    def too_large(*args: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(selftest, "verify", too_large)
    fails(1, "verify", bundles("plain"), says=("out of memory; use a smaller model",))


@contextmanager
def process(*arguments: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "famexport", *map(str, arguments)]
    with subprocess.Popen(command, text=True, env=environment, **options) as child:
        try:
            yield child
        finally:
            child.kill()


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--debug", "inspect", "none"], ["inspect", "none", "--debug"], ["inspect", "--debug", "none"]):
        with process(*arguments, cwd=tmp_path) as child:
            out, err = child.communicate(timeout=60)
        assert child.returncode != 0
        assert out == ""
        assert err.startswith("Traceback (most recent call last):")
        assert err.splitlines()[-1] == "famexport.errors.UsageError: no such path: none"
    with pytest.raises(SystemExit) as caught:
        main(["inspect", str(tmp_path / "none")])
    assert caught.value.code == USAGE
    assert "Traceback" not in capsys.readouterr().err


def until(condition: Callable[[], bool], child: subprocess.Popen[str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["--version"],
        ["doctor"],
        ["inspect", "B"],
        ["inspect", "B", "--json"],
        ["run", "B"],
        ["run", "B", "--json"],
        ["run", "B", "--generate", "2"],
        ["build", "--target", "list"],
        ["recipe", "show", "h100-bf16"],
    ],
)
def test_a_full_stdout_is_called_so(
    bundles: Paths, command: list[str], unbuffered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    arguments = [str(bundles("plain")) if argument == "B" else argument for argument in command]
    with open("/dev/full", "wb") as full, process(*arguments, stdin=subprocess.PIPE, stdout=full) as child:
        _, err = child.communicate("1 2 3", timeout=60)
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (child.returncode, len(said)) == (1, 1), err
    assert said[0].startswith("error: cannot write to stdout: No space left on device")
    assert "Exception ignored" not in err


def test_a_full_disk_is_not_taken_for_stdout(
    fails: Callable[..., str], bundles: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    import famexport.runtime.selftest as selftest

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(selftest, "verify", full)
    assert "stdout" not in fails(1, "verify", bundles("plain"), says=("OSError: [Errno 28] No space left on device",))


@pytest.mark.parametrize("there_before", [False, True])
def test_ctrl_c_in_an_export(checkpoints: Paths, bundles: Paths, tmp_path: Path, there_before: bool) -> None:
    """No target where there was none, the old one where there was one; no litter."""
    target = tmp_path / "out"
    if there_before:
        shutil.copytree(bundles("last"), target)
    before = listing(tmp_path)
    with process("export", checkpoints("last"), "-o", target, "--parity-blocks", "100000") as child:
        # While it traces and nothing is written yet, and while it compares and the weights are
        sign = ".out.tmp-*/weights.safetensors" if there_before else ".out.tmp-*"
        until(lambda: any(tmp_path.glob(sign)), child)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (INTERRUPTED, "")
    assert err == "interrupted; nothing was left half-written\n"
    assert listing(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if there_before else [])


def test_ctrl_c_in_a_run(bundles: Paths, tmp_path: Path) -> None:
    with process("run", bundles("plain"), "--scores", tmp_path / "scores", stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        child.stdin.write("1 2 3 " * 12_000)
        child.stdin.flush()
        until(lambda: any(path.stat().st_size > 1000 for path in tmp_path.glob(".scores.tmp-*")), child)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (INTERRUPTED, "")
    assert err == "interrupted; nothing was left half-written\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command", [["--help"], ["--version"], ["doctor"], ["inspect", "B"], ["inspect", "B", "--json"], ["verify", "B"]]
)
def test_a_broken_pipe_is_quiet(bundles: Paths, command: list[str]) -> None:
    """As of ``famexport inspect B | true``."""
    arguments = [str(bundles("plain")) if argument == "B" else argument for argument in command]
    read, write = os.pipe()
    os.close(read)
    with process(*arguments, stdout=write) as child:
        os.close(write)
        _, err = child.communicate(timeout=60)
    assert err == ""
    assert child.returncode in (0, 1)
