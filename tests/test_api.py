"""What the package shows to the outside, what it imports when, and what its source may never do (R4, layering)."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import famexport as fx

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "famexport"
HEAVY = {
    "torch",
    "tensorrt",
    "tensorrt_rtx",
    "cuda",
    "polygraphy",
    "onnxruntime",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "transformers",
    "tokenizers",
    "plotly",
}


def test_public_names() -> None:
    assert dir(fx) == sorted(fx.__all__) == fx.__all__
    for name in fx.__all__:
        found = getattr(fx, name)
        assert name == "__version__" or found.__name__ in (name, "convert")
    assert fx.load.__module__ == "famexport.runtime.session"
    assert fx.convert_checkpoint.__module__.startswith("famexport.convert")
    assert issubclass(fx.FamExportError, Exception)
    with pytest.raises(AttributeError, match="module 'famexport' has no attribute 'nothing'"):
        fx.nothing  # noqa: B018


def test_version() -> None:
    assert run("import famexport; print(famexport.__version__)").strip() == fx.__version__
    assert [part.isdecimal() for part in fx.__version__.split(".")] == [True] * 3


def test_type_information_ships() -> None:
    assert (PACKAGE / "py.typed").is_file()


def run(code: str, *arguments: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(code: str, *arguments: object) -> set[str]:
    """Top-level packages in memory after ``code``."""
    ending = "\nimport sys, json; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    return set(json.loads(run(code + ending, *arguments).splitlines()[-1]))


def test_importing_costs_nothing() -> None:
    assert not imported("import famexport") & (HEAVY | {"numpy", "typer", "rich", "yaml", "safetensors"})


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["export", "--help"], ["bench", "-h"], ["run", "-x"]])
def test_help_is_light(arguments: list[str]) -> None:
    code = f"from famexport.cli import _run; assert _run({arguments!r}, False) in (0, 2)"
    assert not imported(code) & (HEAVY | {"numpy", "safetensors"})


STREAM = """
import sys, numpy as np, famexport as fx
from pathlib import Path
from famexport.runtime.score import run_tokens
from famexport.runtime.selftest import verify
from famexport.inspection import inspect
with fx.load(sys.argv[1]) as session, session.stream() as stream:
    size = session.contract.block_size
    stream.step(np.zeros((1, size), np.int64))
    assert sum(part.shape[1] for part in stream.feed([np.zeros(3 * size + 1, np.int64)])) == 3 * size + 1
    stream.load_state(stream.state())
    run_tokens(session, [np.arange(50)])
verify(sys.argv[1])
inspect(sys.argv[1])
"""


@pytest.mark.parametrize("name", ["plain", "bf16"])
def test_a_device_needs_no_torch(bundles: Callable[[str], Path], name: str) -> None:
    """Streaming, scoring, verifying and inspecting a bundle on ort-cpu."""
    found = imported(STREAM, bundles(name))
    assert "onnxruntime" in found
    assert not found & (HEAVY - {"onnxruntime"} | {"typer", "rich", "click", "yaml"})


def test_bench_needs_no_torch(bundles: Callable[[str], Path]) -> None:
    code = """
import sys
from famexport.bench import measure, roofline
roofline.measure_ceilings = lambda: roofline.Ceilings(1.0, 1.0)
measure.bench(sys.argv[1], blocks=2)
"""
    found = imported(code, bundles("plain"))
    assert not found & (HEAVY - {"onnxruntime"} | {"typer", "rich"})


def test_the_command_line_runs_a_bundle_without_torch(bundles: Callable[[str], Path]) -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "tokenizers")))
from famexport.cli import _run
for command in (["verify", sys.argv[1]], ["inspect", sys.argv[1]], ["doctor"]):
    assert _run(command, False) == 0
"""
    assert "golden rollout" in run(code, bundles("plain"))


def test_onnxruntime_does_not_report_to_its_maker(bundles: Callable[[str], Path]) -> None:
    """From 1.29 on it starts an uploader as it is imported, unless the environment says otherwise."""
    code = """
import os, sys
import famexport as fx
session = fx.load(sys.argv[1], threads=1)
print(os.environ.get("ORT_DISABLE_TELEMETRY"), len(os.listdir("/proc/self/task")))
"""
    for variable in ("CI", "GITHUB_ACTIONS", "TF_BUILD"):  # it keeps quiet there by itself
        code = f"import os; os.environ.pop({variable!r}, None)\n{code}"
    unset = run("import os; os.environ.pop('ORT_DISABLE_TELEMETRY', None)\n" + code, bundles("plain")).split()
    assert unset == run(code, bundles("plain"), ORT_DISABLE_TELEMETRY="1").split()
    assert unset[0] == "1"
    asked = run(code, bundles("plain"), ORT_DISABLE_TELEMETRY="0").split()
    assert asked[0] == "0"  # a user's own choice stands
    if tuple(map(int, version("onnxruntime").split(".")[:2])) >= (1, 29):
        assert int(asked[1]) > int(unset[1])  # the thread is there: or else this test would show nothing


# Layering: arrows point one way


def sources(*folders: str) -> list[Path]:
    found = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert found
    return found


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Absolute names of what a file imports, and whether importing the file is enough for it to happen."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside: set[ast.AST] = set()
    for node in ast.walk(tree):
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or typing_only:
            inside.update(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node not in inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node not in inside


def starts(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


MAKERS = ("famexport.export", "famexport.engine", "famexport.convert", "famexport.checkpoint", "famexport.cli")


def runtime_problems(path: Path) -> list[str]:
    found = []
    for name, at_import in imports(path):
        torch = starts(name, "torch", "famexport.model", "famexport.layers", "famexport.rotary")
        # The reference backend, and the rate of a GPU's products, which bench leaves out where there is no torch
        lazily = path.name == "torch_reference.py" or (path.name == "roofline.py" and name == "torch")
        if torch and (at_import or not lazily):
            found.append(f"{path.name} imports {name}")
        if starts(
            name, *MAKERS, "onnx", "onnx_ir", "onnxscript", "transformers", "typer", "rich", "importlib.import_module"
        ):
            found.append(f"{path.name} imports {name}")
        if starts(name, "onnxruntime") and at_import:
            found.append(f"{path.name} imports {name} at its top")
    return found


def test_runtime_and_bench_import_no_maker() -> None:
    assert [
        problem for path in sources("famexport/runtime", "famexport/bench") for problem in runtime_problems(path)
    ] == []


def test_runtime_does_not_import_bench() -> None:
    for path in sources("famexport/runtime"):
        assert not any(starts(name, "famexport.bench") for name, _ in imports(path)), path


def test_nobody_imports_the_command_line() -> None:
    for path in sources("famexport", "samples"):
        inside = path.is_relative_to(PACKAGE / "cli") or path == PACKAGE / "__main__.py"
        assert inside or not any(starts(name, "famexport.cli") for name, _ in imports(path)), path


def test_what_ships_to_a_device_imports_no_heavy_package_at_its_top() -> None:
    makers = ("export", "convert", "engine")
    for path in sources("famexport"):
        if (
            path in [PACKAGE / name for name in ("model.py", "layers.py", "rotary.py")]
            or path.relative_to(PACKAGE).parts[0] in makers
        ):
            continue
        heavy = [name for name, at_import in imports(path) if at_import and starts(name, *HEAVY)]
        assert heavy == [], path


@pytest.mark.parametrize(
    "line",
    [
        "import torch",
        "from torch import nn",
        "import torch.nn",
        "def f():\n    import torch",
        "from famexport.model import FamModel",
        "from famexport import model",
        "def f():\n    from famexport.export.parity import TOLERANCES",
        "import famexport.checkpoint",
        "import onnxruntime",
        "class A:\n    import torch",
        "from importlib import import_module",
        "try:\n    import torch\nexcept ImportError:\n    pass",
    ],
)
def test_the_layering_check_sees(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(line)
    assert runtime_problems(tmp_path / "a.py")


def test_the_layering_check_lets_pass(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import numpy\ndef f():\n    import onnxruntime\nfrom famexport.bundle import Bundle\n"
    )
    (tmp_path / "torch_reference.py").write_text("def f():\n    import torch\n")
    assert runtime_problems(tmp_path / "a.py") == runtime_problems(tmp_path / "torch_reference.py") == []
    (tmp_path / "roofline.py").write_text("def f():\n    import torch\n")
    assert runtime_problems(tmp_path / "roofline.py") == []
    for line in ("import torch", "def f():\n    from famexport.model import FamModel"):
        (tmp_path / "roofline.py").write_text(line)
        assert len(runtime_problems(tmp_path / "roofline.py")) == 1


# R4: no code in data

PICKLES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle")
LOADERS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "torch.jit.load"}
BUILTINS = {"eval", "exec", "compile", "__import__"}


def code_in_data(source: str) -> list[str]:
    """Lines that could run what is in a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        if any(starts(name, *PICKLES) or name in LOADERS for name in names):
            found.append(f"{node.lineno}: {ast.unparse(node)}")  # type: ignore[attr-defined]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            allowed = any(word.arg == "allow_pickle" and ast.unparse(word.value) != "False" for word in node.keywords)
            host = any(word.arg == "engine_host_code_allowed" for word in node.keywords)
            if called in LOADERS or called in BUILTINS or called.startswith("builtins.") or allowed or host:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
            if called.endswith("np.load") and not any(word.arg == "allow_pickle" for word in node.keywords):
                found.append(f"{node.lineno}: {ast.unparse(node)} without allow_pickle=False")
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        off = isinstance(node, ast.Assign) and ast.unparse(node.value) == "False"
        if any("engine_host_code_allowed" in ast.unparse(target) for target in targets) and not off:
            found.append(f"{node.lineno}: {ast.unparse(node)}")  # type: ignore[attr-defined]
        if isinstance(node, ast.Attribute) and node.attr in ("unsafe_load", "UnsafeLoader", "FullLoader", "Unpickler"):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", sources("famexport", "samples"), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_in_data(path: Path) -> None:
    assert code_in_data(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import marshal as m",
        "import joblib.numpy_pickle",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "from torch import load",
        "eval(text)",
        "exec(compile(text, 'a', 'exec'))",
        "__import__(name)",
        "builtins.eval(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.load_all(text)",
        "yaml.FullLoader",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=flag)",
        "runtime.engine_host_code_allowed = True",
        "runtime.engine_host_code_allowed = flag",
        "Runtime(engine_host_code_allowed=True)",
    ],
)
def test_the_scan_sees(line: str) -> None:
    assert code_in_data(line)


def test_the_scan_lets_pass() -> None:
    good = "r.engine_host_code_allowed = False\nmodel.eval()\nre.compile('a')\nnp.load(p, allow_pickle=False)\nyaml.safe_load(t)\nsafetensors.numpy.load(d)\n"
    assert code_in_data(good) == []
