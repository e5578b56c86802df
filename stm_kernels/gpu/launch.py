"""A kernel launch as a value: what runs on a device is what is compiled ahead of time for another."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from stm_kernels.affinity import Affinity

INTERPRETER = "interpreter"


def target_of(architecture: str) -> GPUTarget:
    """What Triton compiles for: "sm_90", "gfx942", …, with the threads of a warp, 64 on CDNA and 32 on all others."""
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


@dataclass(frozen=True)
class Elsewhere:
    """A GPU that need not be here, as far as Triton asks before it compiles a launch."""

    architecture: str
    """"sm_90", "gfx942", …"""
    multiprocessors: int
    """How many programs run at once."""
    compiled: dict[str, Any] = field(default_factory=dict)
    """The compiled kernels, by the key under which Triton's cache has them."""

    def get_current_target(self) -> GPUTarget:
        return target_of(self.architecture)

    def get_current_device(self) -> str:
        """What a kernel tells its targets apart by."""
        return self.architecture

    def get_current_stream(self, device: str) -> int:
        return 0


_elsewhere: ContextVar[Elsewhere] = ContextVar("_elsewhere")


@contextmanager
def elsewhere(gpu: Elsewhere) -> Iterator[None]:
    """Compile launches on the meta device for a GPU, as a launch there would, and run nothing.

    Raises:
        RuntimeError: at a launch, if the process runs Triton's interpreter, which compiles nothing.
    """
    before, token = driver._active, _elsewhere.set(gpu)
    driver.set_active(gpu)
    try:
        yield
    finally:
        driver.set_active(before)
        _elsewhere.reset(token)


@dataclass(frozen=True)
class Launch:
    """A Triton kernel, its grid and everything it is called with."""

    kernel: Any
    """The `@triton.jit` function."""
    grid: tuple[int, ...]
    """Programs along each axis."""
    arguments: dict[str, Any]
    """Every parameter of the kernel by name, constexpr ones too."""
    num_warps: int
    """Warps per program."""
    num_stages: int
    """Loop iterations whose loads are in flight."""

    def run(self, device: torch.device) -> None:
        """Launch on a GPU, or on the CPU in Triton's interpreter; on the meta device only compile, see `elsewhere`."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if device.type == "meta":
            if not isinstance(self.kernel, JITFunction):
                raise RuntimeError("TRITON_INTERPRET is set: the interpreter compiles nothing, unset it")
            compiled = self.kernel.warmup(grid=self.grid, **self.arguments, **options)
            _elsewhere.get().compiled[compiled.hash] = compiled
            return
        if device.type != "cuda":
            self.kernel[self.grid](**self.arguments, **options)
            return
        with torch.cuda.device(device):
            self.kernel[self.grid](**self.arguments, **options)


def architecture_of(device: torch.device) -> str:
    """Name what a launch on this device is compiled for: "sm_90", "gfx942", …, or "interpreter" on a CPU."""
    if device.type == "meta":
        return _elsewhere.get().architecture
    if device.type != "cuda":
        return INTERPRETER
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once, one on each multiprocessor; 1 for the interpreter."""
    if device.type == "meta":
        return _elsewhere.get().multiprocessors
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def strides(name: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    """The strides of a tensor as kernel arguments: `strides("memory_key", k, "bnc")` gives `memory_key_stride_b`, …

    Without a tensor they are 1, which a kernel doesn't look at.
    """
    return {f"{name}_stride_{axis}": 1 if tensor is None else tensor.stride(i) for i, axis in enumerate(axes)}


def affinity_arguments(affinity: Affinity) -> dict[str, Any]:
    """The arguments of every kernel that computes the affinity. The bias goes in the unit of the dot products."""
    bias = None if affinity.key_bias is None else affinity.key_bias / affinity.scale
    _, M, N = affinity.sizes
    return {
        "query_key_ptr": affinity.query_key,
        "memory_key_ptr": affinity.memory_key,
        "key_bias_ptr": bias,
        "lengths_ptr": affinity.lengths,
        **strides("query_key", affinity.query_key, "bmc"),
        **strides("memory_key", affinity.memory_key, "bnc"),
        "key_bias_stride_b": 1 if bias is None else bias.stride(0),
        "M": M,
        "N": N,
        "scale": affinity.scale,
        "scale_log2": affinity.scale * math.log2(math.e),
        "C": affinity.query_key.shape[2],
    }


def refuse_interpreted_bfloat16(tensor: Tensor) -> None:
    """Raise where a result would be wrong: the interpreter multiplies bfloat16 as if it were integers."""
    if tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu":
        raise ValueError("query_key: bfloat16 needs a GPU, Triton's interpreter multiplies it wrongly; use float32")
