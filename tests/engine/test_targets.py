"""The table of targets, and what cannot be built for them."""

from __future__ import annotations

import pytest

from famexport.engine.targets import RTX_CAPABILITIES, TARGETS, find_target, precision_problems, versions_fit
from famexport.errors import UsageError


def test_the_targets_of_the_issue_are_there() -> None:
    for board in ("jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin"):
        assert TARGETS[f"{board}-jp6"].tensorrt == ("10.3", "10.4")
        assert TARGETS[f"{board}-jp7"].compute_capability == "8.7"
    names = {"jetson-thor", "dgx-spark", "a100", "h100", "h200", "l4", "rtx-3090", "rtx-4090", "rtx-5090", "t4"}
    assert names < set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_is_complete(name: str) -> None:
    target = TARGETS[name]
    assert target.name == name
    assert target.source
    assert target.memory_gb >= 8
    assert 100 <= target.bandwidth_gb_s <= 5000
    assert "fp16" in target.precisions
    assert target.arch == ("aarch64" if "jetson" in name or name == "dgx-spark" else "x86_64")
    assert ("tensorrt-rtx" in target.engines) == (
        target.compute_capability in RTX_CAPABILITIES and target.arch == "x86_64"
    )
    assert versions_fit(target.tensorrt[0], target.tensorrt)
    assert not versions_fit(target.tensorrt[1], target.tensorrt)


def test_capabilities_of_tensorrt_rtx_are_those_of_the_installed_one() -> None:
    import tensorrt_rtx as trt

    members = {name for name in trt.ComputeCapability.__members__ if name.startswith("SM")}
    assert members == {"SM" + c.replace(".", "") for c in RTX_CAPABILITIES}


@pytest.mark.parametrize(
    ("target", "precision"), [("jetson-orin-nx-jp6", "fp8"), ("jetson-thor", "fp7"), ("t4", "bf16")]
)
def test_precisions_a_target_has_not(target: str, precision: str) -> None:
    (problem,) = precision_problems(find_target(target), "tensorrt", precision)
    assert f"{target} (" in problem
    assert f"has no {precision} in tensorrt; export with --precision fp32 or fp16" in problem


def test_full_tensorrt_multiplies_float32_on_turing_and_rtx_does_not() -> None:
    t4 = find_target("t4")
    assert not precision_problems(t4, "tensorrt", "fp32")
    assert (
        "has no fp32 in tensorrt-rtx; export with --precision fp16" in precision_problems(t4, "tensorrt-rtx", "fp32")[0]
    )
    assert not precision_problems(t4, "tensorrt-rtx", "fp16")


def test_unknown_target() -> None:
    with pytest.raises(UsageError, match="no target 'orin'; expected one of jetson-orin-nano-jp6, .* t4$"):
        find_target("orin")


@pytest.mark.parametrize(
    ("version", "fits"), [("10.3.0", True), ("10.3.0.26", True), ("10.4.0", False), ("10.2.9", False), ("11.0", False)]
)
def test_versions_compare_by_number(version: str, fits: bool) -> None:
    assert versions_fit(version, ("10.3", "10.4")) is fits
    assert versions_fit("10.13.3.9", ("10.3", "12"))
