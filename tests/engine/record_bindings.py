"""Record the Python API of TensorRT without TensorRT: ``python tests/engine/record_bindings.py 10.3.0 11.4.0.106``.

TensorRT's libraries take gigabytes and come from their own package index, but its Python bindings are small wheels on
the ordinary one. The bindings register every class, method and enum when they are imported and call the libraries only
later, so they import over stub libraries that define the few symbols they link to. What they then say about themselves
(names, pybind11's signature lines, which properties can be set, the values of enums) is written to
``bindings/tensorrt-VERSION.json``; an installed ``tensorrt_rtx`` is recorded as it is. ``fake_tensorrt`` builds
modules from these files.

Needs CPython 3.11 on x86-64 Linux (the wheels' platform), pip and gcc.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

BINDINGS = Path(__file__).with_name("bindings")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
STUBS = {
    "nvinfer": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "nvonnxparser": ("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion"),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
}
# what an exporter and a runner of engines do not touch: plugins, calibration, choice of algorithms
LEFT_OUT = re.compile(
    r"Plugin|Calibrat|Algorithm|DimsExprs|IDimensionExpr|IExprBuilder|SymExpr|TensorRTPhase|FallbackString"
)
OPERATORS = (
    "__and__",
    "__ge__",
    "__gt__",
    "__index__",
    "__int__",
    "__invert__",
    "__le__",
    "__lt__",
    "__or__",
    "__xor__",
)
DUNDERS = ("__enter__", "__exit__", "__getitem__", "__iter__", "__len__", "__setitem__")


def signatures(name: str, function: Any, prefix: str) -> list[str]:
    """pybind11's signature lines of a function, one for each overload, without the prefix of the module."""
    function = getattr(function, "__func__", function)
    if inspect.isfunction(function):  # the few that the package adds in Python
        return [name + str(inspect.signature(function)).replace(prefix, "")]
    lines = re.findall(rf"^(?:\d+\. )?({re.escape(name)}\(.*)$", function.__doc__ or "", re.MULTILINE)
    if len(lines) > 1:
        lines = [line for line in lines if not line.endswith("(*args, **kwargs)")]
    return [re.sub(r" at 0x[0-9a-f]+>", ">", line).replace(prefix, "").strip() for line in lines]


def record_property(value: Any, prefix: str) -> list[str]:
    """The type that a property has, as far as its accessors tell, and whether it is read ("r"), set ("w") or both."""
    kind = re.search(r"-> (.*)$", (value.fget.__doc__ if value.fget else None) or "", re.MULTILINE)
    mode = ("r" if value.fget else "") + ("w" if value.fset else "")
    return [kind[1].replace(prefix, "").strip() if kind else "", mode]


def record_class(cls: type, prefix: str) -> dict[str, Any]:
    """Everything public that a class itself defines, and the special methods that callers use without naming them."""
    bases = [base.__qualname__ for base in cls.__bases__ if base.__name__ not in ("pybind11_object", "object")]
    parts: dict[str, dict[str, Any]] = {"methods": {}, "properties": {}, "static": {}, "constants": {}}
    members = getattr(cls, "__members__", None)
    for name, value in vars(cls).items():
        if name == "__init__":
            if found := signatures(name, value, prefix):
                parts["methods"][name] = found
        elif (name.startswith("_") and name not in DUNDERS) or (members is not None and name in ("name", "value")):
            continue
        elif isinstance(value, type):
            parts["constants"][name] = value.__qualname__
        elif isinstance(value, staticmethod):
            parts["static"][name] = signatures(name, value, prefix)
        elif type(value).__name__ == "pybind11_static_property":
            parts["constants"][name] = getattr(cls, name)
        elif isinstance(value, property):
            parts["properties"][name] = record_property(value, prefix)
        elif hasattr(type(value), "__members__"):
            if members is None or name not in members:
                parts["constants"][name] = f"{type(value).__qualname__}.{value.name}"
        elif callable(value):
            parts["methods"][name] = signatures(name, value, prefix)
        else:
            parts["constants"][name] = value
    record = {key: part for key, part in parts.items() if part}
    if bases:
        record["bases"] = bases
    if cls.__dictoffset__:
        record["dynamic"] = True
    if members is not None:
        record["enum"] = {name: int(member) for name, member in members.items()}
        record["operators"] = [name for name in OPERATORS if name in vars(cls)]
    return record


def record_module(module: ModuleType, name: str) -> dict[str, Any]:
    """The record of an imported package of bindings, under the name it is used by."""
    native = importlib.import_module(module.ILogger.__module__)
    prefix = native.__name__ + "."
    classes: dict[str, Any] = {}
    functions: dict[str, list[str]] = {}
    constants: dict[str, str] = {}

    def add(cls: type) -> None:
        classes[cls.__qualname__] = record_class(cls, prefix)
        for inner in vars(cls).values():
            if isinstance(inner, type) and inner.__qualname__.startswith(cls.__qualname__ + "."):
                add(inner)

    for key in dir(module):
        value = getattr(module, key)
        if key.startswith("_") or LEFT_OUT.search(key):
            continue
        if isinstance(value, type):
            if value.__module__ == native.__name__:
                add(value)
        elif isinstance(value, ModuleType):
            continue
        elif hasattr(type(value), "__members__") and not LEFT_OUT.search(type(value).__name__):
            if key not in ("attr", "value"):  # left over from a loop of the package
                constants[key] = f"{type(value).__qualname__}.{value.name}"
        elif callable(value) and key not in ("common_enter", "common_exit"):
            functions[key] = signatures(key, value, prefix)
    version = str(module.__version__)
    return {"name": name, "version": version, "classes": classes, "functions": functions, "constants": constants}


def to_json(record: dict[str, Any]) -> str:
    """Sorted, with one line for each class, so that two releases can be compared with ``diff``."""
    compact = {"sort_keys": True, "separators": (",", ":")}
    lines = [f"{json.dumps(key)}:{json.dumps(value, **compact)}" for key, value in sorted(record["classes"].items())]
    rest = [f"{json.dumps(key)}:{json.dumps(record[key], **compact)}" for key in sorted(record) if key != "classes"]
    return "{\n" + ",\n".join(['"classes":{\n' + ",\n".join(lines) + "\n}", *rest]) + "\n}\n"


def build_stubs(folder: Path, major: str) -> None:
    """Libraries that define the symbols TensorRT's bindings link to; each returns 0, and none is called here."""
    for library, symbols in STUBS.items():
        source = folder / f"{library}.c"
        source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols))
        target = folder / f"lib{library}.so.{major}"
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(target), str(source)], check=True)


def record_release(version: str) -> str:
    """Download the bindings of a TensorRT release, import them in a process of their own and return their record."""
    if sys.version_info[:2] != (3, 11):
        raise SystemExit("the bindings are recorded with CPython 3.11, whose wheels every release has")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        wanted = ["--only-binary=:all:", "--python-version", "3.11", "--implementation", "cp", "--abi", "none"]
        package = f"tensorrt-cu12-bindings=={version}"
        subprocess.run([*pip, *platforms, *wanted, "--dest", name, package], check=True)
        for wheel in folder.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder / "site")
        build_stubs(folder, version.split(".")[0])
        environment = os.environ | {"LD_LIBRARY_PATH": name, "PYTHONPATH": str(folder / "site")}
        command = [sys.executable, __file__, "--dump", "tensorrt_bindings", "tensorrt"]
        return subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description="Record the API of TensorRT's Python bindings.")
    parser.add_argument("versions", nargs="*", help="releases of TensorRT, as 10.3.0")
    parser.add_argument(
        "--dump", nargs=2, metavar=("PACKAGE", "NAME"), help="print the record of an importable package"
    )
    options = parser.parse_args()
    if options.dump:
        package, name = options.dump
        sys.stdout.write(to_json(record_module(importlib.import_module(package), name)))
        return
    BINDINGS.mkdir(exist_ok=True)
    records = {f"tensorrt-{version}": record_release(version) for version in options.versions}
    try:
        import tensorrt_rtx
    except ImportError:
        print("tensorrt_rtx is not installed: not recorded", file=sys.stderr)
    else:
        records[f"tensorrt_rtx-{tensorrt_rtx.__version__}"] = to_json(record_module(tensorrt_rtx, "tensorrt_rtx"))
    for stem, text in records.items():
        (BINDINGS / f"{stem}.json").write_text(text)
        print(f"bindings/{stem}.json: {len(text)} bytes")


if __name__ == "__main__":
    main()
