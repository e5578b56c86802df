"""Memory and time of training over clip length: python bench/train_memory.py [--out FILE]

The fused read against the naive one (`implementation="reference"`, which keeps the whole affinity for the backward
pass), forward and backward. Three questions: what the read alone adds to its inputs, output and gradients; what a
training step of one clip takes, with activations kept and recomputed; the longest clip and the largest crop whose step
fits in a given memory, each found by running it. Every figure comes from a fresh process. Memory is the process's peak
on a CPU, max_memory_allocated on a GPU; time is the processor's on a CPU, which other programs don't lengthen.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from machine import Peak
from torch import Tensor
from track import device_name

from stm_kernels import space_time_memory_read
from stm_model import STM, STMConfig
from stm_model.data.clips import Clip
from stm_model.network import STRIDE
from stm_model.runtime import default_dtype
from stm_model.training.loss import clip_loss
from stm_model.training.state import initialize

MIB = 2**20
VERSIONS = {"naive": "reference", "fused": "auto"}


@dataclass(frozen=True)
class Case:
    """One measurement."""

    what: str
    """`read`: the read alone, with the released shape at 480×854; `step`: a step on one clip with one object."""
    version: str
    """`naive` or `fused`."""
    frames: int
    """Memory frames of the read, or frames of the clip."""
    crop: int = 384
    """Height and width of the clip in pixels."""
    recompute: bool = False
    """Whether activations are recomputed."""
    network: str = "small"
    """`small` or `released`."""


def measure(case: Case, device: str) -> dict[str, float]:
    """Peak MiB beyond weights and input, and seconds, of one forward and backward; in this process."""
    prepare = read_once if case.what == "read" else step_once
    # libraries load their code at the first call; a small one, for a process keeps what it has freed
    prepare(dataclasses.replace(case, frames=1 if case.what == "read" else 2, crop=32), device)[0]()
    run, inherent = prepare(case, device)
    peak = Peak(device)
    before = peak.reset()
    clock = time.perf_counter if peak.on_gpu else time.process_time
    started = clock()
    run()
    most = peak.read()
    return {"mib": (most - before - inherent) / MIB, "seconds": clock() - started}


def read_once(case: Case, device: str) -> tuple[Callable[[], object], int]:
    """The read of a memory of `frames` frames, and the bytes of its output and of all gradients."""
    random = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device)

    query_key = tensor(1, 128, 30, 54).requires_grad_()
    memory_key = tensor(1, 128, case.frames, 30, 54).requires_grad_()
    memory_value = tensor(1, 512, case.frames, 30, 54).requires_grad_()
    grad = tensor(1, 512, 30, 54)

    def run() -> None:
        out = space_time_memory_read(query_key, memory_key, memory_value, implementation=VERSIONS[case.version])
        out.backward(grad)

    return run, sum(x.nbytes for x in (query_key, memory_key, memory_value, grad))


def step_once(case: Case, device: str) -> tuple[Callable[[], object], int]:
    """Loss and gradients of one clip; nothing of it is taken for granted."""
    torch.manual_seed(0)
    model = STM(STMConfig.small() if case.network == "small" else STMConfig())
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


def in_fresh_process(case: Case, arguments: argparse.Namespace) -> dict[str, float]:
    """`measure` in a child; a GPU that has no room is no failure but infinitely many MiB."""
    command = [sys.executable, __file__, "--device", arguments.device, "--threads", str(arguments.threads)]
    command += ["--case", json.dumps(dataclasses.asdict(case))]
    finished = subprocess.run(command, capture_output=True, text=True)
    if "OutOfMemoryError" in finished.stderr:
        return {"mib": float("inf"), "seconds": float("nan")}
    if finished.returncode:
        raise SystemExit(f"{case} failed: {finished.stderr}")
    result = json.loads(finished.stdout)
    print(f"  {case}: {result['mib']:.0f} MiB, {result['seconds']:.2f} s", file=sys.stderr, flush=True)
    return result


def largest(fits: Callable[[int], bool], step: int, most: int) -> int:
    """The largest multiple of `step`, at most `most`, that fits: by doubling, then halving; 0 if none does."""
    good, bad = 0, step
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + step)
    while bad - good > step:
        middle = (good + bad) // 2 // step * step
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def find_limits(arguments: argparse.Namespace) -> dict:
    """Longest clip and largest crop within the budget, of each version, activations recomputed."""
    limits = {}
    for version in VERSIONS:
        base = Case("step", version, frames=3, crop=arguments.crop, recompute=True, network=arguments.network)

        def fits(base: Case = base, **change: int) -> bool:
            return in_fresh_process(dataclasses.replace(base, **change), arguments)["mib"] <= arguments.budget

        limits[version] = {
            "frames": 2 + largest(lambda more: fits(frames=2 + more), 2, arguments.longest),
            "crop": largest(lambda crop: fits(crop=crop), 4 * STRIDE, 16384),
        }
    return {"budget_mib": arguments.budget, **limits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="frames")
    parser.add_argument("--crop", type=int, default=384)
    parser.add_argument("--network", choices=("small", "released"), default="small")
    parser.add_argument("--budget", type=float, help="MiB for the search of the longest clip and the largest crop")
    parser.add_argument("--longest", type=int, default=1024, help="frames at which the search ends")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.case:
        print(json.dumps(measure(Case(**json.loads(arguments.case)), arguments.device)))
        return
    rows = []
    for what, recompute in (("read", False), ("step", False), ("step", True)):
        for frames in arguments.lengths:
            cases = [Case(what, version, frames, arguments.crop, recompute, arguments.network) for version in VERSIONS]
            rows += [dataclasses.asdict(case) | in_fresh_process(case, arguments) for case in cases]
    print_table(rows)
    limits = find_limits(arguments) if arguments.budget else None
    if limits:
        print(json.dumps(limits))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"command": " ".join(["python", *sys.argv]), "date": str(date.today()), "torch": torch.__version__}
        report |= {"device": device_name(arguments.device), "rows": rows, "limits": limits}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def print_table(rows: list[dict]) -> None:
    print(f"{'':16} {'T':>4} {'naive MiB':>10} {'fused':>8} {'share':>6} {'naive s':>8} {'fused':>7}")
    for naive, fused in zip(rows[::2], rows[1::2]):
        name = naive["what"] + (", recomputed" if naive["recompute"] else "")
        share = fused["mib"] / naive["mib"]
        print(
            f"{name:16} {naive['frames']:4} {naive['mib']:10.0f} {fused['mib']:8.0f} {share:6.3f} "
            f"{naive['seconds']:8.2f} {fused['seconds']:7.2f}"
        )


if __name__ == "__main__":
    main()
