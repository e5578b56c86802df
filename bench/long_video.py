"""What a long video costs: python bench/long_video.py [--data DAVIS] [--out bench/results/<device>/long_video.json]

What a frame takes, in time and memory, over the number T of remembered frames: naively, with everything kept, within a
budget, and on host pages (on a CPU the host's memory is the device's: there they only show that nothing is lost). What
appending a frame takes beside torch.cat. Whether a read of 1000 frames is exact. What forgetting costs in J. Whether
10 000 frames under a budget of 256 MiB take as much memory and time at their end as at their beginning. On a GPU also
what pages on the host cost over the copy and the computation that they cannot do without.

    python bench/long_video.py --quick --workers 0            # proves the program: tiny sizes, a minute
    python bench/long_video.py --only run --out FILE          # does this section anew, keeps the others of the file

Every figure of `frames` comes from a process of its own. On a CPU seconds are of processor time, of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

# a checkout that nobody installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.workers import Result, Task, run_apart, run_here, serve, write_json

SECTIONS = ("frames", "append", "exact", "host pages", "J", "run")
LIMIT_SECONDS = 3600.0


def build_tasks(arguments: argparse.Namespace) -> dict[str, dict[str, Task]]:
    """All that is to be done, by section and name; the same in every process."""
    from bench.long_evict import eviction_tasks
    from bench.long_memory import memory_tasks
    from bench.long_run import LongVideo, track_long_video

    device, quick = torch.device(arguments.device), arguments.quick
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tasks = memory_tasks(device, dtype, quick)
    tasks["J"] = eviction_tasks(arguments.data, arguments.split, device, quick)
    tiny = {"early": 30, "window": 10, "clip": 8, "size": (32, 48), "objects": 2, "budget": "200KiB"}
    video = LongVideo(120, **tiny, value_channels=64) if quick else LongVideo(arguments.frames)
    tasks["run"] = {f"{video.frames} frames": partial(track_long_video, video, device, arguments.threads)}
    return {section: tasks[section] for section in arguments.only}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every section that was asked for; what is known is written as it comes."""
    from bench.machine import describe
    from bench.track import device_name

    device = torch.device(arguments.device)
    report: dict[str, Any] = {}
    if arguments.out and arguments.out.exists():
        report = json.loads(arguments.out.read_text())
    report["machine"] = describe(device) | {"device": device_name(arguments.device)}
    for section, tasks in build_tasks(arguments).items():
        noted = {"command": " ".join(["python", *sys.argv]), "date": date.today().isoformat(), "results": {}}
        report[section] = noted | {"load": [os.getloadavg()[0]], "threads": arguments.threads}

        def tell(name: str, result: Result, section: str = section) -> None:
            report[section]["results"][name] = result
            print(f"{section}, {name}: {in_words(result)}", flush=True)
            keep(report, arguments.out)

        deadline = time.time() + 24 * LIMIT_SECONDS
        # the long run starts a process itself
        if arguments.workers == 0 or section == "run":
            run_here(tasks, list(tasks), deadline, tell)
        else:
            command = [sys.executable, str(Path(__file__).resolve()), *passed_on(arguments), "--serve"]
            for name in tasks:
                # a process for each: a peak is of all that a process ever did
                run_apart(command, [name], deadline, tell, limit=LIMIT_SECONDS)
        report[section]["load"].append(os.getloadavg()[0])
        keep(report, arguments.out)
    return report


def keep(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        write_json(report, path)


def in_words(result: Result) -> str:
    for word in ("failed", "skipped"):
        if word in result:
            return f"{word}: {result[word]}"
    words = [f"{result['seconds']:.4f} s"] if isinstance(result.get("seconds"), float) else []
    for name, text in (
        ("peak_bytes", "{:.0f} bytes at most"),
        ("error_over_allowed", "error over allowed {}"),
        ("J", "J {:.4f}"),
        ("held_growth", "memory grows by {:.4f}"),
        ("time_ratio", "time by a factor of {:.3f}"),
        ("processor_ratio", "processor time by {:.3f}"),
        ("over_floor", "{:.3f} over its floor"),
    ):
        if name in result:
            words.append(text.format(result[name]))
    return ", ".join(words)


def passed_on(arguments: argparse.Namespace) -> list[str]:
    """The options that say what the tasks are."""
    words = ["--device", arguments.device, "--threads", str(arguments.threads), "--split", arguments.split]
    words += ["--only", *arguments.only]
    return words + ["--quick"] * arguments.quick + (["--data", str(arguments.data)] if arguments.data else [])


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--data", type=Path, help="folder in the DAVIS layout, for J by eviction rule")
    parser.add_argument("--frames", type=int, default=10_000, help="length of the long run, at least 700")
    parser.add_argument("--split", default="held", help="list under its ImageSets")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION", help="%(choices)s")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to prove the program")
    parser.add_argument("--workers", type=int, default=1, choices=(0, 1), help="0 does everything in this process")
    parser.add_argument("--out", type=Path, help="JSON file to write; plots go beside it")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.threads < 1:
        parser.error(f"--threads: expected at least 1, got {arguments.threads}")
    if arguments.frames < 700:
        parser.error(f"--frames: expected at least 700, got {arguments.frames}")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    torch.set_num_threads(arguments.threads)
    if arguments.serve:
        sections = build_tasks(arguments)
        serve({name: task for tasks in sections.values() for name, task in tasks.items()}, arguments.serve)
        return 0
    from bench.long_tables import draw, lines

    report = run(arguments)
    print("\n".join(lines(report)))
    if arguments.out:
        draw(report, arguments.out)
    return int(any("failed" in cell for section in arguments.only for cell in report[section]["results"].values()))


if __name__ == "__main__":
    sys.exit(main())
