"""Every command as a new user would type it: what it prints, where, and what it leaves on the disk."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from famexport.bundle import open_bundle
from famexport.checkpoint import open_checkpoint
from famexport.cli import _run

ROOT = Path(__file__).parents[2]
Bundles = Callable[[str], Path]

GPU_BACKENDS = dict.fromkeys(("tensorrt", "tensorrt-rtx", "ort-cuda", "ort-tensorrt"), False)  # no GPU here


class Command:
    """Runs a command in this process: its exit code, and what it wrote."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: object, code: int = 0) -> str:
        self._capsys.readouterr()
        got = _run([str(argument) for argument in arguments], False)
        self.out, self.err = self._capsys.readouterr()
        assert got == code, self.err
        return self.out

    def json(self, *arguments: object) -> Any:
        """The one line that ``--json`` prints."""
        (line,) = self(*arguments, "--json").splitlines()
        return json.loads(line)


@pytest.fixture
def famexport(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return give


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as ``python -m famexport``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "famexport", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        **options,
    )


def test_from_nothing_to_scores(famexport: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """init, inspect, export, verify, run: relative paths, nothing but what the help says."""
    monkeypatch.chdir(tmp_path)
    line = famexport("init", "-o", "ckpt")
    assert line == "ckpt: 0.0M parameters, float32, 97.1 KiB, T=8 M=2 F=4, FAM not trained\n"
    assert famexport.err == ""
    made = famexport("export", "ckpt", "-o", "deep/bundle", "--parity-blocks", "8")
    assert made.startswith("deep/bundle: fp32, opset 20, ")
    assert "parity over 8 blocks: worst relative error" in made
    assert made.count("\n") == 1
    checked = famexport("verify", "deep/bundle")
    assert "hashes and contract good; golden rollout of 8 blocks on ort-cpu: logits" in checked
    Path("ids.txt").write_text(" ".join(str(i % 96) for i in range(100)))
    table = famexport("run", "deep/bundle", "--input", "ids.txt", "--scores", "scores.txt")
    assert "100 in 12 whole blocks of 8" in table
    assert len(Path("scores.txt").read_text().splitlines()) == 100
    assert famexport.err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "deep", "ids.txt", "scores.txt"]
    assert [path.name for path in Path("deep").iterdir()] == ["bundle"]


def test_init(famexport: Command, tmp_path: Path) -> None:
    options = ["--preset", "tiny", "--block-size", 4, "--memory-segments", 0, "--fam-length", 0, "--dtype", "bfloat16"]
    facts = famexport.json("init", "-o", tmp_path / "a", *options, "--seed", 7)
    config = open_checkpoint(tmp_path / "a").config
    assert (config.block_size, config.memory_segments, config.fam_length) == (4, 0, 0)
    assert facts["kind"] == "checkpoint"
    assert facts["dtype"] == "bfloat16"
    assert facts["checkpoint"] == str(tmp_path / "a")
    assert facts["next"] == f"famexport export {tmp_path / 'a'} -o BUNDLE"
    famexport("init", "-o", tmp_path / "b", *options, "--seed", 7, "--quiet")
    assert famexport.out == famexport.err == ""
    famexport("init", "-o", tmp_path / "c", *options, "--seed", 8)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    famexport("init", "-o", tmp_path / "c", *options, "--seed", 7)  # one's own is replaced
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == a


def test_export_with_options(famexport: Command, checkpoints: Bundles, tmp_path: Path) -> None:
    options = ["--batch", "dynamic", "--logits", "last", "--inputs", "inputs_embeds", "--opset", 23]
    out = tmp_path / "bundle"
    facts = famexport.json(
        "export", checkpoints("no_memory"), "-o", out, *options, "--parity-blocks", 16, "--tolerance", 0.01
    )
    assert famexport.err.startswith("note: FAM's norm grew ")  # on stderr: stdout is one line
    assert famexport.err.count("\n") == 1
    bundle = open_bundle(out)
    assert facts["id"] == bundle.id
    assert facts["files"] == {name: entry.bytes for name, entry in bundle.manifest.files.items()}
    assert facts["parity"]["blocks"] == 16
    assert facts["parity"]["tolerance"] == 0.01
    assert facts["worst_error"] == max(*facts["parity"]["logits_error"], *facts["parity"]["state_error"]) < 1e-4
    contract = bundle.contract
    assert (contract.batch, contract.logits, contract.inputs[0].name) == ("dynamic", "last", "inputs_embeds")
    assert bundle.manifest.opset == 23


IDS = [int(i) for i in np.random.default_rng(0).integers(0, 96, 50)]


def test_run_takes_ids_in_any_form(
    famexport: Command, bundles: Bundles, tmp_path: Path, stdin: Callable[[bytes], None]
) -> None:
    text = "\n".join(map(str, IDS)) + "\n"
    (tmp_path / "ids.txt").write_text(text)
    np.save(tmp_path / "ids.npy", np.array(IDS, np.uint16))
    results = []
    for source in (tmp_path / "ids.txt", tmp_path / "ids.npy", "-", None):
        stdin(text.encode())
        scores = tmp_path / f"{len(results)}.txt"
        given = [] if source is None else ["--input", source]
        report = famexport.json("run", bundles("plain"), *given, "--scores", scores)
        results.append((report["loss"], report["tokens"], report["blocks"], scores.read_text()))
    assert len(set(results)) == 1
    loss, tokens, blocks, lines = results[0]
    assert (tokens, blocks) == (50, 6)
    assert lines.splitlines()[0] == "nan"
    assert np.mean([float(line) for line in lines.splitlines()[1:]]) == pytest.approx(-loss, abs=1e-6)


def test_run_takes_a_pipe(bundles: Bundles, tmp_path: Path) -> None:
    """A FIFO, as of ``--input <(command)``, and stdin."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    text = " ".join(map(str, IDS))
    with subprocess.Popen(["/bin/sh", "-c", f"echo '{text}' > {fifo}"]):
        by_name = process("run", bundles("plain"), "-i", fifo, "--json")
    by_stdin = process("run", bundles("plain"), "--json", input=text)
    assert by_name.returncode == by_stdin.returncode == 0, by_name.stderr
    assert json.loads(by_name.stdout)["loss"] == json.loads(by_stdin.stdout)["loss"]


def test_run_takes_text(famexport: Command, bundles: Bundles, tmp_path: Path, stdin: Callable[[bytes], None]) -> None:
    words = "a stone falls into the water and the ring grows until it meets the shore"
    (tmp_path / "words.txt").write_text(words)
    report = famexport.json("run", bundles("text"), "-i", tmp_path / "words.txt")
    assert (report["tokens"], report["blocks"]) == (15, 1)
    stdin(words.encode())
    assert famexport.json("run", bundles("text"))["loss"] == report["loss"]
    stdin(b"1 2 3 4")
    assert famexport.json("run", bundles("text"), "--tokens")["tokens"] == 4
    np.save(tmp_path / "ids.npy", np.arange(5))
    assert famexport.json("run", bundles("text"), "-i", tmp_path / "ids.npy")["tokens"] == 5  # ids, by the file's kind


def test_run_reports(famexport: Command, bundles: Bundles, stdin: Callable[[bytes], None]) -> None:
    stdin(b"1 2 3")
    report = famexport.json("run", bundles("plain"), "--backend", "torch", "--threads", 1)
    assert report["bundle"] == str(bundles("plain"))
    assert (report["backend"], report["tokens"], report["blocks"], report["latency_ms"]) == ("torch", 3, 0, {})
    assert report["loss"] > 0
    stdin(b"7")
    table = famexport("run", bundles("plain"))
    assert "1 in 0 whole blocks of 8" in table
    assert "- (no whole block)" in table
    stdin(b"1 2 3")
    famexport("run", bundles("plain"), "--quiet")
    assert famexport.out == famexport.err == ""
    stdin(b"1 2 3")
    assert famexport.json("run", bundles("last"))["loss"] is None
    assert famexport("run", bundles("dynamic"), code=3) == ""  # stdin was read to its end


def test_bench(famexport: Command, bundles: Bundles, tmp_path: Path) -> None:
    out = famexport(
        "bench", bundles("plain"), "--backend", "ort-cpu", "--backend", "torch", "--blocks", 4, "--threads", 1,
        "--json", tmp_path / "report.json", "--samples", tmp_path / "samples.json",
    )  # fmt: skip
    *table, last = out.splitlines()
    report = json.loads(last)
    assert [result["backend"] for result in report["results"]] == ["ort-cpu", "torch"]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    samples = json.loads((tmp_path / "samples.json").read_text())
    assert {name: len(kinds["latency"]) for name, kinds in samples.items()} == {"ort-cpu": 4, "torch": 4}
    assert any("p99" in line for line in table)
    assert famexport.err == ""
    assert report["results"][0]["roofline"]["copy_gb_per_s"] > 0.1
    (line,) = famexport("bench", bundles("plain"), "--blocks", 2, "--quiet").splitlines()
    assert json.loads(line)["results"][0]["blocks"] == 2


def test_verify(famexport: Command, bundles: Bundles) -> None:
    facts = famexport.json("verify", bundles("bf16"), "--backend", "torch")
    assert facts["ok"] is True
    assert facts["precision"] == "bf16"
    assert facts["logits_error"] <= facts["tolerance"]
    assert famexport("verify", bundles("plain"), "--quiet") == ""


def test_inspect(famexport: Command, bundles: Bundles, checkpoints: Bundles) -> None:
    bundle, checkpoint = bundles("dynamic"), checkpoints("dynamic")
    facts = famexport.json("inspect", bundle)
    assert (facts["kind"], facts["batch"], facts["fam_trained"]) == ("bundle", "dynamic", True)
    assert facts["id"] == open_bundle(bundle).id
    assert facts["runs_here"] == ["ort-cpu", "torch"]
    table = famexport("inspect", bundle)
    assert facts["id"] in table.replace("\n", "").replace("│", "").replace(" ", "")  # whole, to be compared and copied
    assert "tokens: int64 [batch, 8]" in table  # brackets are no markup
    facts = famexport.json("inspect", checkpoint)
    assert (facts["kind"], facts["dtype"], facts["tokenizer"]) == ("checkpoint", "float32", False)
    assert facts["parameters"] == open_checkpoint(checkpoint).config.parameters
    assert "checkpoint" in famexport("inspect", checkpoint)
    facts = famexport.json("inspect", bundle / "block_step.onnx")
    assert (facts["kind"], facts["opset"], facts["step_contract"]) == ("graph", 20, True)
    assert facts["external_files"] == ["weights.safetensors"]
    assert "MatMul" in facts["operators"]
    facts = famexport.json("inspect", bundle / "weights.safetensors")
    assert (facts["kind"], facts["dtypes"]) == ("weights", ["float32"])
    assert facts["bytes"] < (bundle / "weights.safetensors").stat().st_size
    for path in (bundle / "block_step.onnx", bundle / "weights.safetensors"):
        assert path.name in famexport("inspect", path).replace("\n", "")


def test_doctor(famexport: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    found = famexport.json("doctor")
    assert {backend["backend"]: backend["works"] for backend in found["backends"]} == {
        **GPU_BACKENDS,
        "ort-cpu": True,
        "torch": True,
        "torch-compile": True,
    }
    packages = {package["package"]: package for package in found["packages"]}
    assert packages["torch"]["version"].startswith("2.")
    assert packages["torch"]["add"] is None
    assert found["device"]["memory_bytes"] > 2**28
    assert "ort-cpu" in famexport("doctor")
    monkeypatch.setenv("CXX", "no-such-compiler")
    *_, compiled = famexport.json("doctor")["backends"]
    assert (compiled["backend"], compiled["works"]) == ("torch-compile", False)
    assert "no C++ compiler" in compiled["detail"]


def test_doctor_says_what_is_missing(famexport: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """And how to add it, in one piece: a command that a table cuts or takes for markup cannot be copied."""
    from importlib.metadata import PackageNotFoundError

    from famexport import doctor

    def none(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", none)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    table = famexport("doctor")
    for extra in ("cpu", "text", "export", "hf"):
        assert f"pip install 'famexport[{extra}]'" in table
    found = famexport.json("doctor")
    assert {backend["backend"]: backend["works"] for backend in found["backends"]} == {
        **GPU_BACKENDS,
        "ort-cpu": False,
        "torch": False,
        "torch-compile": False,
    }
    assert all(b["add"] for b in found["backends"] if b["backend"] != "tensorrt-rtx")  # it is there; a GPU is not
    assert all(package["add"].startswith("pip install 'famexport[") for package in found["packages"])


def test_doctor_survives_a_broken_package(famexport: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *rest: Any) -> None:
            if name in ("torch", "onnxruntime"):
                raise OSError("libcudart.so.12: cannot open shared object file")

    for name in ("torch", "onnxruntime"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    found = famexport.json("doctor")
    assert ["libcudart" in b["detail"] for b in found["backends"]] == [False, False, True, True, True, True, True]


def test_build_lists_its_targets(famexport: Command, bundles: Bundles) -> None:
    """Without a bundle, as well as with one."""
    from famexport.engine.targets import TARGETS

    for bundle in ((), (bundles("plain"),)):
        lines = famexport("build", *bundle, "--target", "list").splitlines()
        assert [line.split()[0] for line in lines] == list(TARGETS)
        assert famexport.err == ""
    assert "NVIDIA GeForce RTX 4090, tensorrt or tensorrt-rtx" in famexport.out
    found = famexport.json("build", "--target", "list")
    assert set(found) == set(TARGETS)
    assert (found["h100"]["compute_capability"], found["h100"]["engines"]) == ("9.0", ["tensorrt"])
    famexport("build", "--target", "h100", code=2)
    assert famexport.err == "error: name a bundle: famexport build BUNDLE --target TARGET\n"
    famexport("build", bundles("plain"), code=2)
    assert "name a device with --target: jetson-orin-nano-jp6, " in famexport.err


def test_version_and_help(famexport: Command) -> None:
    import famexport as package

    assert famexport("--version") == f"famexport {package.__version__}\n"
    commands = ("init", "convert", "export", "kernels", "run", "bench", "verify", "inspect", "doctor")
    for given in ("--help", "-h"):
        shown = famexport(given)
        assert all(f"\n  {command} " in shown for command in commands)
    for command in commands:
        assert famexport(command, "-h").startswith("Usage: ")
    seed = famexport("compare", "-h").partition("--seed")[2].partition("--quiet")[0]
    assert "Seed of the random input." in seed
    assert "[default: 0; x>=0]" in seed


def terminal(*arguments: object, **options: Any) -> tuple[int, str, str]:
    """Exit code, stdout (a pipe) and stderr, which is a terminal."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-m", "famexport", *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True, **options
    ) as child:
        os.close(theirs)
        shown = b""
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            shown += data
        assert child.stdout is not None
        out = child.stdout.read()
    os.close(ours)
    return child.returncode, out, shown.decode(errors="replace")


def test_progress_goes_to_the_terminal_and_results_to_stdout(bundles: Bundles, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(4000) % 96)
    source = ["--input", tmp_path / "ids.npy"]
    code, out, shown = terminal("run", bundles("plain"), *source, "--json")
    assert code == 0
    assert json.loads(out)["tokens"] == 4000
    assert out.count("\n") == 1
    assert "tokens/s" in shown  # the live line
    code, out, shown = terminal("run", bundles("plain"), *source, "--quiet")
    assert (code, out, shown) == (0, "", "")
    code, out, shown = terminal("verify", bundles("plain"))
    assert code == 0
    assert "hashes" in shown
    assert out.count("\n") == 1
    assert "\x1b" not in out


def test_no_progress_without_a_terminal(bundles: Bundles, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(100) % 96)
    done = process("run", bundles("plain"), "-i", tmp_path / "ids.npy")
    assert (done.returncode, done.stderr) == (0, "")
    assert "100 in 12 whole blocks" in done.stdout
    assert math.isfinite(
        json.loads(process("run", bundles("plain"), "-i", tmp_path / "ids.npy", "--json").stdout)["loss"]
    )
