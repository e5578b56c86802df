"""All that a GPU can tell about the read, in one command: python bench/gpu.py [--minutes 9] [--quick]

First whether every variant is right on the device, then the ceilings of matrix products and copies, then time and
memory of every reader at every size, forward and backward, the most important sizes first. What is wrong gets no time.
Writes a JSON and a plot beside it; the JSON is rewritten as results come, so a run that is stopped leaves what it had.
Needs PyTorch, Triton, NumPy, einops and Matplotlib alone.

    python bench/gpu.py --device cpu --out dry/gpu.json              # proves the program itself: tiny, interpreted
    compute-sanitizer --tool memcheck python bench/gpu.py --sanitize  # every kernel, small ragged shapes, no times
    python bench/gpu.py --only "M=1620 T=20 B=1" --out one.json       # only what has these words in its name
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

# a machine with a GPU may run a checkout that nobody installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import MIB, Result, Task, clocks, describe, run_tasks, table, write_json

SEED = 0
# of the time, for finding out what is right
CHECK_SHARE = 0.4
CHECK_PROCESSES = 8
# a color and a marker each, which color-blind readers can tell apart
STYLES = {
    "ours": ("#d55e00", "o"),
    "naive": ("#555555", "s"),
    "cuDNN, heads": ("#0072b2", "^"),
    "flash, heads": ("#009e73", "v"),
    "memory-efficient": ("#cc79a7", "D"),
    "FlexAttention": ("#56b4e9", "P"),
    "FlashAttention-3": ("#e69f00", "X"),
    "FlashAttention-4": ("#b8a000", "*"),
    "xFormers": ("#7b3294", "<"),
}

Sections = dict[str, dict[str, Task]]


def build_tasks(arguments: argparse.Namespace) -> Sections:
    """All that is to be done, by section and name, in order; the same in every process."""
    if arguments.device == "cpu":
        # read when a kernel is defined, so it must stand before the first import of one
        os.environ["TRITON_INTERPRET"] = "1"
    from bench import gpu_checks, gpu_reads

    device, tiny, quick = torch.device(arguments.device), arguments.device == "cpu", arguments.quick
    if arguments.sanitize:
        return _only({"checks": gpu_checks.check_tasks(device, True)}, arguments.only)
    sections = {"checks": gpu_checks.check_tasks(device, tiny)}
    if not quick:
        sections["checks"] |= gpu_checks.random_tasks(device, tiny, SEED)
    reads = gpu_reads.Reads(device, gpu_checks.dtypes_of(device)[0], tiny, SEED)
    first, every = reads.readers(quick=True), reads.readers(quick)
    sections |= {"ceilings": reads.ceilings(), "reads": first, "choices": reads.choices(quick)}
    sections["more reads"] = {name: task for name, task in every.items() if name not in first}
    return _only(sections, arguments.only)


def _only(sections: Sections, words: str) -> Sections:
    return {
        section: {name: task for name, task in tasks.items() if words in name or section == "ceilings"}
        for section, tasks in sections.items()
    }


def flat_tasks(arguments: argparse.Namespace) -> dict[str, Task]:
    """Those of all sections together, for a process that runs them by name."""
    return {name: task for tasks in build_tasks(arguments).values() for name, task in tasks.items()}


class Report:
    """What is known so far, written as it comes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.path, self.begun = arguments.out, time.time()
        self.content: dict[str, Any] = {
            "machine": describe(arguments.device),
            "clocks": {},
            "dtype": "float16" if arguments.device == "cpu" else "bfloat16",
            "seed": SEED,
        }
        self.content |= {section: {} for section in ("checks", "ceilings", "reads", "choices")}

    def tell(self, section: str, name: str, result: Result) -> None:
        """Note a result and print a line about it."""
        ceiling = self.content["ceilings"].get(f"matmul {result.get('dtype')}", {}).get("tflops")
        if ceiling and "tflops" in result:
            result["share_of_matmul"] = result["tflops"] / ceiling
        naive = self.content["reads"].get(", ".join([*name.split(", ")[:2], "naive"]), {})
        if section == "reads" and "seconds" in naive and "seconds" in result:
            result["times_naive_speed"] = naive["seconds"] / result["seconds"]
            result["share_of_naive_extra_memory"] = result["extra_bytes"] / max(1, naive["extra_bytes"])
        self.content[section][name] = result
        print(f"{time.time() - self.begun:5.0f} s  {name}: {in_words(result)}", flush=True)
        self.write()

    def write(self) -> None:
        self.content["wall_seconds"] = time.time() - self.begun
        write_json(self.content, self.path)


def in_words(result: Result) -> str:
    for word in ("failed", "skipped"):
        if word in result:
            return f"{word}: {result[word]}"
    words = [
        text.format(result[name] * factor)
        for name, factor, text in (
            ("seconds", 1e6, "{:.1f} µs"),
            ("tflops", 1, "{:.1f} TFLOP/s"),
            ("share_of_matmul", 1, "{:.2f} of a large product"),
            ("terabytes_per_second", 1, "{:.2f} TB/s"),
            ("share_of_blocks_left_out", 1, "{:.3f} of blocks left out"),
            ("shapes", 1, "{} shapes"),
            ("error_over_allowed", 1, "error {:.2f} of allowed"),
            ("extra_bytes", 1 / MIB, "{:.1f} MiB extra"),
        )
        if name in result
    ]
    return ", ".join(words)


def summary(content: dict[str, Any]) -> str:
    """The last lines of a run: what is wrong, and how ours stands at each size."""
    checks = content["checks"]
    wrong = [name for name, result in checks.items() if "failed" in result]
    skipped = sum("skipped" in result for result in checks.values())
    lines = [f"checks: {len(checks) - len(wrong) - skipped} right, {len(wrong)} wrong, {skipped} not run"]
    lines += [f"  wrong: {name}" for name in wrong]
    groups: dict[tuple, dict[str, Result]] = defaultdict(dict)
    for cell in content["reads"].values():
        if "seconds" in cell and "tile" not in cell["reader"]:
            groups[tuple(cell[key] for key in ("direction", "M", "T", "B"))][cell["reader"]] = cell
    rows = []
    for size, readers in groups.items():
        mine = readers.pop("ours", {})
        best = max(readers, key=lambda name: readers[name]["tflops"], default="")
        speed = readers[best]["tflops"] if best else ""
        rows.append((*size, mine.get("tflops", ""), mine.get("share_of_matmul", ""), best, speed))
    return "\n".join([*lines, table(("", "M", "T", "B", "ours, TFLOP/s", "of product", "best other", "TFLOP/s"), rows)])


def draw(content: dict[str, Any], path: Path) -> None:
    """TFLOP/s over T: a panel for each M and direction, a line for each reader, the ceiling dashed. B = 1."""
    from matplotlib.figure import Figure

    lines: dict[tuple, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for cell in content["reads"].values():
        if "seconds" in cell and cell["B"] == 1 and cell["reader"] in STYLES:
            lines[cell["direction"], cell["M"]][cell["reader"]].append((cell["T"], cell["tflops"]))
    directions = sorted({direction for direction, _ in lines}) or ["forward"]
    frames = sorted({M for _, M in lines}) or [0]
    ceiling = content["ceilings"].get(f"matmul {content['dtype']}", {}).get("tflops")
    figure = Figure((1.2 + 3.4 * len(frames), 2.2 + 2.9 * len(directions)), layout="constrained")
    panels = figure.subplots(len(directions), len(frames), squeeze=False, sharey=True)
    shown = {}
    for row, direction in zip(panels, directions):
        for panel, M in zip(row, frames):
            for reader in filter(lines[direction, M].get, STYLES):
                color, marker = STYLES[reader]
                points = zip(*sorted(lines[direction, M][reader]))
                (shown[reader],) = panel.plot(*points, color=color, marker=marker, markersize=5)
            if ceiling:
                shown["large matrix product"] = panel.axhline(ceiling, color="black", linestyle="--", linewidth=1)
            panel.set(xscale="log", title=f"{direction}, M = {M}", xlabel="T, frames in the memory", ylim=(0, None))
            panel.grid(alpha=0.25)
        row[0].set_ylabel("useful TFLOP/s")
    figure.suptitle(f"{content['machine']['device']}, {content['dtype']}, B = 1")
    if shown:
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def run(arguments: argparse.Namespace) -> Report:
    """Every section, the checks side by side, the times one by one."""
    report, device = Report(arguments), torch.device(arguments.device)
    report.write()
    for section, tasks in build_tasks(arguments).items():
        share, kept = CHECK_SHARE if section == "checks" else 1.0, section.removeprefix("more ")
        processes = arguments.workers if section == "checks" else min(1, arguments.workers)
        run_tasks(
            partial(flat_tasks, arguments),
            list(tasks),
            partial(report.tell, kept),
            deadline=report.begun + share * arguments.minutes * 60,
            processes=processes,
        )
        report.content["clocks"][f"after {section}"] = clocks(device)
        report.write()
        if kept == "reads":
            draw(report.content, arguments.out.with_suffix(".png"))
    return report


def sanitize(arguments: argparse.Namespace) -> int:
    """Run every kernel once, on small ragged shapes, in this process; how many are wrong."""
    # a pool would hide a step beyond a tensor's end
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    wrong = []

    def tell(name: str, result: Result) -> None:
        print(f"{name}: {in_words(result)}", flush=True)
        wrong.extend([name] * ("failed" in result))

    names = list(build_tasks(arguments)["checks"])
    run_tasks(partial(flat_tasks, arguments), names, tell, processes=0)
    print(f"{len(names)} checks, {len(wrong)} wrong")
    return len(wrong)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing new after that")
    parser.add_argument("--quick", action="store_true", help="the three most important sizes, no random shapes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a dry run with tiny sizes")
    parser.add_argument("--out", type=Path, help="JSON file; default: bench/results/<device>/gpu.json")
    parser.add_argument("--workers", type=int, help="processes for the checks; 0 does everything in this one")
    parser.add_argument("--sanitize", action="store_true", help="only run every kernel once, for compute-sanitizer")
    parser.add_argument("--only", default="", metavar="WORDS", help="do what has these words in its name")
    arguments = parser.parse_args(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a GPU, torch sees none; --device cpu is a dry run")
    if arguments.workers is None:
        arguments.workers = CHECK_PROCESSES if arguments.device == "cuda" else 1
    if arguments.out is None and not arguments.sanitize:
        if arguments.device == "cpu":
            parser.error("--out: expected a file, a dry run leaves nothing under bench/results")
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        arguments.out = Path(__file__).parent / "results" / name / "gpu.json"
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    if arguments.sanitize:
        return min(1, sanitize(arguments))
    report = run(arguments)
    print(f"{summary(report.content)}\n{arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
