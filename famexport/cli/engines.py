"""Commands about what is built for a device: build, kernels; and the recipes: recipe list, show and copy."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from famexport.cli import options as opt
from famexport.cli.output import err, out, print_json, size, stages
from famexport.errors import UsageError

recipe = typer.Typer(help="The recipes: options for one kind of device.", no_args_is_help=True, rich_markup_mode=None)
RecipeName = Annotated[str, typer.Argument(help="A recipe, by name or by the path of its .yaml file.", metavar="NAME")]


def build(
    context: typer.Context,
    bundle: Annotated[Path | None, typer.Argument(help="A bundle directory.", metavar="BUNDLE")] = None,
    target: Annotated[
        str | None, typer.Option(help="The device: jetson-orin-nx-jp6, h100, rtx-4090, ...; 'list' names all.")
    ] = None,
    engine: Annotated[
        opt.Engine | None,
        typer.Option(
            help="tensorrt: on the device itself; tensorrt-rtx: ahead of time, no GPU.", show_default="what is here"
        ),
    ] = None,
    recipe: opt.Recipe = None,
    attention: Annotated[
        opt.Attention, typer.Option(help="fused: native attention builds only if there is a kernel for it.")
    ] = opt.Attention.decomposable,
    optimization_level: Annotated[
        int | None, typer.Option(help="0 (quick) to 5.", min=0, max=5, show_default="TensorRT's own")
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(help="Most scratch memory of a layer, in MiB.", min=1, show_default="the device's")
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File that keeps timings between builds (tensorrt only).")
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Runs on later versions of the same major (tensorrt only).")
    ] = False,
    hardware_compatible: Annotated[
        opt.Hardware, typer.Option(help="Other GPUs that may load it (tensorrt only).")
    ] = opt.Hardware.none,
    strip: Annotated[bool, typer.Option("--strip", help="Leave the weights out of the plan.")] = False,
    refit: Annotated[bool, typer.Option("--refit", help="Weights can be replaced later.")] = False,
    batch_profile: Annotated[
        str | None, typer.Option(help="MIN,OPT,MAX rows, for a dynamic batch.", show_default="1,1,8")
    ] = None,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Build TensorRT engines of a bundle's graphs, into the bundle."""
    from famexport.engine.build import build_engines
    from famexport.engine.build_options import BuildOptions
    from famexport.engine.targets import TARGETS
    from famexport.inspection import layer_counts

    if target == "list":
        _list_targets(json)
        return
    if bundle is None:
        raise UsageError("name a bundle: famexport build BUNDLE --target TARGET")
    chosen, kind, options = target, engine.value if engine else None, BuildOptions()
    if recipe:
        from famexport.recipe import load_recipe

        read = load_recipe(recipe)
        chosen, kind, options = target or read.target, kind or read.engine, read.options
        if chosen is None:
            raise UsageError(f"the recipe {read.name} builds no engine; its bundle runs as it is")
    if chosen is None:
        raise UsageError(f"name a device with --target: {', '.join(TARGETS)}")
    given = {
        "attention": attention.value,
        "optimization_level": optimization_level,
        "workspace_mb": workspace,
        "timing_cache": timing_cache,
        "version_compatible": version_compatible,
        "hardware_compatible": hardware_compatible.value,
        "strip": strip,
        "refit": refit,
        "batch_profile": _profile(batch_profile),
    }
    typed = {key: value for key, value in given.items() if opt.is_typed(context, key.removesuffix("_mb"))}
    with stages(quiet) as report:
        built = build_engines(
            bundle, chosen, engine=kind, options=BuildOptions(**{**vars(options), **typed}), progress=report
        )
    if json:
        engines = {entry.name: {**entry.to_dict(), "kept": entry.graph in built.kept} for entry in built.engines}
        print_json({"bundle": str(bundle), "target": chosen, "engines": engines})
    elif not quiet:
        for entry in built.engines:
            done = "unchanged" if entry.graph in built.kept else f"built in {entry.build_seconds:.1f} s"
            products = layer_counts(entry.layers.get("MATRIX_MULTIPLY"))
            attention_said = f", attention {entry.attention}" if entry.attention else ""
            out.print(
                f"{entry.graph}: {entry.engine} {entry.device.tensorrt}, {size(entry.bytes)}, {done}, "
                f"products {products}{attention_said}",
                markup=False,
            )


def _list_targets(json: bool) -> None:
    from famexport.engine.targets import TARGETS

    if json:
        print_json({name: {**asdict(target), "engines": target.engines} for name, target in TARGETS.items()})
        return
    for name, target in TARGETS.items():
        out.print(f"{name:<22} {target.gpu}, {' or '.join(target.engines)}", markup=False)


def kernels(
    out_folder: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the library.", show_default="$FAMEXPORT_KERNELS, or inside the package"),
    ] = None,
    arch: Annotated[
        str, typer.Option(help="nvcc's -arch: native is this machine's GPU, all-major any, sm_87 Jetson Orin.")
    ] = "native",
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Compile the CUDA kernels that make ort-cuda faster, with nvcc; it takes half a minute."""
    from famexport.kernels.build import build as compile_kernels
    from famexport.kernels.library import FOLDER, folder

    library = compile_kernels(out_folder or folder(), arch=arch)
    if json:
        print_json({"library": str(library), "bytes": library.stat().st_size, "arch": arch})
    elif not quiet:
        out.print(f"{library}: {size(library.stat().st_size)}, for {arch}", markup=False)
        if (used := library.parent.resolve()) != folder().resolve():
            out.print(f"to have it used: export {FOLDER}={shlex.quote(str(used))}", markup=False)


def _profile(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"--batch-profile must be MIN,OPT,MAX, got {text!r:.80}")
    low, usual, high = map(int, parts)
    return low, usual, high


@recipe.command("list")
def recipe_list(json: opt.Json = False) -> None:
    """Name the recipes and say what each is for."""
    from famexport.recipe import load_recipe, recipe_names

    found = {name: load_recipe(name).description for name in recipe_names()}
    if json:
        print_json(found)
        return
    for name, description in found.items():
        out.print(f"{name:<22} {description}", markup=False)


@recipe.command("show")
def recipe_show(name: RecipeName) -> None:
    """Print a recipe as it is."""
    from famexport.recipe import load_recipe, recipe_path

    load_recipe(name)
    print(recipe_path(name).read_text(), end="")


@recipe.command("copy")
def recipe_copy(
    name: RecipeName,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to; a file.", show_default="NAME.yaml")
    ] = None,
) -> None:
    """Copy a recipe, to change it."""
    from famexport.publish import write_output
    from famexport.recipe import load_recipe, recipe_path

    load_recipe(name)
    source = recipe_path(name)
    target = output or Path(source.name)
    if target.is_file():
        raise UsageError(f"{target} is there already; give another path with -o")
    write_output(target, source.read_bytes())
    err.print(f"{target}: use it with --recipe {target}", markup=False)
