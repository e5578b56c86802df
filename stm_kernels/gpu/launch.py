"""A kernel launch as a value: what runs on a device is what is compiled ahead of time for another."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INTERPRETER = "interpreter"


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
        """Launch on a GPU, or on the CPU in Triton's interpreter."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if device.type != "cuda":
            self.kernel[self.grid](**self.arguments, **options)
            return
        with torch.cuda.device(device):
            self.kernel[self.grid](**self.arguments, **options)


def architecture_of(device: torch.device) -> str:
    """Name what a launch on this device is compiled for: "sm_90", "gfx942", …, or "interpreter" on a CPU."""
    if device.type != "cuda":
        return INTERPRETER
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def strides(name: str, tensor: Tensor, axes: str) -> dict[str, int]:
    """The strides of a tensor as kernel arguments: `strides("memory_key", k, "bnc")` gives `memory_key_stride_b`, …"""
    return {f"{name}_stride_{axis}": stride for axis, stride in zip(axes, tensor.stride())}


def refuse_interpreted_bfloat16(tensor: Tensor) -> None:
    """Raise where a result would be wrong: the interpreter multiplies bfloat16 as if it were integers."""
    if tensor.dtype == torch.bfloat16 and tensor.device.type != "cuda":
        raise ValueError("query_key: bfloat16 needs a GPU, Triton's interpreter multiplies it wrongly; use float32")
