"""Compile the kernels with their default tiles for GPUs that are not here, and report the resources they need.

    python -m stm_kernels.gpu.aot [--architecture sm_90 …] [--json FILE]
    python -m stm_kernels.gpu.aot --check bench/results/aot.json [--anew]    # exit code 1 where a kernel differs
    python -m stm_kernels.gpu.aot --fill-cache [--architecture sm_90] [--dtype bfloat16] [--channels 128 512]

The last one compiles what the standard model's reads launch into Triton's cache, $TRITON_CACHE_DIR or ~/.triton/cache:
processes that share it, with the same versions, do not compile at their first read.

A check compiles the kernels whose source, constants or version of Triton have changed since the table was written, with
`--anew` all of them. Triton's cache keeps what is compiled, and beside it its machine code as text. Needs triton, no
GPU, and no TRITON_INTERPRET in the environment.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from stm_kernels.gpu.defaults import default_launches
from stm_kernels.gpu.fill import fill_cache
from stm_kernels.gpu.launch import Launch, target_of
from stm_kernels.gpu.machine_code import MATRIX_INSTRUCTIONS, main_loop

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# C and V: the standard model's, STCN's, the small model's and SAM 2's; all but the first in bfloat16 alone
STANDARD = (128, 512)
OTHERS = ((64, 512), (64, 128), (256, 256))
FORMS_OF_OTHERS = (
    "read", "read, bias and lengths", "read, l2", "read, skipping", "read, skipping, bias and lengths",
    "read, skipping, l2", "read, paged, l2", "read, descriptors", "read, descriptors, l2", "affinity and gradient",
    "the same, skipping", "usage", "usage, bias and lengths", "maxima", "chosen"
)  # fmt: skip
# float16 needs what bfloat16 does: it compiles to the same products
FORMS_OF_FLOAT16 = ("read", "affinity and gradient", "chosen")
SHARED_MEMORY_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64, "gfx1100": 64}
SPILL_INSTRUCTIONS = ("STL", "LDL", "scratch_store", "scratch_load")
OTHER_INSTRUCTIONS = ("FFMA", "MUFU.EX2", "LDGSTS", "LDSM", "UTMALDG", "BAR.SYNC")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# of resources and of machine code; branches are direct, so that nothing is gained by following the flow of data
DISASSEMBLERS = (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c", "-ndf"))


Case = tuple[str, str, int, int, str]
"""Form, dtype, C, V and architecture ("sm_90", "gfx942")."""


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
    source: str
    """Hash of all that it was compiled from, see `source_hash`."""

    @property
    def case(self) -> Case:
        """What tells it from the table's other rows."""
        return self.form, self.dtype, self.key_channels, self.value_channels, self.architecture

    @property
    def spills(self) -> int:
        """Instructions that move registers to and from the stack."""
        return sum(self.instructions.get(name, 0) for name in SPILL_INSTRUCTIONS)

    @property
    def tensor_cores(self) -> int:
        """Instructions that multiply matrices."""
        return sum(self.instructions.get(name, 0) for name in MATRIX_INSTRUCTIONS)


def source_of(launch: Launch, architecture: str) -> ASTSource:
    """What Triton compiles for a launch.

    Raises:
        RuntimeError: the process runs Triton's interpreter, which compiles nothing.
    """
    if not isinstance(launch.kernel, JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter compiles nothing, unset it")
    return ASTSource(launch.kernel, *_specialise(launch, architecture.startswith("gfx")))


def source_hash(launch: Launch, architecture: str) -> str:
    """Of a kernel's source with all that it calls, its constants, options and place, and Triton's version."""
    parts = (source_of(launch, architecture).hash(), launch.num_warps, launch.num_stages, architecture)
    return sha256(repr((*parts, triton.__version__)).encode()).hexdigest()[:16]


def machine_code(launch: Launch, architecture: str) -> tuple[str, int, int, float]:
    """Compile a launch: its machine code, registers and bytes of stack per thread, and KiB of shared memory.

    Raises:
        RuntimeError: the process runs Triton's interpreter, which compiles nothing.
    """
    on_amd = architecture.startswith("gfx")
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source_of(launch, architecture), target=target_of(architecture), options=options)
    if on_amd:
        code = compiled.asm["amdgcn"]
        registers, stack = (rf"\.{name}:\s+(\d+)" for name in ("vgpr_count", "private_segment_fixed_size"))
        usage = code
    else:
        registers, stack = r"REG:(\d+)", r"STACK:(\d+)"
        usage, code = (_disassemble(compiled, *tool) for tool in DISASSEMBLERS)
    return code, _number(registers, usage), _number(stack, usage), compiled.metadata.shared / 1024


def compile_launch(case: Case, launch: Launch) -> Resources:
    """Compile a launch and read its resources from the machine code."""
    form, dtype, key_channels, value_channels, architecture = case
    code, registers, stack, shared = machine_code(launch, architecture)
    loop = main_loop(code)
    return Resources(
        form=form,
        kernel=launch.kernel.__name__,
        dtype=dtype,
        key_channels=key_channels,
        value_channels=value_channels,
        architecture=architecture,
        warps=launch.num_warps,
        registers=registers,
        stack_bytes=stack,
        shared_kib=shared,
        shared_limit_kib=SHARED_MEMORY_KIB[architecture],
        instructions=_counts(code),
        loop=_counts("".join("\n " + line for line in loop)) | {"all": len(loop)},
        source=source_hash(launch, architecture),
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


def table_of(architectures: Sequence[str], recorded: Iterable[dict[str, Any]] = ()) -> list[Resources]:
    """Every default kernel for these architectures; compiled, one a core, unless its source is the recorded one."""
    names = {field.name for field in fields(Resources)}
    known = [Resources(**{name: row[name] for name in names}) for row in recorded if names <= row.keys()]
    sources = {(*row.case, row.source): row for row in known}
    cases = []
    for architecture in architectures:
        for dtype, channels in [*((dtype, STANDARD) for dtype in DTYPES), *((DTYPES[0], other) for other in OTHERS)]:
            # built before processes fork, which thus have them
            forms = default_launches(dtype, architecture, *channels)
            found = [form for form in forms if _is_in_table(form, dtype, channels, architecture)]
            cases += [(form, _name(dtype), *channels, architecture) for form in found]
    rows = [sources.get((*case, source_hash(_launch(case), case[-1]))) for case in cases]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(_compile, [case for case, row in zip(cases, rows) if row is None])
        return [row or next(compiled) for row in rows]


def _is_in_table(form: str, dtype: torch.dtype, channels: tuple[int, int], architecture: str) -> bool:
    if architecture == "gfx1100" and form.startswith("read") and _spills_on_rdna3(form, dtype, channels[0]):
        return False
    if dtype == torch.float16:
        return form in FORMS_OF_FLOAT16
    return channels == STANDARD or form in FORMS_OF_OTHERS


def _spills_on_rdna3(form: str, dtype: torch.dtype, C: int) -> bool:
    """Reads for which no tiles were found that do not spill."""
    return ("skipping" in form and dtype == torch.float32) or (C > 128 and ("bias" in form or "l2" in form))


def _launch(case: Case) -> Launch:
    form, dtype, *channels, architecture = case
    return default_launches(getattr(torch, dtype), architecture, *channels)[form]


def _compile(case: Case) -> Resources:
    return compile_launch(case, _launch(case))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", nargs="+", choices=ARCHITECTURES)
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with the table in this file")
    parser.add_argument("--anew", action="store_true", help="compile for the check what has not changed, too")
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
    try:
        recorded = json.loads(arguments.check.read_text()) if arguments.check else []
        recorded = [row for row in recorded if row["architecture"] in arguments.architecture]
    except OSError as error:
        parser.error(f"--check: {error.filename}: {error.strerror}")
    except (ValueError, LookupError, TypeError) as error:
        parser.error(f"--check: {arguments.check}: expected a table that --json wrote, got something else ({error})")
    table = table_of(arguments.architecture, () if arguments.anew else recorded)
    columns = "{:26}{:>4}{:>5}  {:10}{:8}{:>10}{:>9}{:>8}{:>12}  {}"
    print(columns.format("form", "C", "V", "dtype", "for", "registers", "stack B", "spills", "shared KiB", "MMA"))
    for row in table:
        sizes = (row.form, row.key_channels, row.value_channels, row.dtype, row.architecture)
        shared = f"{row.shared_kib:.0f}/{row.shared_limit_kib}"
        print(columns.format(*sizes, row.registers, row.stack_bytes, row.spills, shared, row.tensor_cores))
    rows = [as_row(row) for row in table]
    if arguments.json:
        partial = arguments.json.with_name(arguments.json.name + ".partial")
        partial.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        partial.replace(arguments.json)
    if arguments.check:
        found = differences(recorded, rows)
        print("\n".join(found) or f"{len(rows)} kernels are as in {arguments.check}")
        sys.exit(bool(found))


def as_row(kernel: Resources) -> dict[str, Any]:
    """A row of the table in a file."""
    return asdict(kernel) | {"spills": kernel.spills, "tensor_cores": kernel.tensor_cores}


def differences(recorded: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[str]:
    """A line for each kernel that differs between two tables, whatever it was compiled from."""
    names = ("architecture", "dtype", "key_channels", "value_channels", "form")
    before, now = ({" ".join(str(row[name]) for name in names): row for row in table} for table in (recorded, rows))
    lines = [f"{name}: only in the recorded table" for name in before.keys() - now.keys()]
    lines += [f"{name}: not in the recorded table" for name in now.keys() - before.keys()]
    for name in before.keys() & now.keys():
        changes = [
            f"{key} {before[name].get(key)} → {now[name][key]}"
            for key in now[name]
            if key != "source" and before[name].get(key) != now[name][key]
        ]
        lines += [f"{name}: {', '.join(changes)}"] if changes else []
    return sorted(lines)


if __name__ == "__main__":
    main()
