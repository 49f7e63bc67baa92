"""The devices that engines are built for: what each has, and where that is written.

Memory and bandwidth are the makers' figures, from the page that ``source`` names; nothing here was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from famexport.errors import UsageError

TENSORRT, RTX = "tensorrt", "tensorrt-rtx"
# What TensorRT-RTX 1.7 names in its ComputeCapability; Jetson and Hopper are not among them
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
_ADA = ("fp32", "fp16", "bf16", "int8", "int4", "fp8")
_AMPERE = ("fp32", "fp16", "bf16", "int8", "int4")
_BLACKWELL = (*_ADA, "fp4")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One device with the software it is used with.

    Args:
        compute_capability: of the GPU, as "8.7".
        tensorrt: (first, before): versions of full TensorRT that this target has.
        cuda: version of its CUDA; on PCs and servers the oldest that fits.
        memory_gb, bandwidth_gb_s: 1e9 bytes, and 1e9 bytes a second. Jetson shares its memory with the CPU.
        precisions: dtypes that the GPU multiplies in; engines have those that the graph asks for.
        source: where the figures come from.
    """

    name: str
    gpu: str
    compute_capability: str
    arch: str
    tensorrt: tuple[str, str]
    cuda: str
    memory_gb: float
    bandwidth_gb_s: float
    precisions: tuple[str, ...]
    source: str

    @property
    def engines(self) -> tuple[str, ...]:
        """What can build for it: full TensorRT on the device itself, TensorRT-RTX anywhere."""
        rtx = self.compute_capability in RTX_CAPABILITIES and self.arch == "x86_64"
        return (TENSORRT, RTX) if rtx else (TENSORRT,)


def _orin(name: str, gpu: str, memory_gb: float, bandwidth_gb_s: float) -> list[Target]:
    source = "NVIDIA Jetson Orin modules, technical specifications; JetPack release notes"
    return [
        Target(
            name=f"{name}-{jetpack}",
            gpu=gpu,
            compute_capability="8.7",
            arch="aarch64",
            tensorrt=tensorrt,
            cuda=cuda,
            memory_gb=memory_gb,
            bandwidth_gb_s=bandwidth_gb_s,
            precisions=_AMPERE,
            source=source,
        )
        for jetpack, tensorrt, cuda in (("jp6", ("10.3", "10.4"), "12.6"), ("jp7", ("10.13", "12"), "13.2"))
    ]


def _card(
    name: str,
    gpu: str,
    capability: str,
    memory_gb: float,
    bandwidth_gb_s: float,
    precisions: tuple[str, ...],
    *,
    first: str = "10.3",
    cuda: str = "12.6",
    arch: str = "x86_64",
) -> Target:
    return Target(
        name=name,
        gpu=gpu,
        compute_capability=capability,
        arch=arch,
        tensorrt=(first, "12"),
        cuda=cuda,
        memory_gb=memory_gb,
        bandwidth_gb_s=bandwidth_gb_s,
        precisions=precisions,
        source=f"{gpu} datasheet",
    )


_ALL = [
    *_orin("jetson-orin-nano", "NVIDIA Jetson Orin Nano 8GB", 8, 102),
    *_orin("jetson-orin-nx", "NVIDIA Jetson Orin NX 16GB", 16, 102.4),
    *_orin("jetson-agx-orin", "NVIDIA Jetson AGX Orin 64GB", 64, 204.8),
    _card(
        "jetson-thor",
        "NVIDIA Jetson AGX Thor",
        "11.0",
        128,
        273,
        _BLACKWELL,
        first="10.13",
        cuda="13.0",
        arch="aarch64",
    ),
    _card(
        "dgx-spark", "NVIDIA DGX Spark (GB10)", "12.1", 128, 273, _BLACKWELL, first="10.13", cuda="13.0", arch="aarch64"
    ),
    _card("a100", "NVIDIA A100 80GB SXM", "8.0", 80, 2039, _AMPERE),
    _card("h100", "NVIDIA H100 80GB SXM", "9.0", 80, 3350, _ADA),
    _card("h200", "NVIDIA H200 SXM", "9.0", 141, 4800, _ADA),
    _card("l4", "NVIDIA L4", "8.9", 24, 300, _ADA),
    _card("rtx-3090", "NVIDIA GeForce RTX 3090", "8.6", 24, 936, _AMPERE),
    _card("rtx-4090", "NVIDIA GeForce RTX 4090", "8.9", 24, 1008, _ADA),
    _card("rtx-5090", "NVIDIA GeForce RTX 5090", "12.0", 32, 1792, _BLACKWELL, first="10.8", cuda="12.8"),
    _card("t4", "NVIDIA T4", "7.5", 16, 320, ("fp32", "fp16", "int8", "int4")),
]
TARGETS = {target.name: target for target in _ALL}


def find_target(name: str) -> Target:
    """The target of that name.

    Raises:
        UsageError: there is none; all are named.
    """
    if name not in TARGETS:
        raise UsageError(f"no target {name!r:.80}; expected one of {', '.join(TARGETS)}")
    return TARGETS[name]


def precision_problems(target: Target, engine: str, precision: str) -> list[str]:
    """Why an engine of that precision cannot be built for the target; nothing where it can."""
    works = [p for p in target.precisions if p not in ("int8", "int4", "fp8", "fp4") or p == precision]
    if engine == RTX and target.compute_capability == "7.5":
        works = [p for p in works if p != "fp32"]  # TensorRT-RTX 1.7.1: "FP32 GEMM is not supported"
    if precision in works:
        return []
    return [
        f"{target.name} ({target.gpu}, compute capability {target.compute_capability}) has no {precision} in {engine}; "
        f"export with --precision {' or '.join(p for p in works)}"
    ]


def versions_fit(version: str, bounds: tuple[str, str]) -> bool:
    """Whether first <= version < before, by their numbers."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(".") if part.isdecimal()]

    return numbers(bounds[0]) <= numbers(version) < numbers(bounds[1])
