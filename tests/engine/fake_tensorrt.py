"""A module that answers like a release of TensorRT, built from what ``record_bindings`` wrote down about that release.

``fake_module("tensorrt", "10.3.0")`` has the classes, enums and functions of the recording and nothing else. A name
that the release lacks raises AttributeError; a call that no recorded overload takes (too few or too many arguments, an
unknown keyword, a path or a float where pybind11 wants a str or an int, an object of another class) raises TypeError;
a property is set only if the release's can be. Nothing is computed: every call is appended to ``module.calls`` as
``("Class.method", arguments)`` and answered with a default, or by what a test put in its place::

    trt = fake_module("tensorrt", "10.3.0")
    trt.on("Builder.build_serialized_network", lambda builder, network, config: trt.host_memory(b"plan"))
    trt.on("ICudaEngine.num_io_tensors", lambda engine: 2)

Defaults: a method that returns an object of a class returns a fake of it, one that returns ``bool`` returns True unless
its name starts with ``get_``. Properties are what a constructor was given under their name, else False, 0, "" or None,
until they are set. Setting one is recorded in ``calls`` as ``("Class.property=", (value,))``, and a constructor as
``("Class.__init__", arguments)``.
"""

from __future__ import annotations

import ast
import functools
import json
import operator
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

BINDINGS = Path(__file__).with_name("bindings")
CONVERTED = re.compile(r"Dims|Weights|Permutation")  # pybind11 makes these of tuples, lists and arrays
ABSENT = object()
NAMES = {"IParserError": "ParserError"}  # C++ names in signatures that Python knows under another


def recording(name: str, version: str) -> dict[str, Any]:
    """What was recorded of a release."""
    record: dict[str, Any] = json.loads((BINDINGS / f"{name}-{version}.json").read_text())
    return record


class Parameter(NamedTuple):
    name: str
    kind: str
    default: str | None  # as the signature spells it
    keyword_only: bool


class Signature(NamedTuple):
    parameters: tuple[Parameter, ...]
    returns: str
    anything: bool  # *args, **kwargs


def split_top(text: str, mark: str) -> list[str]:
    """``text`` split at a character where it is outside all brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{<":
            depth += 1
        elif char in ")]}>":
            depth -= 1
        if char == mark and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return parts


@functools.cache
def parse_signature(line: str, *, bound: bool) -> Signature:
    """A recorded line, ``create_network(self: Builder, flags: int = 0) -> INetworkDefinition``, in parts."""
    head, arrow, returns = line.rpartition(") -> ")
    inside = (head if arrow else line.rstrip()[:-1]).partition("(")[2]
    words = [word.strip() for word in split_top(inside, ",") if word.strip()]
    parameters: list[Parameter] = []
    keyword_only = anything = False
    for word in words[1:] if bound else words:
        if word.startswith("*"):
            keyword_only, anything = word == "*", anything or word != "*"
        elif word != "/":
            declared, *default = split_top(word, "=")
            name, _, kind = declared.partition(":")
            parameters.append(
                Parameter(name.strip(), kind.strip(), default[0].strip() if default else None, keyword_only)
            )
    return Signature(tuple(parameters), returns.strip() if arrow else "", anything)


class FakeEnum:
    """A member of an enum: pybind11's, which is no int but turns into one and can be a key."""

    __members__: dict[str, FakeEnum]

    def __new__(cls, value: int) -> FakeEnum:
        for member in cls.__members__.values():
            if member.value == value:
                return member
        return cls._member("???", value)

    @classmethod
    def _member(cls, name: str, value: int) -> FakeEnum:
        self = object.__new__(cls)
        self.name, self.value = name, value
        return self

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.value == self.value

    def __hash__(self) -> int:
        return hash(self.value)

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __repr__(self) -> str:
        return f"<{self}: {self.value}>"


def enum_operator(name: str) -> Callable[..., Any]:
    if name in ("__int__", "__index__"):
        return lambda self: self.value
    function = getattr(operator, name)

    def method(self: FakeEnum, *others: Any) -> Any:
        if any(type(other) is not type(self) for other in others):
            raise TypeError("Expected an enumeration of matching type!")
        return function(self.value, *(other.value for other in others))

    return method


class FakeMeta(type):
    """The metaclass of pybind11's classes: a subclass written in Python must call the ``__init__`` it overrides."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        instance = super().__call__(*args, **kwargs)
        if "_values" not in vars(instance):
            raise TypeError(f"{cls.__name__}.__init__() must be called when overriding __init__")
        return instance


class FakeObject(metaclass=FakeMeta):
    """An object of a recorded class; ``_values`` holds what its properties were set to."""

    _recorded = ""  # the class's own name in the recording; "" in subclasses that tests or callers write

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{type(self).__name__}: No constructor defined!")

    def __setattr__(self, name: str, value: Any) -> None:
        found = getattr(type(self), name, None)
        if not isinstance(found, property) and type(self)._recorded == type(self).__qualname__:
            raise AttributeError(f"{type(self).__qualname__!r} object has no attribute {name!r}")
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"<fake {type(self).__qualname__}>"

    __hash__ = object.__hash__


class FakeMemory(FakeObject, bytearray):
    """An ``IHostMemory``: something with a buffer, as ``bytes()``, a file's ``write`` and numpy take it."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name not in type(self)._public:
            raise AttributeError(f"'IHostMemory' object has no attribute {name!r}")
        return super().__getattribute__(name)

    def __bool__(self) -> bool:
        return True

    def _refuse(self, *args: Any) -> Any:
        raise TypeError("'IHostMemory' has a buffer but is no sequence")

    __len__ = __getitem__ = __setitem__ = __iter__ = __contains__ = __add__ = _refuse
    __eq__ = object.__eq__
    __hash__ = object.__hash__


class FakeDims(FakeObject, list):
    """A ``Dims``: equal to the tuple or list of the same numbers."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name not in type(self)._public:
            raise AttributeError(f"'Dims' object has no attribute {name!r}")
        return super().__getattribute__(name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list | tuple) and tuple(self) == tuple(other)

    def __repr__(self) -> str:
        return repr(tuple(self))

    __hash__ = None  # type: ignore[assignment]


class FakeModule(ModuleType):
    """See the top of this file."""

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__(record["name"])
        self.__version__ = record["version"]
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._record = record
        self._scripts: dict[str, Callable[..., Any]] = {}
        self._scriptable: set[str] = set()
        self._classes: dict[str, type] = {}
        for name, entry in record["classes"].items():
            if "enum" in entry:
                self._classes[name] = self._enum(name, entry)
        for name in record["classes"]:
            self._class(name)
        for name, entry in record["classes"].items():
            for key, value in entry.get("constants", {}).items():
                setattr(self._classes[name], key, self._constant(value))
        for name, cls in self._classes.items():
            if "." not in name:
                setattr(self, name, cls)
        for name, value in record["constants"].items():
            setattr(self, name, self._constant(value))
        for name, lines in record["functions"].items():
            setattr(self, name, self._function(name, lines, bound=False))

    # what a test uses

    def on(self, name: str, function: Callable[..., Any]) -> None:
        """Have ``function`` answer ``Class.method`` (called with the object and the arguments), a property or a
        function of the module, in place of the default."""
        if name not in self._scriptable:
            raise AttributeError(f"{self.__name__} {self.__version__} has no {name}")
        self._scripts[name] = function

    def make(self, name: str, /, **values: Any) -> Any:
        """An object of a recorded class, whether or not Python can construct it; ``values`` are its properties'."""
        cls = self._classes[name]
        instance = cls.__new__(cls)
        instance.__dict__["_values"] = {}
        for key, value in values.items():
            if not isinstance(getattr(cls, key, None), property):
                raise AttributeError(f"{name} of {self.__name__} {self.__version__} has no property {key}")
            instance.__dict__["_values"][key] = value
        return instance

    def host_memory(self, data: bytes) -> Any:
        """An ``IHostMemory`` that holds ``data``."""
        memory = self.make("IHostMemory", nbytes=len(data))
        bytearray.__init__(memory, data)
        return memory

    def called(self, name: str) -> list[tuple[Any, ...]]:
        """The arguments of each call of ``name``, in order."""
        return [arguments for called, arguments in self.calls if called == name]

    # how it is built

    def _enum(self, name: str, entry: dict[str, Any]) -> type:
        operators = {key: enum_operator(key) for key in entry["operators"]}
        properties = {key: self._property(name, key, *value) for key, value in entry.get("properties", {}).items()}
        body = {"__module__": self.__name__, "__qualname__": name, **operators, **properties}
        cls = type(name.rpartition(".")[2], (FakeEnum,), body)
        members: dict[str, FakeEnum] = {}
        for key, value in entry["enum"].items():
            same = [member for member in members.values() if member.value == value]
            members[key] = same[0] if same else cls._member(key, value)
            setattr(cls, key, members[key])
        cls.__members__ = members
        return cls

    def _class(self, name: str) -> type:
        if name in self._classes:
            return self._classes[name]
        entry = self._record["classes"][name]
        bases: list[type] = [self._class(base) for base in entry.get("bases", []) if base in self._record["classes"]]
        own = {"IHostMemory": FakeMemory, "Dims": FakeDims}.get(name, FakeObject)
        body: dict[str, Any] = {"__module__": self.__name__, "__qualname__": name, "_recorded": name}
        for key, value in entry.get("properties", {}).items():
            body[key] = self._property(name, key, *value)
        for key, lines in entry.get("methods", {}).items():
            if key == "__init__":
                body[key] = self._constructor(name, lines)
            elif not (issubclass(own, FakeDims) and key.startswith("__")):
                body[key] = self._function(f"{name}.{key}", lines, bound=True)
        if "__init__" not in body:
            body["__init__"] = FakeObject.__init__
        for key, lines in entry.get("static", {}).items():
            body[key] = staticmethod(self._function(f"{name}.{key}", lines, bound=False))
        inherited = set().union(*(getattr(base, "_public", set()) for base in bases))
        body["_public"] = inherited.union(*(entry.get(key, {}) for key in ("methods", "properties", "constants")))
        cls: type = FakeMeta(name.rpartition(".")[2], tuple(bases) or (own,), body)
        self._classes[name] = cls
        return cls

    def _constant(self, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value in self._classes:
            return self._classes[value]
        owner, _, member = value.rpartition(".")
        return self._classes[owner].__members__[member] if owner in self._classes else value

    def _property(self, owner: str, name: str, kind: str, mode: str) -> property:
        key = f"{owner}.{name}"
        self._scriptable.add(key)

        def get(instance: Any) -> Any:
            if key in self._scripts:
                return self._scripts[key](instance)
            values = instance.__dict__.get("_values", {})
            return values[name] if name in values else self._default(kind, "property")

        def put(instance: Any, value: Any) -> None:
            if not self._accepts(kind, value):
                raise TypeError(f"{key}: incompatible value {value!r}; it is a {kind}")
            self.calls.append((f"{key}=", (value,)))
            instance.__dict__["_values"][name] = value

        return property(get if "r" in mode else None, put if "w" in mode else None)

    def _bind(self, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """The arguments in the signature's order, or None if it does not take them."""
        if signature.anything:
            return (*args, *kwargs.values())
        places = [parameter for parameter in signature.parameters if not parameter.keyword_only]
        given = dict(zip((parameter.name for parameter in places), args, strict=False))
        if len(args) > len(places) or given.keys() & kwargs.keys():
            return None
        given |= kwargs
        if given.keys() - {parameter.name for parameter in signature.parameters}:
            return None
        bound = []
        for parameter in signature.parameters:
            value = given.pop(parameter.name, ABSENT)
            if value is ABSENT:
                if parameter.default is None:
                    return None
                if not given:  # only defaults are left, unless a required one is
                    continue
                value = self._spelled(parameter)
            elif not self._accepts(parameter.kind, value, optional=parameter.default == "None"):
                return None
            bound.append(value)
        return tuple(bound)

    def _spelled(self, parameter: Parameter) -> Any:
        """A default as a value: a literal, a member of an enum (``<Severity.WARNING: 2>``) or the text."""
        text = parameter.default or ""
        cls = self._resolve(parameter.kind)
        if cls is not None and issubclass(cls, FakeEnum) and (member := re.search(r"(\w+)(: -?\d+>)?$", text)):
            return cls.__members__.get(member[1], text)
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text

    def _match(
        self, key: str, signatures: list[Signature], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Signature, tuple[Any, ...]]:
        for signature in signatures:
            bound = self._bind(signature, args, kwargs)
            if bound is not None:
                return signature, bound
        raise TypeError(f"{key}(): incompatible function arguments {args!r} {kwargs!r}; it takes {signatures}")

    def _function(self, key: str, lines: list[str], *, bound: bool) -> Callable[..., Any]:
        self._scriptable.add(key)
        signatures = [parse_signature(line, bound=bound) for line in lines]

        def call(*args: Any, **kwargs: Any) -> Any:
            instance, rest = (args[:1], args[1:]) if bound else ((), args)
            signature, values = self._match(key, signatures, rest, kwargs)
            self.calls.append((key, values))
            if key in self._scripts:
                return self._scripts[key](*instance, *values)
            return instance[0] if key.endswith(".__enter__") else self._default(signature.returns, key)

        if not bound:
            return call

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return call(self, *args, **kwargs)

        return method

    def _constructor(self, owner: str, lines: list[str]) -> Callable[..., None]:
        key = f"{owner}.__init__"
        self._scriptable.add(key)
        signatures = [parse_signature(line, bound=True) for line in lines]

        def construct(instance: Any, *args: Any, **kwargs: Any) -> None:
            signature, values = self._match(key, signatures, args, kwargs)
            self.calls.append((key, values))
            later = [self._spelled(parameter) for parameter in signature.parameters[len(values) :]]
            names = [parameter.name for parameter in signature.parameters]
            kept = dict(zip(names, (*values, *later), strict=True))  # as Builder.logger and Logger.min_severity are
            instance.__dict__["_values"] = {
                name: value for name, value in kept.items() if hasattr(type(instance), name)
            }
            if isinstance(instance, FakeDims):
                list.__init__(instance, values[0] if len(values) == 1 and not isinstance(values[0], int) else values)
            if key in self._scripts:
                self._scripts[key](instance, *values)

        return construct

    def _resolve(self, kind: str) -> type | None:
        """The class of the recording that an annotation names."""
        name = kind.rpartition("::")[2]
        name = NAMES.get(name, name)
        found = self._classes.get(name)
        if found is None and "::" in kind:
            found = next((cls for key, cls in self._classes.items() if key.endswith("." + name)), None)
        return found

    def _accepts(self, kind: str, value: Any, *, optional: bool = False) -> bool:
        """Whether pybind11 takes the value, where that can be told of the annotation; strict only where it surely is:
        it may be that a release refuses None where this does not."""
        kind = kind.removeprefix("typing.").removeprefix("typing_extensions.")
        if kind.startswith("Optional[") or kind.endswith(" | None") or optional:
            if value is None:
                return True
            kind = kind.removeprefix("Optional[").removesuffix("]") if kind.startswith("Optional[") else kind
            return self._accepts(kind.removesuffix(" | None"), value)
        if kind == "str":
            return value is None or isinstance(value, str | bytes)
        if kind in ("int", "SupportsInt", "SupportsIndex"):
            return hasattr(value, "__index__") or (hasattr(value, "__int__") and not hasattr(value, "is_integer"))
        if kind in ("float", "SupportsFloat"):
            return hasattr(value, "__float__") or hasattr(value, "__index__")
        if kind in ("buffer", "Buffer"):
            try:
                memoryview(value)
            except TypeError:
                return False
            return True
        cls = self._resolve(kind)
        if cls is None or CONVERTED.match(cls.__name__):
            return True
        return isinstance(value, cls) or (value is None and not issubclass(cls, FakeEnum))

    def _default(self, kind: str, asked: str) -> Any:
        """What a property (``asked`` is "property") or a method returns that no test scripted."""
        kind = kind.removeprefix("typing.").removeprefix("typing_extensions.")
        simple = {"int": 0, "SupportsInt": 0, "float": 0.0, "SupportsFloat": 0.0, "str": ""}
        if kind in simple:
            return simple[kind]
        if kind == "bool":
            return asked != "property" and not asked.rpartition(".")[2].startswith("get_")
        if re.match(r"(?i)list\b", kind):
            return []
        cls = self._resolve(kind)
        if cls is None:
            return None
        if issubclass(cls, FakeEnum):
            return min(cls.__members__.values(), key=lambda member: member.value)
        return None if asked == "property" and not issubclass(cls, FakeDims) else self.make(cls.__qualname__)


def fake_module(name: str, version: str) -> Any:
    """A fake of a recorded release: ``tensorrt`` 10.3.0, for one. Each call makes a new one, with its own classes."""
    return FakeModule(recording(name, version))
