"""Compile the kernels with their default tiles for GPUs that are not here, and report the resources they need.

    python -m stm_kernels.gpu.aot [--architecture sm_90 …] [--json FILE]
    python -m stm_kernels.gpu.aot --check bench/results/aot.json    # exit code 1 where a kernel differs
    python -m stm_kernels.gpu.aot --fill-cache [--architecture sm_90] [--dtype bfloat16] [--channels 128 512]

The last one compiles what the standard model's reads launch into Triton's cache, $TRITON_CACHE_DIR or ~/.triton/cache:
processes that share it, with the same versions, do not compile at their first read.

Triton's cache keeps what is compiled, by its source, and beside it its machine code as text: a second run compiles and
disassembles what has changed. Needs triton, no GPU, and no TRITON_INTERPRET in the environment.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from stm_kernels.affinity import SKIP_POSITIONS, SKIP_QUERIES, Affinity
from stm_kernels.gpu.affinity import affinity_launch
from stm_kernels.gpu.fill import fill_cache
from stm_kernels.gpu.forward import PageTable, forward_launch
from stm_kernels.gpu.launch import Launch
from stm_kernels.gpu.machine_code import MATRIX_INSTRUCTIONS, main_loop
from stm_kernels.gpu.merge import merge_launch
from stm_kernels.gpu.tma import descriptor_launch
from stm_kernels.gpu.top_k import GROUP, group_max_launch, group_products_launch, select_launch
from stm_kernels.gpu.tuning import MAX_GROUPS, affinity_tiles, forward_tiles, group_tiles, usage_tiles
from stm_kernels.gpu.usage import usage_launch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# C and V: the standard model's, STCN's, the small model's and SAM 2's; all but the first in bfloat16 alone
STANDARD = (128, 512)
OTHERS = ((64, 512), (64, 128), (256, 256))
FORMS_OF_OTHERS = (
    "read", "read, bias and lengths", "read, l2", "read, skipping", "read, skipping, bias and lengths",
    "read, skipping, l2", "read, descriptors", "read, descriptors, l2", "affinity and gradient", "the same, skipping",
    "usage", "usage, bias and lengths", "maxima", "chosen"
)  # fmt: skip
# float16 needs what bfloat16 does: it compiles to the same products
FORMS_OF_FLOAT16 = ("read", "affinity and gradient", "chosen")
SHARED_MEMORY_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
SPILL_INSTRUCTIONS = ("STL", "LDL", "scratch_store", "scratch_load")
OTHER_INSTRUCTIONS = ("FFMA", "MUFU.EX2", "LDGSTS", "LDSM", "UTMALDG", "BAR.SYNC")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# of resources and of machine code; branches are direct, so that nothing is gained by following the flow of data
DISASSEMBLERS = (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c", "-ndf"))


@dataclass(frozen=True)
class Resources:
    """The resources of a compiled kernel."""

    form: str
    """What the kernel is compiled to do."""
    kernel: str
    """Name of the kernel."""
    dtype: str
    """Of the inputs."""
    key_channels: int
    """C"""
    value_channels: int
    """V"""
    architecture: str
    """What it was compiled for."""
    warps: int
    """Per program."""
    registers: int
    """Per thread."""
    stack_bytes: int
    """Per thread; where registers spill to."""
    shared_kib: float
    """Per program."""
    shared_limit_kib: int
    """The architecture's limit for a program."""
    instructions: dict[str, int]
    """Matrix, load and spill instructions in the machine code, by name."""
    loop: dict[str, int]
    """Those of the main loop, and all of it as "all"."""

    @property
    def spills(self) -> int:
        """Instructions that move registers to and from the stack."""
        return sum(self.instructions.get(name, 0) for name in SPILL_INSTRUCTIONS)

    @property
    def tensor_cores(self) -> int:
        """Instructions that multiply matrices."""
        return sum(self.instructions.get(name, 0) for name in MATRIX_INSTRUCTIONS)


@cache
def default_launches(
    dtype: torch.dtype, architecture: str, C: int = 128, V: int = 512, B: int = 2, M: int = 1620, N: int = 32400
) -> dict[str, Launch]:
    """Every kernel in its forms, with its default tiles, for token-major inputs on the meta device."""

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    affinity = Affinity(empty(B, M, C), empty(B, N, C), C**-0.5)
    value, out = empty(B, N, V), empty(B, M, V)
    lse, delta, nothing = empty(B, M, of=torch.float64), empty(B, M, of=torch.float32), empty(B, 0, of=torch.uint8)
    # every argument that a kernel may go without
    full = replace(affinity, key_bias=empty(B, N, of=torch.float32), lengths=empty(B, of=torch.int32))
    kept = empty(B, M // SKIP_QUERIES + 1, N // SKIP_POSITIONS + 1, of=torch.uint8)
    partial = empty(8, B, M, V, of=torch.float32), empty(8, B, M, of=torch.float64)
    # as of squared distances
    plain_bias = replace(full, lengths=None, may_hide=False)
    (tiles, skip_tiles), (l2_tiles, l2_skip_tiles), (bias_tiles, full_skip_tiles) = (
        [
            forward_tiles(architecture, dtype, C, V, skips=skips, biased=biased, may_hide=may_hide)
            for skips in (False, True)
        ]
        for biased, may_hide in ((False, False), (True, False), (True, True))
    )
    engine_tiles = forward_tiles(architecture, dtype, C, V, descriptors=True)
    written, written_skipping = (affinity_tiles(architecture, dtype, C, skips=skips) for skips in (False, True))
    gradient = (value, out, delta, empty(B, M, N))
    table = empty(N // 1280, of=torch.int64)
    pages = PageTable(table, table, 1280, N)
    launches = {
        "read": forward_launch(affinity, value, out[None], lse[None], delta[None], nothing, 0.0, tiles, N),
        "read, split": forward_launch(affinity, value, *partial, empty(8, B, M), nothing, 0.0, tiles, N // 8),
        "read, bias and lengths": forward_launch(
            full, value, out[None], lse[None], delta[None], nothing, 0.0, bias_tiles, N
        ),
        "read, l2": forward_launch(plain_bias, value, out[None], lse[None], delta[None], nothing, 0.0, l2_tiles, N),
        "read, skipping, l2": forward_launch(
            plain_bias, value, out[None], lse[None], delta[None], kept, 1e-3, l2_skip_tiles, N
        ),
        "read, skipping": forward_launch(affinity, value, out[None], lse[None], delta[None], kept, 1e-3, skip_tiles, N),
        "read, skipping, bias and lengths": forward_launch(
            full, value, out[None], lse[None], delta[None], kept, 1e-3, full_skip_tiles, N
        ),
        "read, paged": forward_launch(
            affinity, value, out[None], lse[None], delta[None], nothing, 0.0, tiles, N, pages
        ),
        "read, paged, l2": forward_launch(
            plain_bias, value, out[None], lse[None], delta[None], nothing, 0.0, l2_tiles, N, pages
        ),
        "merge": merge_launch(*partial, out, lse, architecture),
        "affinity": affinity_launch(affinity, lse, empty(B, M, N), written),
        "affinity and gradient": affinity_launch(affinity, lse, empty(B, M, N), written, gradient),
        "the same, skipping": affinity_launch(full, lse, empty(B, M, N), written_skipping, gradient, kept),
        "usage": usage_launch(affinity, lse, delta, usage_tiles(architecture, dtype, C)),
        "usage, bias and lengths": usage_launch(full, lse, delta, usage_tiles(architecture, dtype, C)),
    }
    if engine_tiles.kind != "portable":
        specialized = replace(engine_tiles, kind="warp-specialized", num_warps=4, num_stages=2)
        launches |= {
            "read, descriptors": descriptor_launch(affinity, value, out[None], lse[None], engine_tiles, N),
            "read, descriptors, l2": descriptor_launch(plain_bias, value, out[None], lse[None], engine_tiles, N),
            "read, descriptors, split": descriptor_launch(affinity, value, *partial, engine_tiles, N // 8),
            "read, warp-specialized": descriptor_launch(affinity, value, out[None], lse[None], specialized, N),
        }
    return launches | _top_k_launches(affinity, full, architecture)


def _top_k_launches(affinity: Affinity, full: Affinity, architecture: str, k: int = 30) -> dict[str, Launch]:
    """The kernels that choose the `k` best positions; `full` has all that an affinity may go without."""
    (B, M, N), query_key = affinity.sizes, affinity.query_key
    tiles = group_tiles(architecture, query_key.dtype, query_key.shape[2])

    def empty(columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(B * M, columns, dtype=dtype, device="meta")

    maxima, best, chosen = empty(N // GROUP), empty(k), empty(k, torch.int32)
    products, positions = empty(k + k * GROUP), empty(k + k * GROUP, torch.int32)
    gathered = (products[:, k:], positions[:, k:], tiles)
    return {
        "maxima": group_max_launch(affinity, maxima, tiles),
        "maxima, bias and lengths": group_max_launch(full, maxima, tiles),
        "chosen": group_products_launch(affinity, chosen, best, None, 0, *gathered),
        "chosen, bias and lengths": group_products_launch(full, chosen, best, empty(1), 0, *gathered),
        "selection": select_launch(products, positions, best, chosen, architecture),
        "selection, a whole tile": select_launch(empty(MAX_GROUPS), None, best, chosen, architecture),
        "selection, long rows": select_launch(empty(2 * MAX_GROUPS), None, best, chosen, architecture),
    }


def machine_code(launch: Launch, architecture: str) -> tuple[str, int, int, float]:
    """Compile a launch: its machine code, registers and bytes of stack per thread, and KiB of shared memory.

    Raises:
        RuntimeError: the process runs Triton's interpreter, which compiles nothing.
    """
    if not isinstance(launch.kernel, JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter compiles nothing, unset it")
    on_amd = architecture.startswith("gfx")
    target = (
        GPUTarget("hip", architecture, 64) if on_amd else GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    )
    compiled = triton.compile(
        ASTSource(launch.kernel, *_specialise(launch, on_amd)),
        target=target,
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    if on_amd:
        code = compiled.asm["amdgcn"]
        registers, stack = (rf"\.{name}:\s+(\d+)" for name in ("vgpr_count", "private_segment_fixed_size"))
        usage = code
    else:
        registers, stack = r"REG:(\d+)", r"STACK:(\d+)"
        usage, code = (_disassemble(compiled, *tool) for tool in DISASSEMBLERS)
    return code, _number(registers, usage), _number(stack, usage), compiled.metadata.shared / 1024


def compile_launch(
    form: str, dtype: torch.dtype, channels: tuple[int, int], launch: Launch, architecture: str
) -> Resources:
    """Compile a launch for an architecture ("sm_90", "gfx942") and read its resources from the machine code."""
    code, registers, stack, shared = machine_code(launch, architecture)
    loop = main_loop(code)
    return Resources(
        form=form,
        kernel=launch.kernel.__name__,
        dtype=_name(dtype),
        key_channels=channels[0],
        value_channels=channels[1],
        architecture=architecture,
        warps=launch.num_warps,
        registers=registers,
        stack_bytes=stack,
        shared_kib=shared,
        shared_limit_kib=SHARED_MEMORY_KIB[architecture],
        instructions=_counts(code),
        loop=_counts("".join("\n " + line for line in loop)) | {"all": len(loop)},
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _counts(code: str) -> dict[str, int]:
    names = (*MATRIX_INSTRUCTIONS, *SPILL_INSTRUCTIONS, *OTHER_INSTRUCTIONS)
    # AMD's instructions have their shape after an underscore
    counts = {name: len(re.findall(rf"\s{re.escape(name)}(?:\b|_)", code)) for name in names}
    return {name: count for name, count in counts.items() if count}


def _number(pattern: str, text: str) -> int:
    (number,) = re.findall(pattern, text)[:1]
    return int(number)


def _disassemble(compiled: CompiledKernel, tool: str, *options: str) -> str:
    """What a tool prints of a kernel compiled for an NVIDIA GPU; kept beside it in Triton's cache."""
    kept = get_cache_manager(compiled.hash)
    name = " ".join((tool, *options))
    if (path := kept.get_file(name)) is None:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            command = [str(TOOLS / tool), *options, file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        path = kept.put(text, name, binary=False)
    return Path(path).read_text()


def _specialise(launch: Launch, on_amd: bool) -> tuple[dict[str, str], dict[str, object], dict[tuple[int], list]]:
    """Signature, constants and hints, as Triton derives them from arguments at a launch."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
            if on_amd and value.untyped_storage().size() < 2**31:
                attributes[(index,)] += [["tt.pointer_range", 32]]
        elif isinstance(value, int):
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = parameter.annotation_type or "fp32"
    return signature, constants, attributes


_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
_TYPES |= {torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64"}


def table_of(architectures: Sequence[str]) -> list[Resources]:
    """Compile every default kernel for these architectures, one a core at a time."""
    cases = []
    for architecture in architectures:
        for dtype, channels in [*((dtype, STANDARD) for dtype in DTYPES), *((DTYPES[0], other) for other in OTHERS)]:
            # built before processes fork, which thus have them
            forms = default_launches(dtype, architecture, *channels)
            cases += [(form, dtype, channels, architecture) for form in forms if _is_in_table(form, dtype, channels)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_compile, cases))


def _is_in_table(form: str, dtype: torch.dtype, channels: tuple[int, int]) -> bool:
    if dtype == torch.float16:
        return form in FORMS_OF_FLOAT16
    return channels == STANDARD or form in FORMS_OF_OTHERS


def _compile(case: tuple[str, torch.dtype, tuple[int, int], str]) -> Resources:
    form, dtype, channels, architecture = case
    launch = default_launches(dtype, architecture, *channels)[form]
    return compile_launch(form, dtype, channels, launch, architecture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", nargs="+", choices=ARCHITECTURES)
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with the table in this file")
    parser.add_argument("--fill-cache", action="store_true", help="compile for launches; default: for sm_90")
    parser.add_argument("--dtype", choices=[_name(dtype) for dtype in DTYPES], default="bfloat16", help="to fill for")
    parser.add_argument("--channels", nargs=2, type=int, metavar=("C", "V"), default=STANDARD, help="to fill for")
    arguments = parser.parse_args()
    if arguments.fill_cache:
        for architecture in arguments.architecture or ("sm_90",):
            count = fill_cache(architecture, getattr(torch, arguments.dtype), *arguments.channels)
            print(f"{architecture}: {count} kernels in {knobs.cache.dir}")
        return
    arguments.architecture = arguments.architecture or ARCHITECTURES
    table = table_of(arguments.architecture)
    columns = "{:26}{:>4}{:>5}  {:10}{:8}{:>10}{:>9}{:>8}{:>12}  {}"
    print(columns.format("form", "C", "V", "dtype", "for", "registers", "stack B", "spills", "shared KiB", "MMA"))
    for row in table:
        sizes = (row.form, row.key_channels, row.value_channels, row.dtype, row.architecture)
        shared = f"{row.shared_kib:.0f}/{row.shared_limit_kib}"
        print(columns.format(*sizes, row.registers, row.stack_bytes, row.spills, shared, row.tensor_cores))
    rows = [asdict(row) | {"spills": row.spills, "tensor_cores": row.tensor_cores} for row in table]
    if arguments.json:
        arguments.json.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    if arguments.check:
        recorded = [
            row for row in json.loads(arguments.check.read_text()) if row["architecture"] in arguments.architecture
        ]
        found = differences(recorded, rows)
        print("\n".join(found) or f"{len(rows)} kernels are as in {arguments.check}")
        sys.exit(bool(found))


def differences(recorded: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[str]:
    """A line for each kernel that differs between two tables."""
    names = ("architecture", "dtype", "key_channels", "value_channels", "form")
    before, now = ({" ".join(str(row[name]) for name in names): row for row in table} for table in (recorded, rows))
    lines = [f"{name}: only in the recorded table" for name in before.keys() - now.keys()]
    lines += [f"{name}: not in the recorded table" for name in now.keys() - before.keys()]
    for name in before.keys() & now.keys():
        changes = [
            f"{key} {before[name].get(key)} → {now[name][key]}"
            for key in now[name]
            if before[name].get(key) != now[name][key]
        ]
        lines += [f"{name}: {', '.join(changes)}"] if changes else []
    return sorted(lines)


if __name__ == "__main__":
    main()
