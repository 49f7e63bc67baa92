"""The package works with Python 3.10, which JetPack 6 has: no newer syntax, nothing newer of the standard library."""

from __future__ import annotations

import ast
import builtins
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "famexport"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# The likeliest of what came after 3.10, for a machine without it; with it, every name is looked up there.
NEW_MODULES = {"tomllib", "compression", "annotationlib", "concurrent.interpreters"}
NEW_NAMES = {
    "asyncio": {"TaskGroup", "Runner", "timeout", "timeout_at"},
    "builtins": {"ExceptionGroup", "BaseExceptionGroup", "PythonFinalizationError"},
    "collections.abc": {"Buffer"},
    "contextlib": {"chdir"},
    "copy": {"replace"},
    "datetime": {"UTC"},
    "enum": {"StrEnum", "ReprEnum", "EnumType", "member", "nonmember", "verify", "global_enum"},
    "hashlib": {"file_digest"},
    "itertools": {"batched"},
    "math": {"cbrt", "exp2", "sumprod", "fma"},
    "os": {"process_cpu_count"},
    "queue": {"ShutDown"},
    "sys": {"exception", "monitoring"},
    "typing": {
        *("Self", "Never", "LiteralString", "Required", "NotRequired", "Unpack", "TypeVarTuple", "ReadOnly", "TypeIs"),
        *("assert_never", "assert_type", "reveal_type", "dataclass_transform", "override", "TypeAliasType"),
    },
    "warnings": {"deprecated"},
}
LOOK_UP = """
import importlib, json, sys
missing = []
for module, name in json.load(sys.stdin):
    try:
        found = importlib.import_module(module)
    except ImportError:
        missing.append(module)
        continue
    if name and not hasattr(found, name):
        try:
            importlib.import_module(f"{module}.{name}")
        except ImportError:
            missing.append(f"{module}.{name}")
print(json.dumps(missing))
"""


def used_names(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Line, module and name for all that a file takes from an absolute import ("" for the module itself).

    Imports under a version check count like any other.
    """
    modules: dict[str, str] = {}
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ""
                modules[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield node.lineno, node.module, alias.name
                bound.add(alias.asname or alias.name)
    bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    modules = {local: module for local, module in modules.items() if local not in bound}  # `io` can be a parameter
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (module := modules.get(ast.unparse(node.value))):
            yield node.lineno, module, node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in bound:
            yield node.lineno, "builtins", node.id


def too_new(source: str) -> list[str]:
    """What in ``source`` is known to be newer than Python 3.10."""
    try:
        tree = ast.parse(source, feature_version=(3, 10))
    except SyntaxError as exc:
        return [f"line {exc.lineno}: {exc.msg}"]
    found = [f"line {line}: {module}" for line, module, _ in used_names(tree) if module in NEW_MODULES]
    return found + [
        f"line {line}: {module}.{name}" for line, module, name in used_names(tree) if name in NEW_NAMES.get(module, ())
    ]


def python310() -> str | None:
    """An interpreter of 3.10 that starts: on the path, or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    candidates = [shutil.which("python3.10"), *map(str, sorted(pyenv.glob("versions/3.10*/bin/python")))]
    ask = ["-c", "import sys; print(*sys.version_info[:2])"]
    for candidate in candidates:
        if candidate is None:
            continue
        done = subprocess.run([candidate, *ask], capture_output=True, text=True)  # a pyenv shim can refuse
        if done.returncode == 0 and done.stdout.split() == ["3", "10"]:
            return candidate
    return None


@pytest.fixture(scope="module")
def interpreter() -> str:
    found = python310()
    if found is None:
        pytest.skip("no Python 3.10 on the path or among pyenv's versions")
    return found


def test_no_module_is_newer_than_310() -> None:
    assert len(SOURCES) > 20
    found = {str(path): problems for path in SOURCES if (problems := too_new(path.read_text("utf-8")))}
    assert found == {}


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import tomllib", "line 1: tomllib"),
        ("from typing import Any, Self", "line 1: typing.Self"),
        ("import typing as t\nx: t.Self", "line 2: typing.Self"),
        ("import enum\nclass A(enum.StrEnum): ...", "line 2: enum.StrEnum"),
        ("import datetime\ndatetime.UTC", "line 2: datetime.UTC"),
        ("raise ExceptionGroup('', [])", "line 1: builtins.ExceptionGroup"),
        ("import collections.abc\ncollections.abc.Buffer", "line 2: collections.abc.Buffer"),
        ("try: ...\nexcept* ValueError: ...", "line "),
        ("type A = int", "line 1: "),
        ("def f[T](x: T) -> T: ...", "line 1: "),
    ],
)
def test_the_check_finds_what_is_new(source: str, what: str) -> None:
    problems = too_new(source)
    assert len(problems) == 1
    assert problems[0].startswith(what)


def test_the_check_leaves_namesakes_alone() -> None:
    assert too_new("from famexport.enum import StrEnum\nUTC = 1\nx.UTC\nExceptionGroup = 2\nExceptionGroup") == []
    assert too_new("match x:\n    case int() | str(): ...\nwith (a as b, c as d): ...") == []


def test_python_310_compiles_every_module(interpreter: str, tmp_path: Path) -> None:
    command = [interpreter, "-X", f"pycache_prefix={tmp_path}", "-m", "compileall", "-q", "-f", str(PACKAGE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.rglob("*.cpython-310.pyc"))) == len(SOURCES)


def look_up(interpreter: str, names: set[tuple[str, str]]) -> list[str]:
    """What of ``names`` that Python's standard library lacks; other packages are left out."""
    library = sys.stdlib_module_names | NEW_MODULES
    asked = sorted((module, name) for module, name in names if module.partition(".")[0] in library)
    command = [interpreter, "-I", "-c", LOOK_UP]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    missing: list[str] = json.loads(done.stdout)
    return missing


def test_python_310_has_all_we_take_from_the_standard_library(interpreter: str) -> None:
    names = {
        (module, name)
        for path in SOURCES
        for _, module, name in used_names(ast.parse(path.read_text("utf-8")))
        if module != "builtins" or hasattr(builtins, name)  # the rest are parameters, functions, __file__
    }
    assert ("pathlib", "Path") in names
    assert look_up(interpreter, {("tomllib", ""), ("enum", "StrEnum"), ("enum", "Enum"), ("famexport", "none")}) == [
        "enum.StrEnum",
        "tomllib",
    ]
    assert look_up(interpreter, names) == []


def test_python_310_imports_the_modules_that_need_nothing_else(interpreter: str) -> None:
    """Those that run without a dependency; with numpy and the rest, `pip install` on that Python is the test."""
    modules = ["famexport.errors", "famexport.contract", "famexport.bench.power"]
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\nprint(len(sys.modules))"
    command = [interpreter, "-B", "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    )
    assert done.returncode == 0, done.stderr
