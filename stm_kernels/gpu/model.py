"""Predict a kernel's speed from its machine code, on a GPU that is not here: python -m stm_kernels.gpu.model

    python -m stm_kernels.gpu.model [--architecture sm_80 sm_90] [--tiles 128 64 256 8 3] [--kind descriptor]

First kernels whose speed is published, then the read, by default or with other tiles (queries, positions, value
channels, warps, stages). Counts what one iteration of the main loop asks of each unit of a multiprocessor, and divides
by what the unit does in a cycle, as NVIDIA's white papers have it; traffic beyond shared memory, starts and ends are
free. No number is fitted: what "apart" misses of the published speed is the error of the model. Needs triton, no GPU,
and no TRITON_INTERPRET in the environment.
"""

import argparse
import re
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from stm_kernels.affinity import Affinity
from stm_kernels.gpu.aot import machine_code
from stm_kernels.gpu.forward import forward_launch
from stm_kernels.gpu.launch import Launch
from stm_kernels.gpu.machine_code import main_loop
from stm_kernels.gpu.tma import descriptor_launch
from stm_kernels.gpu.tuning import ForwardTiles, forward_tiles


@dataclass(frozen=True)
class GPU:
    """What a GPU does in a second, or a multiprocessor in a cycle, by its white paper."""

    name: str
    multiprocessors: int
    gigahertz: float
    tensor: int
    """Operations of tensor cores in 16 bits, a cycle."""
    fp32: int
    """Lanes that multiply and add, a cycle."""
    shared_kib: int
    """Shared memory of a multiprocessor."""


# A100 SXM and H100 SXM: 312 and 989 TFLOP/s in 16 bits
GPUS = {"sm_80": GPU("A100", 108, 1.41, 2048, 64, 164), "sm_90": GPU("H100", 132, 1.83, 4096, 128, 228)}
# lanes of every multiprocessor, a cycle: special functions, integers and comparisons; bytes of shared memory; issued
# instructions; registers and warps that it holds
MUFU, ALU, SHARED, ISSUED, REGISTERS, WARPS = 16, 64, 128, 4, 65536, 64
FP32_NAMES = ("FFMA", "FADD", "FMUL", "IMAD")
ALU_NAMES = (
    "FMNMX",
    "FSEL",
    "FSETP",
    "ISETP",
    "IADD",
    "VIADD",
    "LOP3",
    "SEL",
    "LEA",
    "SHF",
    "PRMT",
    "F2FP",
    "MOV",
    "PLOP",
)


@dataclass(frozen=True)
class Prediction:
    """Cycles of a multiprocessor for one iteration of one program, by unit, and what follows."""

    cycles: dict[str, float]
    programs: int
    """That a multiprocessor holds at once."""
    operations: int
    """Useful ones of one iteration."""
    gpu: GPU

    def tflops(self, overlaps: bool) -> float:
        """The useful rate, products and all else at the same time or one after the other."""
        others = max(cycles for unit, cycles in self.cycles.items() if unit != "tensor")
        tensor = self.cycles["tensor"]
        cycles = max(tensor, others) if overlaps else tensor + others
        return self.operations / cycles * self.gpu.multiprocessors * self.gpu.gigahertz / 1e3

    @property
    def bound(self) -> str:
        """The unit that is busy longest."""
        return max(self.cycles, key=self.cycles.__getitem__)


def predict(launch: Launch, architecture: str, operations: int) -> Prediction:
    """Compile a launch and predict its main loop, one iteration of which does `operations` useful ones."""
    gpu, warps = GPUS[architecture], launch.num_warps
    code, registers, _, shared = machine_code(launch, architecture)
    loop = main_loop(code)
    cycles = {"tensor": sum(_tensor_cycles(line, gpu) for line in loop) * warps}
    lanes = {"FP32": (FP32_NAMES, gpu.fp32), "integer": (ALU_NAMES, ALU), "exponential": (("MUFU",), MUFU)}
    for unit, (names, width) in lanes.items():
        cycles[unit] = sum(line.startswith(names) for line in loop) * warps * 32 / width
    cycles["shared memory"] = sum(map(_shared_bytes, loop)) * warps / SHARED
    cycles["issue"] = len(loop) * warps / ISSUED
    held = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    # a program takes 1 KiB of shared memory for itself
    programs = min(held, int(gpu.shared_kib // (shared + 1)), WARPS // warps)
    return Prediction(cycles, programs, operations, gpu)


def _tensor_cycles(line: str, gpu: GPU) -> float:
    """Of one warp: a warp-group shares an HGMMA, which is as fast as it multiplies and as its operands come."""
    if found := re.match(r"HGMMA\.64x(\d+)x16\S* R\d+, (gdesc)?", line):
        rows = int(found[1]) + (64 if found[2] else 0)
        return max(2 * 64 * int(found[1]) * 16 / gpu.tensor, rows * 16 * 2 / SHARED) / 4
    return {"HMMA.16816": 4096, "HMMA.1688.": 2048}.get(line[:10], 0) / gpu.tensor


def _shared_bytes(line: str) -> int:
    """What one warp moves between registers and shared memory, and from global memory to it."""
    name = line.split()[0]
    if name.startswith("LDSM"):
        return 512 if name.endswith(".4") else 256 if name.endswith(".2") else 128
    if name.startswith(("LDS", "STS", "LDGSTS")):
        return 512 if ".128" in name else 256 if ".64" in name else 128
    return 128 if name.startswith(("SHFL", "STSM")) else 0


@triton.jit
def attention_kernel(query_ptr, key_ptr, value_ptr, out_ptr, positions, scale_log2,
                     CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Attention of one head with as many value as key channels, contiguous and without edges."""
    head = tl.program_id(1).to(tl.int64) * positions * CHANNELS
    c = tl.arange(0, CHANNELS)
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None] * CHANNELS + c[None, :]
    query = tl.load(query_ptr + head + rows)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, CHANNELS], tl.float32)
    for first in range(0, positions, BLOCK_N):
        places = head + (first + tl.arange(0, BLOCK_N))[:, None] * CHANNELS + c[None, :]
        logits = tl.dot(query, tl.trans(tl.load(key_ptr + places)))
        new_max = tl.maximum(row_max, tl.max(logits, 1) * scale_log2)
        weights = tl.exp2(logits * scale_log2 - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        total = tl.dot(weights.to(query.dtype), tl.load(value_ptr + places), total * shrink[:, None])
        row_max = new_max
    tl.store(out_ptr + head + rows, (total / row_sum[:, None]).to(query.dtype))


def attention(channels: int, block_m: int, block_n: int, warps: int, stages: int) -> tuple[Launch, int]:
    tensor = torch.empty(4, 32, 16384, channels, dtype=torch.float16, device="meta")
    arguments: dict[str, Any] = dict.fromkeys(("query_ptr", "key_ptr", "value_ptr", "out_ptr"), tensor)
    arguments |= {"positions": 16384, "scale_log2": 0.1, "CHANNELS": channels, "BLOCK_M": block_m, "BLOCK_N": block_n}
    return Launch(attention_kernel, (1,), arguments, warps, stages), 4 * block_m * block_n * channels


def calibrations(architecture: str) -> list[tuple[str, tuple[Launch, int], int]]:
    """Kernels by name, their useful operations of an iteration, and the published TFLOP/s of their like.

    Triton's fused attention, not causal, 16 384 positions: triton-lang.org, "Fused Attention" (the page names no GPU:
    an A100 by its speed); on an H100 the figures of FlashAttention-3 (Shah et al. 2024), 2024's Triton, and a run of
    PyTorch's benchmark (github.com/pytorch/benchmark/pull/2391).
    """
    if architecture == "sm_80":
        return [("attention, 64 channels", attention(64, 128, 64, 4, 3), 167)]
    return [
        ("attention, 64 channels", attention(64, 128, 64, 4, 3), 403),
        ("attention, 128 channels", attention(128, 128, 128, 8, 2), 395),
        ("the same, PyTorch's run", attention(128, 128, 128, 8, 2), 477),
    ]


def read(architecture: str, tiles: ForwardTiles | None, C: int = 128, V: int = 512) -> tuple[Launch, int]:
    """The read of the standard model, by default with TMA where there is one, and what it is for."""
    dtype = torch.bfloat16
    tiles = tiles or forward_tiles(architecture, dtype, C, V, descriptors=True)
    query, key, value = (
        torch.empty(2, n, c, dtype=dtype, device="meta") for n, c in ((1620, C), (32400, C), (32400, V))
    )
    out, lse = torch.empty(1, 2, 1620, V, dtype=dtype, device="meta"), torch.empty(1, 2, 1620, device="meta").double()
    affinity = Affinity(query, key, C**-0.5)
    if tiles.kind == "portable":
        launch = forward_launch(affinity, value, out, lse, lse, lse, 0.0, tiles, 32400)
    else:
        launch = descriptor_launch(affinity, value, out, lse, tiles, 32400)
    # a slice of the values is charged with its share of the affinity, which each slice computes anew
    return launch, 2 * tiles.block_m * tiles.block_n * (C * tiles.block_v // V + tiles.block_v)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--tiles", nargs=5, type=int, metavar="N", help="queries positions channels warps stages")
    parser.add_argument("--kind", choices=("portable", "descriptor"), default="portable", help="how --tiles are loaded")
    arguments = parser.parse_args()
    tiles = None
    if arguments.tiles:
        m, n, v, warps, stages = arguments.tiles
        tiles = ForwardTiles(m, n, v, warps, stages, arguments.kind)
    columns = "{:7}{:26}{:>10}{:>10}{:>12}{:>8}  {}"
    print(
        columns.format(
            "", "TFLOP/s", "together", "apart", "published", "error", "predicted cycles of an iteration, by unit"
        )
    )
    for architecture in arguments.architecture:
        cases: list[tuple[str, tuple[Launch, int], int]] = calibrations(architecture)
        for name, case, published in [*cases, ("read", read(architecture, tiles), 0)]:
            found = predict(case[0], architecture, case[1])
            together, apart = (f"{found.tflops(overlaps):.0f}" for overlaps in (True, False))
            error = f"{found.tflops(False) / published - 1:+.0%}" if published else ""
            cycles = ", ".join(f"{unit} {count:.0f}" for unit, count in found.cycles.items())
            cycles += f"; {found.programs} at once; bound by {found.bound}"
            print(columns.format(found.gpu.name, name, together, apart, published or "", error, cycles), flush=True)


if __name__ == "__main__":
    main()
