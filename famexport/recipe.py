"""Recipes: one YAML file per use, with the options of ``famexport export`` and ``famexport build`` (R4).

A recipe holds scalars, lists and maps; anything else in it (tags, anchors, aliases, duplicate keys) is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from famexport.contract import PRECISION_DTYPE, QUANTIZED
from famexport.engine.build_options import BuildOptions
from famexport.engine.targets import find_target, precision_problems
from famexport.errors import ConfigError, FamExportError, UsageError, raise_problems

_MAX_BYTES, _MAX_DEPTH = 2**16, 8
_NAME = re.compile("[a-z0-9][a-z0-9-]{0,63}")
_EXPORT: dict[str, tuple[type, ...]] = {
    "precision": (str,),
    "opset": (int,),
    "batch": (int, str),
    "logits": (str,),
    "inputs": (str,),
    "graphs": (str,),
    "chunks": (list,),
}
_BUILD: dict[str, tuple[type, ...]] = {
    "target": (str,),
    "engine": (str,),
    "optimization_level": (int,),
    "workspace_mb": (int,),
    "version_compatible": (bool,),
    "hardware_compatible": (str,),
    "strip": (bool,),
    "refit": (bool,),
    "batch_profile": (list,),
    "attention": (str,),
}
_CHOICES = {
    "precision": tuple(PRECISION_DTYPE),
    "logits": ("all", "last"),
    "inputs": ("tokens", "inputs_embeds"),
    "graphs": ("block", "all"),
    "opset": tuple(range(18, 24)),
}


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: ``export`` are keyword arguments of ``export_bundle``; ``target`` is None without a build."""

    name: str
    description: str
    export: dict[str, Any]
    target: str | None
    engine: str | None
    options: BuildOptions


def folder() -> Path:
    """Where the recipes are: inside an installed package, or beside it in the source tree."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in folder().glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe, by name or path.

    Raises:
        UsageError: there is none.
    """
    if _NAME.fullmatch(name) and name in recipe_names():
        return folder() / f"{name}.yaml"
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    raise UsageError(f"no recipe {name!r:.80}; expected the path of a .yaml file or one of {', '.join(recipe_names())}")


def load_recipe(name: str) -> Recipe:
    """Read and check a recipe, by name or path.

    Raises:
        UsageError: there is none.
        ConfigError: naming everything that is wrong with it.
    """
    path = recipe_path(name)
    data = path.read_bytes()
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path} has {len(data)} bytes, expected at most {_MAX_BYTES}")
    return parse_recipe(data, path.stem, str(path))


def parse_recipe(data: bytes, name: str, subject: str) -> Recipe:
    """As ``load_recipe``, from the file's content."""
    tree = _plain_yaml(data, subject)
    problems = _keys(
        "recipe", tree, {"description": (str,), "export": (dict,), "build": (dict,)}, {"description", "export"}
    )
    raise_problems(ConfigError, subject, problems)
    export, build = tree["export"], tree.get("build")
    problems = _keys("export", export, _EXPORT, {"precision"})
    if build is not None:
        problems += _keys("build", build, _BUILD, {"target"})
    raise_problems(ConfigError, subject, problems + _values(export, build))
    settings = dict(build or {})
    target, engine = settings.pop("target", None), settings.pop("engine", None)
    if "batch_profile" in settings:
        settings["batch_profile"] = tuple(settings["batch_profile"])
    options = BuildOptions(**settings)
    if target:
        raise_problems(ConfigError, subject, options.problems(engine or "tensorrt", export.get("batch", 1)))
    return Recipe(name, tree["description"], export, target, engine, options)


def _values(export: dict[str, Any], build: dict[str, Any] | None) -> list[str]:
    problems = []
    precision = export.get("precision")
    engine = (build or {}).get("engine")
    if engine not in (None, "tensorrt", "tensorrt-rtx"):
        return [f"build: engine is {engine!r:.80}, expected tensorrt or tensorrt-rtx"]
    if build and isinstance(precision, str) and isinstance(build.get("target"), str):
        try:
            target = find_target(build["target"])
        except FamExportError as exc:
            return [str(exc)]
        if precision in QUANTIZED:
            problems.append(
                f"build: of an {precision} bundle, which is for ONNX Runtime on CPUs, no engine can be built"
            )
        else:
            problems += precision_problems(target, engine or "tensorrt", precision)
        if engine and engine not in target.engines:
            problems.append(f"build: {engine} has no engines for {target.name}; it has {', '.join(target.engines)}")
    for key, choices in _CHOICES.items():
        if key in export and export[key] not in choices:
            shown = f"{choices[0]} to {choices[-1]}" if key == "opset" else ", ".join(map(str, choices))
            problems.append(f"export: {key} is {export[key]!r:.80}, expected {shown}")
    if "chunks" in export and export.get("graphs") != "all":
        problems.append("export: chunks are of append_step, which the bundle would not have; add graphs: all")
    batch = export.get("batch", 1)
    if batch != "dynamic" and not (isinstance(batch, int) and batch > 0):
        problems.append(f"export: batch is {batch!r:.80}, expected a positive number or dynamic")
    for where, key, items in (
        ("export", "chunks", export.get("chunks", [])),
        ("build", "batch_profile", (build or {}).get("batch_profile", [1, 1, 1])),
    ):
        if any(type(item) is not int or item < 1 for item in items) or (key == "batch_profile" and len(items) != 3):
            problems.append(f"{where}: {key} is {items!r:.80}, expected a list of positive numbers")
    return problems


def _keys(where: str, data: Any, kinds: dict[str, tuple[type, ...]], required: set[str]) -> list[str]:
    if not isinstance(data, dict):
        return [f"{where} must be a map, got {type(data).__name__}"]
    found = [f"{where} lacks the key {key!r}" for key in sorted(required - set(data))]
    found += [
        f"{where} has the unknown key {key!r:.80}; known are {', '.join(kinds)}" for key in data if key not in kinds
    ]
    for key, types in kinds.items():
        if key in data and type(data[key]) not in types:
            expected = " or ".join(kind.__name__ for kind in types)
            found.append(f"{where}: {key} must be {expected}, got {type(data[key]).__name__}")
    return found


def _plain_yaml(data: bytes, subject: str) -> Any:
    """The values of a YAML document that has only scalars, lists and maps, no key twice, and no aliases."""
    depth = 0
    try:
        text = data.decode()
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.events.AliasEvent):
                raise ConfigError(f"{subject} uses aliases (*name); write the values out")
            depth += isinstance(event, yaml.events.CollectionStartEvent)
            depth -= isinstance(event, yaml.events.CollectionEndEvent)
            if depth > _MAX_DEPTH:  # seen here, not in the tree: the scanner's time grows with the square of the depth
                line = f", line {event.start_mark.line + 1}" if event.start_mark else ""
                raise ConfigError(f"{subject}{line}: nested deeper than {_MAX_DEPTH} levels; a recipe needs three")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            raise ConfigError(f"{subject} is empty; expected the keys description, export and build")
        return _value(node, subject)
    except (yaml.YAMLError, ValueError) as exc:
        raise ConfigError(f"{subject} is no valid YAML: {' '.join(str(exc).split())[:300]}") from exc


_SCALARS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str")}


def _value(node: yaml.Node, subject: str) -> Any:
    line = f"{subject}, line {node.start_mark.line + 1}"
    if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
        try:
            value = yaml.constructor.SafeConstructor().construct_object(node)  # type: ignore[no-untyped-call]
        except (ValueError, LookupError, ArithmeticError) as exc:  # of a tag that does not fit: !!bool maybe
            kind = node.tag.rpartition(":")[2]
            raise ConfigError(f"{line}: {node.value!r:.80} is no {kind}; leave the tag out, or correct it") from exc
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ConfigError(f"{line}: the number {node.value:.40} does not fit 64 bits")
        return value
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_value(item, subject) for item in node.value]
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _value(key_node, subject)
            if not isinstance(key, str) or key in found:
                raise ConfigError(f"{line}: the key {key!r:.80} is no text or occurs twice")
            found[key] = _value(value_node, subject)
        return found
    raise ConfigError(f"{line}: {node.tag!r:.80} is not allowed; a recipe holds scalars, lists and maps only")
