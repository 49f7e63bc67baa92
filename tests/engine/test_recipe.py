"""Recipes: the ones that ship, and what is refused in others."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from famexport.cli import _run
from famexport.engine.targets import TARGETS
from famexport.errors import ConfigError, UsageError
from famexport.recipe import folder, load_recipe, parse_recipe, recipe_names

GOOD = "description: d\nexport:\n  precision: fp16\nbuild:\n  target: rtx-4090\n  engine: tensorrt-rtx\n"


def test_at_most_ten_recipes_each_with_its_commands() -> None:
    assert 6 <= len(recipe_names()) <= 10
    for name in recipe_names():
        head = "".join(
            line for line in (folder() / f"{name}.yaml").read_text().splitlines(True) if line.startswith("#")
        )
        assert f"famexport export CKPT -o BUNDLE --recipe {name}" in head
        assert (f"famexport build BUNDLE --recipe {name}" in head) == (load_recipe(name).target is not None)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert name.endswith(recipe.export["precision"])
    assert recipe.target is None or recipe.engine in TARGETS[recipe.target].engines


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_exports_and_those_for_rtx_build(
    name: str, make_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from famexport.config import preset

    made = make_checkpoint(tmp_path / "ckpt", preset("tiny"))
    out = tmp_path / "out"
    assert _run(["export", str(made), "-o", str(out), "--recipe", name, "--parity-blocks", "8", "--quiet"], False) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    recipe = load_recipe(name)
    assert manifest["precision"] == recipe.export["precision"]
    assert set(manifest["graphs"]) == {"block_step", "append_step", "commit_block"}
    code = _run(["build", str(out), "--recipe", name, "--json"], False)
    said = capsys.readouterr()
    if recipe.engine == "tensorrt-rtx":
        assert code == 0
        built = json.loads(said.out.splitlines()[-1])["engines"]
        assert {entry["graph"] for entry in built.values()} == set(manifest["graphs"])
    elif recipe.target:  # full TensorRT is not installed where the tests run
        assert code == 5
        assert "run this there" in said.err or "needs the package 'tensorrt'" in said.err
    else:
        assert code == 2
        assert "builds no engine" in said.err


def test_options_typed_go_before_the_recipe(make_checkpoint, tmp_path: Path) -> None:
    from famexport.config import preset

    made = make_checkpoint(tmp_path / "ckpt", preset("tiny"))
    out = tmp_path / "out"
    more = ["--precision", "fp32", "--graphs", "block", "--parity-blocks", "4", "-q"]
    assert _run(["export", str(made), "-o", str(out), "--recipe", "rtx-ada-fp16", *more], False) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["precision"], set(manifest["graphs"])) == ("fp32", {"block_step"})


def test_a_good_recipe_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD + "  batch_profile: [1, 2, 4]\n  workspace_mb: 64\n".replace("", ""))
    with pytest.raises(ConfigError, match="a batch profile is for a dynamic batch, this bundle has 1"):
        load_recipe(str(path))
    path.write_text(GOOD.replace("fp16\n", "fp16\n  batch: dynamic\n") + "  batch_profile: [1, 2, 4]\n")
    recipe = load_recipe(str(path))
    assert recipe.options.batch_profile == (1, 2, 4)
    assert (recipe.target, recipe.engine, recipe.export["batch"]) == ("rtx-4090", "tensorrt-rtx", "dynamic")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "extra: 1\n", "unknown key 'extra'"),
        (GOOD.replace("  precision", "  presicion"), "unknown key 'presicion'"),
        (GOOD + "  taget: h100\n", "unknown key 'taget'"),
        (
            GOOD.replace("rtx-4090", "jetson-orin-nx-jp6").replace("tensorrt-rtx", "tensorrt").replace("fp16", "fp8"),
            "has no fp8",
        ),
        (GOOD.replace("rtx-4090", "orin"), "no target 'orin'"),
        (GOOD.replace("tensorrt-rtx", "trt"), "engine is 'trt'"),
        (GOOD.replace("rtx-4090", "h100"), "tensorrt-rtx has no engines for h100"),
        (GOOD.replace("fp16", "16"), "precision must be str, got int"),
        (GOOD.replace("fp16", "fp16\n  opset: 24"), "opset is 24, expected 18 to 23"),
        (
            GOOD.replace("fp16", "int8"),
            "build: of an int8 bundle, which is for ONNX Runtime on CPUs, no engine can be built",
        ),
        (GOOD.replace("fp16", "fp16\n  chunks: [1]"), "chunks are of append_step, which the bundle would not have"),
        (GOOD + "build: {}\n", "occurs twice"),
        (GOOD.replace("d\n", "!!python/object/apply:os.system [true]\n", 1), "is not allowed"),
        (GOOD.replace("d\n", "!x d\n", 1), "'!x' is not allowed"),
        ("a: &a [1]\nb: *a\n", "uses aliases"),
        ("", "is empty"),
        ("[" * 7, "no valid YAML"),
        ("[" * 8 + "]" * 8, "recipe must be a map, got list"),
        ("[" * 9 + "]" * 9, "line 1: nested deeper than 8 levels"),
        ("- " * 9 + "a", "nested deeper than 8 levels"),
        ("description: !!bool maybe\n", "line 1: 'maybe' is no bool"),
        ("\ndescription: !!float ''\n", "line 2: '' is no float"),
        ("description: !!int ''\n", "'' is no int"),
        ("description: !!int x\n", "'x' is no int"),
        ("description: !!float 1" + ":59" * 300 + "\n", "is no float"),
        (GOOD.replace("fp16\n", "fp16\n  opset: 0x" + "f" * 9000 + "\n"), "does not fit 64 bits"),
        (GOOD.replace("d\n", "!<%1b]0;x%07> d\n", 1), r"'\x1b]0;x\x07' is not allowed"),
        ("[" * 20 + "]" * 20, "nested deeper"),
        ("- 1\n", "recipe must be a map, got list"),
        (GOOD.replace("fp16\n", "fp16\n  batch: 0\n"), "batch is 0"),
        (GOOD.replace("fp16\n", "fp16\n  chunks: [1, true]\n"), "chunks is"),
        (GOOD.replace("fp16\n", "fp16\n  opset: 99\n"), "opset is 99, expected 18 to 23"),
        (GOOD + "  optimization_level: 9\n", "optimization_level must be 0 to 5"),
        (GOOD + "  attention: flash\n", "attention must be decomposable or fused"),
        (GOOD.replace("description: d\n", ""), "lacks the key 'description'"),
        ("description: 2020-01-01\nexport: {precision: fp32}\n", "timestamp' is not allowed"),
    ],
)
def test_what_a_recipe_may_not_say(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(text.encode(), "mine", "mine.yaml")
    assert said in str(caught.value)
    assert str(caught.value).startswith("mine.yaml")


@pytest.mark.parametrize("nest", ["{", "[", "[a,", "{a: ", "{\n", "- ", "? "])
def test_deep_nesting_costs_no_time(nest: str) -> None:
    """The scanner's time grows with the square of the depth: minutes for a file of 64 KiB."""
    text, began = (nest * 2**16)[: 2**16], time.process_time()
    with pytest.raises(ConfigError, match="nested deeper"):
        parse_recipe(text.encode(), "mine", "mine.yaml")
    assert time.process_time() - began < 5


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(ConfigError, match="no valid YAML"):
        parse_recipe(b"\xff\xfe\x00", "mine", "mine.yaml")


def test_names_are_not_paths(tmp_path: Path) -> None:
    for name in ("nope", "../recipes/cpu-fp32", str(tmp_path), "cpu-fp32.yaml"):
        with pytest.raises(UsageError, match="no recipe"):
            load_recipe(name)


def test_list_show_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run(["recipe", "list", "--json"], False) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(recipe_names())
    assert _run(["recipe", "show", "cpu-fp32"], False) == 0
    shown = capsys.readouterr().out
    assert shown == (folder() / "cpu-fp32.yaml").read_text()
    assert _run(["recipe", "copy", "cpu-fp32"], False) == 0
    assert (tmp_path / "cpu-fp32.yaml").read_text() == shown
    assert _run(["recipe", "copy", "cpu-fp32"], False) == 2
    assert "is there already" in capsys.readouterr().err
    assert _run(["recipe", "show", "nope"], False) == 2
