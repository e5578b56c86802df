"""All that a GPU can tell about the read, in one command: python bench/gpu.py [--minutes 9] [--quick]

First whether every variant is right on the device, then the ceilings of matrix products and copies, then time and
memory of every reader at every size, forward and backward, the most important sizes first. What is wrong gets no time.
Writes a JSON and a plot beside it; the JSON is rewritten as results come, so a run that is stopped leaves what it had.

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
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

# a machine with a GPU may run a checkout that nobody installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.workers import Result, Task, run_apart, run_here, serve, write_json

SEED = 0
# of the time, for finding out what is right
CHECK_SHARE = 0.4
CHECK_PROCESSES = 8

Sections = dict[str, dict[str, Task]]


def build_tasks(arguments: argparse.Namespace) -> Sections:
    """All that is to be done, by section and name, in order; the same in every process."""
    if arguments.device == "cpu":
        # read when a kernel is defined, so it must stand before the first import of one
        os.environ["TRITON_INTERPRET"] = "1"
    from bench.checks import check_tasks, random_tasks
    from bench.tables import ceiling_tasks, choice_tasks, read_tasks

    device, tiny = torch.device(arguments.device), arguments.device == "cpu"
    if arguments.sanitize:
        return _only({"checks": check_tasks(device, True, SEED)}, arguments.only)
    dtype, quick = getattr(torch, dtype_of(arguments)), arguments.quick
    sections = {"checks": check_tasks(device, tiny, SEED)}
    if not quick:
        sections["checks"] |= random_tasks(device, tiny, SEED)
    sections["ceilings"] = ceiling_tasks(device, tiny)
    reads = read_tasks(device, dtype, tiny, quick, SEED)
    first = read_tasks(device, dtype, tiny, True, SEED)
    sections["reads"] = {name: reads[name] for name in first}
    sections["choices"] = choice_tasks(device, dtype, tiny, quick, SEED)
    sections["more reads"] = {name: task for name, task in reads.items() if name not in first}
    return _only(sections, arguments.only)


def _only(sections: Sections, words: str) -> Sections:
    return {
        section: {name: task for name, task in tasks.items() if words in name or section == "ceilings"}
        for section, tasks in sections.items()
    }


def dtype_of(arguments: argparse.Namespace) -> str:
    return "float16" if arguments.device == "cpu" else "bfloat16"


class Report:
    """What is known so far, written as it comes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from bench.machine import clocks, describe

        device = torch.device(arguments.device)
        self.path, self.begun = arguments.out, time.time()
        self.content: dict[str, Any] = {
            "command": " ".join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            "machine": describe(device),
            "clocks": {"before": clocks(device)},
            "dtype": dtype_of(arguments),
            "seed": SEED,
            "checks": {},
            "ceilings": {},
            "reads": {},
            "choices": {},
        }

    def tell(self, section: str, name: str, result: Result) -> None:
        """Note a result and print a line about it."""
        ceiling = self.content["ceilings"].get(f"matmul {result.get('dtype')}", {}).get("tflops")
        if ceiling and "tflops" in result:
            result["share_of_matmul"] = result["tflops"] / ceiling
        naive = self.content["reads"].get(name.rsplit(", ", 1)[0] + ", naive", {})
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
    words = []
    if "seconds" in result:
        words.append(f"{result['seconds'] * 1e6:.1f} µs")
    for name, text in (
        ("tflops", "{:.1f} TFLOP/s"),
        ("share_of_matmul", "{:.2f} of a large product"),
        ("terabytes_per_second", "{:.2f} TB/s"),
        ("share_of_blocks_left_out", "{:.3f} of blocks left out"),
        ("shapes", "{} shapes"),
        ("error_over_allowed", "error {:.2f} of allowed"),
    ):
        if name in result:
            words.append(text.format(result[name]))
    if "extra_bytes" in result:
        words.append(f"{result['extra_bytes'] / 2**20:.1f} MiB extra")
    return ", ".join(words)


def summary(content: dict[str, Any]) -> list[str]:
    """The last lines of a run: what is wrong, and how ours stands at each size."""
    checks = content["checks"].values()
    wrong = [name for name, result in content["checks"].items() if "failed" in result]
    skipped = sum("skipped" in result for result in checks)
    lines = [f"checks: {len(checks) - len(wrong) - skipped} right, {len(wrong)} wrong, {skipped} not run"]
    lines += [f"  wrong: {name}" for name in wrong]
    cells = [cell for cell in content["reads"].values() if "seconds" in cell and cell["dtype"] == content["dtype"]]
    groups: dict[tuple, dict[str, Result]] = {}
    for cell in cells:
        groups.setdefault((cell["direction"], cell["M"], cell["T"], cell["B"]), {})[cell["reader"]] = cell
    lines.append(f"{'direction':17}{'M':>5}{'T':>6}{'B':>3}{'ours':>9}{'share':>7}  {'best other':28}{'TFLOP/s':>8}")
    for (direction, *size), readers in groups.items():
        mine = readers.get("ours")
        others = {name: one for name, one in readers.items() if name != "ours" and "tile" not in name}
        best = max(others, key=lambda name: others[name]["tflops"], default=None)
        own = f"{mine['tflops']:9.1f}{mine.get('share_of_matmul', 0):7.2f}" if mine else f"{'–':>9}{'':7}"
        other = f"{best:28}{others[best]['tflops']:8.1f}" if best else ""
        lines.append(f"{direction:17}{size[0]:5}{size[1]:6}{size[2]:3}{own}  {other}")
    return lines


def run(arguments: argparse.Namespace) -> Report:
    """Every section, the checks side by side, the times one by one."""
    from bench.machine import clocks
    from bench.plot import draw

    sections, report = build_tasks(arguments), Report(arguments)
    seconds = arguments.minutes * 60
    report.write()
    for section, tasks in sections.items():
        share = CHECK_SHARE if section == "checks" else 1.0
        deadline, kept = report.begun + share * seconds, section.removeprefix("more ")

        def tell(name: str, result: Result, kept: str = kept) -> None:
            report.tell(kept, name, result)

        if arguments.workers == 0:
            run_here(tasks, list(tasks), deadline, tell)
        else:
            command = [sys.executable, str(Path(__file__).resolve()), *passed_on(arguments), "--serve"]
            processes = arguments.workers if section == "checks" else 1
            run_apart(command, list(tasks), deadline, tell, processes)
        report.content["clocks"][f"after {section}"] = clocks(torch.device(arguments.device))
        report.write()
        if kept == "reads":
            draw(report.content, arguments.out.with_suffix(".png"))
    return report


def passed_on(arguments: argparse.Namespace) -> list[str]:
    """The options that say what the tasks are."""
    return ["--device", arguments.device, *(["--quick"] if arguments.quick else [])]


def sanitize(arguments: argparse.Namespace) -> int:
    """Run every kernel once, on small ragged shapes, in this process; how many are wrong."""
    # a pool would hide a step beyond a tensor's end
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    wrong = []

    def tell(name: str, result: Result) -> None:
        print(f"{name}: {in_words(result)}", flush=True)
        wrong.extend([name] * ("failed" in result))

    tasks = build_tasks(arguments)["checks"]
    run_here(tasks, list(tasks), float("inf"), tell)
    print(f"{len(tasks)} checks, {len(wrong)} wrong")
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
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a GPU, torch sees none; --device cpu is a dry run")
    if arguments.workers is None:
        arguments.workers = CHECK_PROCESSES if arguments.device == "cuda" else 1
    if arguments.out is None and not (arguments.sanitize or arguments.serve):
        if arguments.device == "cpu":
            parser.error("--out: expected a file, a dry run leaves nothing under bench/results")
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        arguments.out = Path(__file__).parent / "results" / name / "gpu.json"
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    if arguments.serve:
        sections = build_tasks(arguments)
        serve({name: task for tasks in sections.values() for name, task in tasks.items()}, arguments.serve)
        return 0
    if arguments.sanitize:
        return min(1, sanitize(arguments))
    report = run(arguments)
    print("\n".join([*summary(report.content), f"{arguments.out}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
