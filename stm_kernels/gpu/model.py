"""Predict a kernel's speed from its machine code, on a GPU that is not here: python -m stm_kernels.gpu.model

    python -m stm_kernels.gpu.model [--architecture sm_80 sm_90] [--form usage] [--channels 128 512]
    python -m stm_kernels.gpu.model --tiles 128 64 256 8 3 [--kind descriptor] [--form "read, l2"]
    python -m stm_kernels.gpu.model --sweep FILE [--form "read, l2"] [--architecture sm_80] [--channels 128 512]

First kernels whose speed is published, then every form, by default or one with other tiles (the fields of its class
in `tuning`, in their order). Counts what one iteration of the main loop asks of each unit of a multiprocessor, and
divides by what the unit does in a cycle, as NVIDIA's white papers have it. The busiest multiprocessor's iterations are
the time, their products and other arithmetic at once ("together") or one after the other ("apart"), while data moves;
or what the L2 cache and the memory need. Starts and ends are free. No number is fitted: what "apart" misses of the
published speed is the error of the model. --sweep predicts a form with every choice of tiles and writes them as JSON,
best first, in minutes; a second time by what Triton's cache keeps. Needs triton, no GPU, and no TRITON_INTERPRET in the
environment.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from stm_kernels.gpu.aot import machine_code
from stm_kernels.gpu.forms import FORMS, Work
from stm_kernels.gpu.launch import Launch
from stm_kernels.gpu.machine_code import main_loop
from stm_kernels.gpu.tuning import ForwardTiles


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
    gigabytes: int
    """From memory, a second."""


# A100 SXM 40 GB and H100 SXM: 312 and 989 TFLOP/s in 16 bits
GPUS = {"sm_80": GPU("A100", 108, 1.41, 2048, 64, 164, 1555), "sm_90": GPU("H100", 132, 1.83, 4096, 128, 228, 3350)}
# bytes from the L2 cache of an A100, a cycle; of an H100's nothing is published
L2 = 5120
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
    beyond: dict[str, float]
    """Likewise of the L2 cache and the memory, which all multiprocessors share: their share of these."""
    at_once: int
    """Programs that a multiprocessor holds."""
    work: Work
    gpu: GPU

    def tflops(self, overlaps: bool) -> float:
        """The useful rate, products and other arithmetic at the same time or one after the other; data moves
        meanwhile.
        """
        moves, tensor = self.cycles["shared memory"], self.cycles["tensor"]
        others = max(cycles for unit, cycles in self.cycles.items() if unit not in ("tensor", "shared memory"))
        busy = -(-self.work.programs // self.gpu.multiprocessors) * self.gpu.multiprocessors / self.work.programs
        computes = max(tensor, others) if overlaps else tensor + others
        cycles = max(busy * computes, busy * moves, *self.beyond.values())
        return self.work.operations / cycles * self.gpu.multiprocessors * self.gpu.gigahertz / 1e3

    @property
    def bound(self) -> str:
        """The unit that is busy longest."""
        cycles = self.cycles | self.beyond
        return max(cycles, key=cycles.__getitem__)


def predict(work: Work, architecture: str) -> Prediction | None:
    """Compile a launch and predict its main loop; None if it spills registers or does not fit a multiprocessor."""
    gpu, launch, warps = GPUS[architecture], work.launch, work.launch.num_warps
    code, registers, stack, shared = machine_code(launch, architecture)
    cycles = unit_cycles(main_loop(code), gpu, warps)
    held = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    # a program takes 1 KiB of shared memory for itself
    at_once = min(held, int(gpu.shared_kib // (shared + 1)), WARPS // warps)
    if stack or not at_once:
        return None
    beyond = {"L2": work.read_bytes * gpu.multiprocessors / L2}
    seconds = work.moved_bytes / gpu.gigabytes / 1e9 / (work.programs * work.iterations)
    beyond["memory"] = seconds * gpu.gigahertz * 1e9 * gpu.multiprocessors
    return Prediction(cycles, beyond, at_once, work, gpu)


def unit_cycles(loop: Sequence[str], gpu: GPU, warps: int) -> dict[str, float]:
    """Cycles that the instructions of a loop keep each unit of a multiprocessor busy, by unit."""
    cycles = {"tensor": sum(_tensor_cycles(line, gpu) for line in loop) * warps}
    lanes = {"FP32": (FP32_NAMES, gpu.fp32), "integer": (ALU_NAMES, ALU), "exponential": (("MUFU",), MUFU)}
    for unit, (names, width) in lanes.items():
        cycles[unit] = sum(line.startswith(names) for line in loop) * warps * 32 / width
    cycles["shared memory"] = sum(map(_shared_bytes, loop)) * warps / SHARED
    cycles["issue"] = len(loop) * warps / ISSUED
    return cycles


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


def attention(channels: int, block_m: int, block_n: int, warps: int, stages: int) -> Work:
    tensor = torch.empty(4, 32, 16384, channels, dtype=torch.float16, device="meta")
    arguments: dict[str, Any] = dict.fromkeys(("query_ptr", "key_ptr", "value_ptr", "out_ptr"), tensor)
    arguments |= {"positions": 16384, "scale_log2": 0.1, "CHANNELS": channels, "BLOCK_M": block_m, "BLOCK_N": block_n}
    launch = Launch(attention_kernel, (1,), arguments, warps, stages)
    programs, iterations = 4 * 32 * 16384 // block_m, 16384 // block_n
    return Work(
        launch, 4 * block_m * block_n * channels, 4 * block_n * channels, programs, iterations, 4 * tensor.nbytes
    )


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, columns, inner,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """A product of matrices `[rows, inner]` and `[inner, columns]`, contiguous and without edges."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, inner, BLOCK_K):
        a = tl.load(a_ptr + m[:, None] * inner + (first + k)[None, :])
        b = tl.load(b_ptr + (first + k)[:, None] * columns + n[None, :])
        total = tl.dot(a, b, total)
    tl.store(out_ptr + m[:, None] * columns + n[None, :], total.to(tl.float16))


def product(side: int, block_m: int, block_n: int, block_k: int, warps: int, stages: int) -> Work:
    tensor = torch.empty(side, side, dtype=torch.float16, device="meta")
    arguments: dict[str, Any] = dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), tensor)
    arguments |= {"columns": side, "inner": side, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    launch = Launch(product_kernel, (1,), arguments, warps, stages)
    programs = triton.cdiv(side, block_m) * triton.cdiv(side, block_n)
    operations, read_bytes = 2 * block_m * block_n * block_k, 2 * block_k * (block_m + block_n)
    return Work(launch, operations, read_bytes, programs, side // block_k, 3 * tensor.nbytes)


def calibrations(architecture: str) -> list[tuple[str, Work, int]]:
    """Kernels by name, and the published TFLOP/s of their like.

    Triton's fused attention, not causal, 16 384 positions: triton-lang.org, "Fused Attention" (the page names no GPU:
    an A100 by its speed); on an H100 the figures of FlashAttention-3 (Shah et al. 2024), 2024's Triton, and a run of
    PyTorch's benchmark (github.com/pytorch/benchmark/pull/2391). Triton's product of matrices: users' runs of its
    tutorial, github.com/triton-lang/triton/issues/3551 (A100), 3672 (H100).
    """
    if architecture == "sm_80":
        return [
            ("product, 2944", product(2944, 128, 256, 64, 8, 3), 252),
            ("attention, 64 channels", attention(64, 128, 64, 4, 3), 167),
        ]
    return [
        ("product, 3072", product(3072, 128, 256, 64, 8, 3), 525),
        ("attention, 64 channels", attention(64, 128, 64, 4, 3), 403),
        ("attention, 128 channels", attention(128, 128, 128, 8, 2), 395),
        ("the same, PyTorch's run", attention(128, 128, 128, 8, 2), 477),
    ]


def rates(case: tuple[str, str, int, int, Any]) -> dict[str, Any] | None:
    """Predict a form for an architecture with these tiles; None where `predict` has none."""
    form, architecture, C, V, tiles = case
    prediction = predict(FORMS[form].work(architecture, tiles, C, V), architecture)
    if prediction is None:
        return None
    found = {"apart": prediction.tflops(False), "together": prediction.tflops(True), "bound": prediction.bound}
    return asdict(tiles) | found | {"default": tiles == FORMS[form].default(architecture, C, V)}


def sweep(form: str, architectures: Sequence[str], file: Path, C: int, V: int) -> None:
    """Predict a form with every choice of tiles, and write what fits, the best by "apart" first."""
    report: dict[str, Any] = {"all of it is": "predicted", "form": form, "C": C, "V": V}
    for architecture in architectures:
        default = FORMS[form].default(architecture, C, V)
        tiles = dict.fromkeys([default, *FORMS[form].choices(architecture, C, V)])
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            found = []
            for index, rate in enumerate(pool.map(rates, [(form, architecture, C, V, one) for one in tiles])):
                print(f"{form}, {architecture}: {index + 1} of {len(tiles)} kernels", file=sys.stderr, flush=True)
                found += [rate] if rate else []
        report[architecture] = sorted(found, key=lambda one: -one["apart"])
        partial = file.with_name(f"{file.name}.partial")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        partial.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--form", choices=FORMS, help="only this one; of a sweep, by default the read")
    parser.add_argument("--tiles", nargs="+", type=int, metavar="N", help="of the form, by default of the read")
    parser.add_argument(
        "--kind", choices=("portable", "descriptor"), default="portable", help="how a read's --tiles load"
    )
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="predict all tiles, into this file")
    parser.add_argument("--channels", nargs=2, type=int, metavar=("C", "V"), default=(128, 512))
    arguments = parser.parse_args()
    C, V = arguments.channels
    if arguments.sweep:
        return sweep(arguments.form or "read", arguments.architecture, arguments.sweep, C, V)
    columns = "{:7}{:26}{:>10}{:>10}{:>12}{:>8}  {}"
    print(columns.format("", "TFLOP/s", "together", "apart", "published", "error", "predicted cycles of an iteration"))
    for architecture in arguments.architecture:
        works = [] if arguments.form else calibrations(architecture)
        forms = ["read"] if arguments.tiles else list(FORMS)
        for name in [arguments.form] if arguments.form else forms:
            tiles = FORMS[name].default(architecture, C, V)
            if arguments.tiles:
                kind = {"kind": arguments.kind} if isinstance(tiles, ForwardTiles) else {}
                try:
                    tiles = type(tiles)(*arguments.tiles, **kind)
                except TypeError:
                    names = ", ".join(field.name for field in fields(tiles) if field.name != "kind")
                    parser.error(f"--tiles: expected {names}, got {len(arguments.tiles)} numbers")
            works.append((name, FORMS[name].work(architecture, tiles, C, V), 0))
        for name, work, published in works:
            found = predict(work, architecture)
            if not found:
                print(columns.format(GPUS[architecture].name, name, "", "", "", "", "spills, or does not fit"))
                continue
            together, apart = (f"{found.tflops(overlaps):.0f}" for overlaps in (True, False))
            error = f"{found.tflops(False) / published - 1:+.0%}" if published else ""
            cycles = ", ".join(f"{unit} {count:.0f}" for unit, count in (found.cycles | found.beyond).items())
            cycles += f"; {found.at_once} at once; bound by {found.bound}"
            print(columns.format(found.gpu.name, name, together, apart, published or "", error, cycles), flush=True)


if __name__ == "__main__":
    main()
