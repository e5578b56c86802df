"""Ideas for the forward read's main loop, judged by machine code: python bench/variants.py [--architecture sm_90]

Predicted TFLOP/s (`stm_kernels.gpu.model`) of the read as it is, with other tiles, and with

- threshold: the accumulator is rescaled only where a maximum grows by more than a factor of 2^8 (FlashAttention-4), an
  iteration that rescales and one that does not: the truth lies between;
- polynomial: every 2nd, 4th or 8th exponential by a polynomial on the FP32 units (FlashAttention-4);
- shared weights: the products of the next positions are computed before the softmax of these, with which Triton divides
  them among the warp-groups and passes the weights on through shared memory, instead of computing them in each.

The busiest unit is given, and that of all but the products, which "apart" adds to them; "L2" is what that rate asks of
the L2 cache, in TB/s. Needs triton, no GPU, and no TRITON_INTERPRET in the environment.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import triton
import triton.language as tl

# a checkout that nobody installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import table
from stm_kernels.gpu.aot import machine_code
from stm_kernels.gpu.forms import FORMS, STAGES
from stm_kernels.gpu.launch import Launch
from stm_kernels.gpu.machine_code import main_loop
from stm_kernels.gpu.model import GPUS, predict, unit_cycles
from stm_kernels.gpu.tiles import MIN_PRODUCT, biased, load_tile, store_read
from stm_kernels.gpu.tuning import ForwardTiles

SIZES = ((128, 512), (64, 128))
# adding it leaves no digits behind the point, and the whole number in the last bits
ROUNDING = tl.constexpr(1.5 * 2**23)


@dataclass(frozen=True)
class Variant:
    """What is not as in the read: constants of `variant_kernel`."""

    threshold: float = 0.0
    """Powers of 2 by which a maximum may grow before the accumulator is rescaled."""
    polynomial: int = 0
    """One exponential in so many is a polynomial: 2, 4, 8; 0 is none."""
    shared_weights: bool = False
    """Whether products are computed an iteration ahead."""


@triton.jit
def exp2_by_polynomial(x):
    """2^x for x ≤ 0, with a relative error below 1.1e-4: that of bfloat16 is 2e-3; 2^-126 for all below."""
    x = tl.maximum(x, -126.0)
    shifted = x + ROUNDING
    rest = x - (shifted - ROUNDING)
    power = 1.0 + rest * (0.69328 + rest * (0.24221 + rest * 0.05501))
    bits = power.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def tile_of(tensor, b, stride_b, first_row, row_count, stride_row, first_column, COLUMN_COUNT: tl.constexpr,
            ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    if TMA:
        return tl.reshape(tensor.load([b, first_row, first_column]), [ROWS, COLUMNS])
    else:
        ptr = tensor + b.to(tl.int64) * stride_b
        return load_tile(ptr, first_row, row_count, stride_row, first_column, COLUMN_COUNT, 1, ROWS, COLUMNS)


@triton.jit
def variant_kernel(
    query_key, memory_key, memory_value, out_ptr, lse_ptr,
    query_key_stride_b, query_key_stride_m, memory_key_stride_b, memory_key_stride_n,
    memory_value_stride_b, memory_value_stride_n,
    B, M, N, positions_per_split, scale: tl.float64, scale_log2, C: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr,
    TMA: tl.constexpr, THRESHOLD: tl.constexpr, POLYNOMIAL: tl.constexpr, SHARED_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """`descriptor_read_kernel` and `read_kernel` without pages, bias and `skip`."""
    slices_v = tl.cdiv(V, BLOCK_V)
    blocks_m = tl.cdiv(M, BLOCK_M)
    program = tl.program_id(0)
    first_v = program % slices_v * BLOCK_V
    first_m = program // slices_v % blocks_m * BLOCK_M
    b = program // slices_v // blocks_m
    start = tl.program_id(1) * positions_per_split
    stop = tl.minimum(start + positions_per_split, N)
    m, n = first_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    # a thread holds columns next to each other, rows 8 apart, and columns of both halves: what is chosen among them is
    # known when the kernel is compiled
    turn = n[None, :] % 2 + m[:, None] // 8 % 2 * 2 + n[None, :] // (BLOCK_N // 2) * 4

    # [M, C]
    query = tile_of(query_key, b, query_key_stride_b, first_m, M, query_key_stride_m, 0, C, BLOCK_M, BLOCK_C, TMA)
    # [M, V]
    total = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    row_max = tl.full([BLOCK_M], MIN_PRODUCT, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if SHARED_WEIGHTS:
        keys = tile_of(memory_key, b, memory_key_stride_b, start, N, memory_key_stride_n, 0, C, BLOCK_N, BLOCK_C, TMA)
        ahead = tl.dot(query, tl.trans(keys))
    for first_n in tl.range(start, stop, BLOCK_N):
        first = first_n + BLOCK_N if SHARED_WEIGHTS else first_n
        # [N, C]
        keys = tile_of(memory_key, b, memory_key_stride_b, first, N, memory_key_stride_n, 0, C, BLOCK_N, BLOCK_C, TMA)
        # [M, N]
        products = tl.dot(query, tl.trans(keys))
        if SHARED_WEIGHTS:
            products, ahead = ahead, products
        products, _ = biased(products, None, 0, first_n + n, stop)
        new_max = tl.maximum(row_max, tl.max(products, 1))
        if THRESHOLD == 0 or tl.max(new_max - row_max, 0) * scale_log2 > THRESHOLD:
            shrink = tl.exp2((row_max - new_max) * scale_log2)
            row_sum *= shrink
            total *= shrink[:, None]
            row_max = new_max
        exponents = (products - row_max[:, None]) * scale_log2
        weights = tl.exp2(exponents)
        if POLYNOMIAL > 0:
            weights = tl.where(turn % POLYNOMIAL == 0, exp2_by_polynomial(exponents), weights)
        row_sum += tl.sum(weights, 1)
        # [N, V]
        values = tile_of(memory_value, b, memory_value_stride_b, first_n, N, memory_value_stride_n, first_v, V,
                         BLOCK_N, BLOCK_V, TMA)  # fmt: skip
        total = tl.dot(weights.to(values.dtype), values, total)

    rows = (tl.program_id(1).to(tl.int64) * B + b) * M + m
    store_read(out_ptr, lse_ptr, total, row_max, row_sum, rows, m < M, first_v, V, scale, BLOCK_V)


def with_variant(launch: Launch, variant: Variant, C: int) -> Launch:
    """A launch of the read, of token-major inputs and nothing else, as one of `variant_kernel`."""
    given = launch.arguments
    constants = {name.upper(): value for name, value in asdict(variant).items()}
    arguments = {"C": C, "TMA": "query_keys" in given} | constants
    for name in ("query_key", "memory_key", "memory_value"):
        arguments[name] = given[f"{name}s"] if arguments["TMA"] else given[f"{name}_ptr"]
    for parameter in variant_kernel.arg_names:
        # strides are part of a descriptor
        arguments.setdefault(parameter, given.get(parameter, 1))
    return replace(launch, kernel=variant_kernel, arguments=arguments)


def cases(architecture: str, C: int, V: int) -> Iterator[tuple[str, ForwardTiles, Variant]]:
    """What is judged for an architecture: names, tiles and variants, of which one with no change is the read itself."""
    tiles, none = FORMS["read"].default(architecture, C, V), Variant()

    def shape(block_m: int, block_n: int, block_v: int) -> ForwardTiles:
        return replace(tiles, block_m=block_m, block_n=block_n, block_v=block_v, num_stages=STAGES)

    yield "the read", tiles, none
    if V == 512:
        yield "all channels at once", shape(64, 64, 512), none
        yield "128 queries, half of the channels", shape(128, 64, 256), none
    yield "128 positions", shape(tiles.block_m, 128, min(256, V)), none
    yield "threshold", tiles, Variant(threshold=8.0)
    for polynomial in (8, 4, 2):
        yield f"polynomial, 1 in {polynomial}", tiles, Variant(polynomial=polynomial)
    yield "threshold, polynomial, 1 in 4", tiles, Variant(threshold=8.0, polynomial=4)
    # elsewhere weights are shared already, or there is one warp-group to a query
    if architecture == "sm_90" and V == 512:
        yield "shared weights", shape(64, 64, 512), Variant(shared_weights=True)
        yield "shared weights, threshold", shape(64, 64, 512), Variant(threshold=8.0, shared_weights=True)


def judge(architecture: str, C: int, V: int) -> Iterator[list[str]]:
    """A row for each case; of one with a threshold a row for each kind of iteration."""
    for name, tiles, variant in cases(architecture, C, V):
        work = FORMS["read"].work(architecture, tiles, C, V)
        if variant != Variant():
            work = replace(work, launch=with_variant(work.launch, variant, C))
        code, registers, stack, _ = machine_code(work.launch, architecture)
        row = [GPUS[architecture].name, f"{C}, {V}", name, f"{tiles.block_m} x {tiles.block_n} x {tiles.block_v}"]
        resources = [str(registers), str(stack)]
        found = predict(work, architecture)
        if found is None:
            yield [*row, "", "", "", "", *resources]
            continue
        iterations = {"": found}
        if variant.threshold:
            rest = replace(found, cycles=unit_cycles(main_loop(code, jumps=True), found.gpu, tiles.num_warps))
            iterations = {", rescaling": found, ", not rescaling": rest}
        for which, one in iterations.items():
            apart, together = one.tflops(False), one.tflops(True)
            others = {unit: cycles for unit, cycles in one.cycles.items() if unit not in ("tensor", "shared memory")}
            units = f"{one.bound}; {max(others, key=others.__getitem__)}"
            asked = apart * work.read_bytes / work.operations
            rates = [f"{together:.0f}", f"{apart:.0f}", units, f"{asked:.1f}"]
            yield [*row[:2], name + which, row[3], *rates, *resources]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", nargs="+", choices=GPUS, default=list(GPUS))
    chosen = parser.parse_args(words).architecture
    header = [
        "GPU",
        "C, V",
        "idea",
        "tile",
        "together",
        "apart",
        "busiest; of others",
        "L2",
        "registers",
        "stack",
    ]
    print(table(header, (row for one in chosen for C, V in SIZES for row in judge(one, C, V))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
