"""What training takes, by the fused read and the naive one: python bench/training.py [--out FILE]

Naive keeps the whole affinity for the backward pass (`implementation="reference"`). What the read alone adds to its
inputs, output and gradients; what a step of one clip takes, activations kept and recomputed. Every figure comes from a
process of its own: on a CPU its peak beyond weights and input, and seconds of the processor; on a GPU
max_memory_allocated.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

# a checkout that nobody installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import MIB, Peak, apart, at_least, clock, describe, options, table, write_json
from stm_kernels import space_time_memory_read
from stm_model import STM, STMConfig
from stm_model.data.clips import Clip
from stm_model.runtime import default_dtype
from stm_model.training.loss import clip_loss
from stm_model.training.state import initialize

VERSIONS = {"naive": "reference", "fused": "auto"}
GRID = (30, 54)
"""Positions of a frame of 480×854 pixels."""


@dataclass(frozen=True)
class Case:
    """`read`: of so many frames, alone and in the released shape; `step`: on one clip with one object."""

    what: str
    version: str
    frames: int
    crop: int = 384
    """Height and width of the clip in pixels."""
    recompute: bool = False


def measure(case: Case, device: str) -> dict[str, Any]:
    """Peak MiB beyond weights and input, and seconds, of one forward and backward; in this process."""
    prepare = read_once if case.what == "read" else step_once
    # libraries load their code at the first call; a small one, for a process keeps what it has freed
    prepare(replace(case, frames=1 if case.what == "read" else 2, crop=32), device)[0]()
    run, inherent = prepare(case, device)
    peak = Peak(device)
    before, started = peak.reset(), clock(device)
    run()
    seconds = clock(device) - started
    return {"mib": (peak.read() - before - inherent) / MIB, "seconds": seconds}


def read_once(case: Case, device: str) -> tuple[Callable[[], object], int]:
    """The read of a memory of `frames` frames, and the bytes of its output and of all gradients."""
    random = torch.Generator().manual_seed(0)
    shapes = ((1, 128), (1, 128, case.frames), (1, 512, case.frames), (1, 512))
    *inputs, grad = (torch.randn(*shape, *GRID, generator=random).to(device) for shape in shapes)
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def run() -> None:
        space_time_memory_read(*inputs, implementation=VERSIONS[case.version]).backward(grad)

    return run, sum(tensor.nbytes for tensor in (*inputs, grad))


def step_once(case: Case, device: str) -> tuple[Callable[[], object], int]:
    """Loss and gradients of one clip; nothing of it is taken for granted."""
    torch.manual_seed(0)
    model = STM(STMConfig.small())
    initialize(model)
    model = model.to(device, memory_format=torch.channels_last).eval()
    labels = torch.zeros(case.frames, case.crop, case.crop, dtype=torch.uint8, device=device)
    labels[:, case.crop // 4 : case.crop // 2, case.crop // 4 : case.crop // 2] = 1
    clip = Clip(torch.rand(case.frames, 3, case.crop, case.crop, device=device), labels)
    dtype = default_dtype(device)
    autocast = torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)

    def run() -> None:
        with autocast:
            loss = clip_loss(model, [clip], implementation=VERSIONS[case.version], recompute=case.recompute)
        loss.backward()

    return run, 0


def measured(case: Case, device: str) -> dict[str, Any]:
    """`measure` in a process of its own."""
    found = apart(partial(measure, case, device))
    if "mib" not in found:
        raise SystemExit(f"training: {case}: {found.get('failed') or found.get('skipped')}")
    return asdict(case) | found


def main(words: Sequence[str] | None = None) -> int:
    parser = options(__doc__, threads=1)
    parser.add_argument("--lengths", type=at_least(2), nargs="+", default=[2, 4, 8, 16, 32], help="frames")
    parser.add_argument("--crop", type=at_least(32), default=384)
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    report = describe(arguments.device) | {"rows": []}
    for what, recompute in (("read", False), ("step", False), ("step", True)):
        for frames, version in itertools.product(arguments.lengths, VERSIONS):
            case = Case(what, version, frames, arguments.crop, recompute)
            report["rows"].append(measured(case, arguments.device))
            write_json(report, arguments.out)
    columns = ("what", "recompute", "frames", "version", "mib", "seconds")
    print(table(columns, [[row[column] for column in columns] for row in report["rows"]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
