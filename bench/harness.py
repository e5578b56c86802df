"""What the benchmarks share: machine facts, timing in alternation, peaks, tables, and work in processes of its own."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from pathlib import Path
from typing import Any

import torch

from stm_model.io import files
from stm_model.runtime import device_name, held_process_memory, peak_process_memory

ROOT = Path(__file__).resolve().parents[1]
# only read: nothing here changes a setting of the GPU
CLOCKS = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu"
MIB = 2**20
START_SECONDS = 120.0
"""For a process to load all it needs before its first task."""

Result = dict[str, Any]
Task = Callable[[], Result]


def describe(device: torch.device | str) -> dict[str, Any]:
    """Device, versions, revision, command and load: what a figure is worth nothing without."""
    device = torch.device(device)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        pass
    found: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": versions,
        # marked where files differ from the commit
        "revision": answer("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found |= {"multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory}
        found |= {"cache_bytes": properties.L2_cache_size, "clocks": clocks()}
    return found


def clocks() -> dict[str, str] | None:
    """Driver, clocks, power and temperature of the first GPU now; None where nvidia-smi does not answer."""
    line = answer("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader", "-i", "0")
    return line and dict(zip(CLOCKS.split(","), line.split(", ")))


def answer(*command: str) -> str | None:
    """What a command prints; None where there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def options(document: str | None, repeats: int | None = None, threads: int = 2) -> argparse.ArgumentParser:
    """A parser with the options that most benchmarks have."""
    # else PyTorch's profiler says on stderr when it begins and ends
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=at_least(1), default=threads, help="of a CPU; default: %(default)s")
    if repeats is not None:
        parser.add_argument("--repeats", type=at_least(1), default=repeats, help="timed calls; default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def at_least(least: int) -> Callable[[str], int]:
    """A whole number for an option."""

    def number(word: str) -> int:
        if not word.lstrip("-").isdigit() or int(word) < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {word}")
        return int(word)

    return number


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device | str) -> float:
    """Seconds: of processor time on a CPU, which other programs hardly lengthen; else of the clock."""
    synchronize(device)
    return time.process_time() if torch.device(device).type == "cpu" else time.perf_counter()


def alternate(
    functions: dict[str, Callable[[], Any]], repeats: int, device: torch.device | str = "cpu"
) -> dict[str, dict[str, float]]:
    """Time functions in alternation, after one call each that does not count.

    Returns:
        By function the median, least and most seconds of the clock, and the median of the processor's, all threads.
    """
    # what is freed stays with the process, as where a network has run: glibc keeps twice its largest freed mapping,
    # which profilers and short programs leave so small that fresh pages cost a third of a read
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            synchronize(device)
            wall, processor = time.perf_counter(), time.process_time()
            function()
            synchronize(device)
            if repeat:
                found[name].append((time.perf_counter() - wall, time.process_time() - processor))
    times = {}
    for name, pairs in found.items():
        walls, processors = zip(*pairs)
        times[name] = {"median": statistics.median(walls), "least": min(walls), "most": max(walls)}
        times[name]["processor"] = statistics.median(processors)
    return times


class Peak:
    """Most bytes held since `reset`, on a GPU by tensors, on a CPU by the process."""

    def __init__(self, device: torch.device | str):
        self.on_gpu = torch.device(device).type == "cuda"

    def reset(self) -> int:
        """Forget earlier peaks; the bytes held now."""
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        # 5 sets the kernel's high-water mark back to what the process holds now
        Path("/proc/self/clear_refs").write_text("5")
        return held_process_memory() or 0

    def read(self) -> int:
        if self.on_gpu:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        return peak_process_memory() or 0


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns as wide as they need to be, the first one to the left; numbers as they come, floats with 3 digits."""
    cells = [list(header)]
    cells += [[f"{value:.3f}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in cells
    )


def write_json(report: dict[str, Any], path: Path | None) -> None:
    """Write a report, whole or not at all; None writes nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, report)


def attempt(task: Task) -> Result:
    """A task's result, or in one line why there is none."""
    try:
        return task()
    except Exception as error:
        line = (str(error).splitlines() or [""])[0][:300]
        # OutOfResources is Triton's, which not every machine can import: a tile too large for this GPU
        reasons = {"OutOfMemoryError": "out of memory: ", "OutOfResources": "too large a tile: "}
        reasons |= {"ImportError": "not installed: ", "NotImplementedError": "not built: "}
        for kind in type(error).__mro__:
            if kind.__name__ in reasons:
                return {"skipped": reasons[kind.__name__] + line}
        return {"failed": f"{type(error).__name__}: {line}"}


def run_tasks(
    tasks: dict[str, Task],
    tell: Callable[[str, Result], None],
    *,
    deadline: float = float("inf"),
    processes: int = 1,
    limit: float = 120.0,
    end: float = float("inf"),
) -> None:
    """Run tasks in processes; one that hangs or dies takes nothing but itself along.

    Args:
        tasks: by name, in order; they must be picklable, unless `processes` is 0.
        tell: called with a task's name and result as it comes, from one thread.
        deadline: as `time.time` has it; no task begins later.
        processes: at once; 0 runs the tasks in this one.
        limit: seconds for one task; a process in which one takes longer is ended, and another goes on with the rest.
        end: as `time.time` has it; what still runs in a process then is ended.
    """

    def outcome(task: Task, run: Callable[[Task], Result]) -> Result:
        return {"skipped": "out of time"} if time.time() >= deadline else run(task)

    if not processes:
        for name, task in tasks.items():
            tell(name, outcome(task, attempt))
        return
    idle = deque(Worker() for _ in range(min(processes, len(tasks))))
    workers = list(idle)

    def work(task: Task) -> Result:
        worker = idle.pop()
        try:
            return outcome(task, lambda task: worker.run(task, limit, end))
        finally:
            idle.append(worker)

    with ThreadPoolExecutor(max(1, len(workers))) as pool:
        try:
            names = {pool.submit(work, task): name for name, task in tasks.items()}
            for found in as_completed(names):
                tell(names[found], found.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.end()


def apart(task: Task) -> Result:
    """Run a task in a process of its own, from whose start peaks count; it may take a day."""
    found: dict[str, Result] = {}
    run_tasks({"task": task}, found.__setitem__, limit=86_400.0)
    return found["task"]


class Worker:
    """A process that runs tasks one after the other; a new one takes the place of one that died or hangs."""

    process: Any = None

    def run(self, task: Task, limit: float, end: float) -> Result:
        """A task's result, or why there is none; arguments as in `run_tasks`."""
        found: Result = {"broken": True}
        try:
            if self.process is None:
                context = multiprocessing.get_context("spawn")
                self.connection, theirs = context.Pipe()
                self.process = context.Process(target=_serve, args=(theirs, torch.get_num_threads()))
                self.process.start()
                theirs.close()
                # loads all that it needs
                self._ask(dict, START_SECONDS, end)
            found = self._ask(task, limit, end)
        except TimeoutError:
            late = time.time() >= end
            found |= {"skipped": "out of time"} if late else {"failed": f"stopped after {limit:.0f} s"}
        except (EOFError, ConnectionError):
            found["failed"] = "its process ended"
        if found.pop("broken", False):
            self.end()
        return found

    def _ask(self, task: Task, limit: float, end: float) -> Result:
        self.connection.send(task)
        if not self.connection.poll(max(0.0, min(limit, end - time.time()))):
            raise TimeoutError
        return self.connection.recv()

    def end(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def _serve(connection: Any, threads: int) -> None:
    """Run what comes with as many threads as the parent has, and end with it, also where that is killed."""
    torch.set_num_threads(threads)
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: [parent.join(), os._exit(1)], daemon=True).start()
    while True:
        connection.send(attempt_on_device(connection.recv()))


def attempt_on_device(task: Task) -> Result:
    """`attempt`, and whether the device still works."""
    found = attempt(task)
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError as error:
        # after an illegal access nothing works here any more
        return {"failed": f"left a broken device behind: {error}", "broken": True}
    return found
