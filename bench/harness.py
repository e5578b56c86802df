"""What the benchmarks share: machine facts, timing in alternation, peaks, tables, and work in processes of its own."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# only read: nothing here changes a setting of the GPU
CLOCKS = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu"
MIB = 2**20

Result = dict[str, Any]
Task = Callable[[], Result]

OUT_OF_TIME = {"skipped": "out of time"}
START_SECONDS = 120.0
"""For a process to load all it needs before its first task."""


def device_name(device: torch.device | str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


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
        "revision": revision(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found |= {"multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory}
        found |= {"cache_bytes": properties.L2_cache_size, "clocks": clocks(device)}
    return found


def clocks(device: torch.device) -> dict[str, str] | None:
    """Driver, clocks, power and temperature of this moment; None where nvidia-smi does not answer."""
    if device.type != "cuda":
        return None
    try:
        command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader", "-i", str(device.index or 0)]
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(CLOCKS.split(","), (value.strip() for value in line.split(","))))


def revision() -> str | None:
    """The commit of this checkout, marked where files differ from it; None where there is no git."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def options(document: str | None, repeats: int | None = None, threads: int = 2) -> argparse.ArgumentParser:
    """A parser with the options that most benchmarks have."""
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
    if torch.device(device).type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def alternate(
    functions: dict[str, Callable[[], Any]], repeats: int, device: torch.device | str = "cpu"
) -> dict[str, dict[str, float]]:
    """Time functions in alternation, after one call each that does not count.

    Returns:
        By function the median, least and most seconds of the clock, and the median of the processor's, all threads.
    """
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
        return self._of_process("VmRSS")

    def read(self) -> int:
        if self.on_gpu:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        return self._of_process("VmHWM")

    @staticmethod
    def _of_process(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns as wide as they need to be, the first one to the left; numbers as they come, floats with 3 digits."""
    cells = [list(header)]
    cells += [[f"{value:.3f}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in cells
    )


def write_json(report: dict[str, Any], path: Path | None) -> None:
    """Write under a temporary name and rename: a run that is killed leaves a whole file. None writes nothing."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, path)


def attempt(task: Task) -> Result:
    """A task's result, or in one line why there is none."""
    try:
        return task()
    except torch.OutOfMemoryError as error:
        return {"skipped": f"out of memory: {_first_line(error)}"}
    except NotImplementedError as error:
        return {"skipped": f"not built: {_first_line(error)}"}
    except ImportError as error:
        return {"skipped": f"not installed: {_first_line(error)}"}
    except Exception as error:
        if type(error).__name__ == "OutOfResources":
            # Triton's, which not every machine can import: a tile too large for this GPU
            return {"skipped": _first_line(error)}
        return {"failed": f"{type(error).__name__}: {_first_line(error)}"}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def run_tasks(
    build: Callable[[], dict[str, Task]],
    names: Sequence[str],
    tell: Callable[[str, Result], None],
    *,
    deadline: float = float("inf"),
    processes: int = 1,
    limit: float = 120.0,
) -> None:
    """Run tasks in processes; one that hangs or dies takes nothing but itself along.

    Args:
        build: makes the tasks by name, in each process anew; 0 processes runs them in this one.
        names: of the tasks, in order.
        tell: called with a task's name and result as it comes.
        deadline: as `time.time` has it; no task begins later.
        processes: at once.
        limit: seconds for one task; a process in which one takes longer is ended, and another goes on with the rest.
    """
    tasks = {} if processes else build()
    waiting, lock = deque(names), threading.Lock()
    workers = [Worker(build) for _ in range(min(processes, len(names)))]

    def work(worker: Worker | None) -> None:
        while waiting:
            try:
                name = waiting.popleft()
            except IndexError:
                return
            if time.time() >= deadline:
                result = OUT_OF_TIME
            else:
                result = worker.run(name, limit) if worker else attempt(tasks[name])
            with lock:
                tell(name, result)

    if not processes:
        return work(None)
    with ThreadPoolExecutor(max(1, len(workers))) as pool:
        try:
            for running in [pool.submit(work, worker) for worker in workers]:
                running.result()
        finally:
            waiting.clear()
            for worker in workers:
                worker.end()


def apart(task: Task, limit: float = 3600.0) -> Result:
    """Run a task in a process of its own, from whose start peaks count."""
    worker = Worker(partial(dict, task=task))
    try:
        return worker.run("task", limit)
    finally:
        worker.end()


class Worker:
    """A process that runs tasks one after the other; a new one takes the place of one that died."""

    def __init__(self, build: Callable[[], dict[str, Task]]):
        self.build, self.folder = build, tempfile.TemporaryDirectory()
        self.process: Any = None

    def run(self, name: str, limit: float) -> Result:
        """A task's result, or why there is none."""
        if self.process is None or not self.process.is_alive():
            self.end()
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            log = str(Path(self.folder.name, "log"))
            threads = torch.get_num_threads()
            self.process = context.Process(target=_serve, args=(theirs, self.build, threads, log))
            self.process.start()
            theirs.close()
            ready = self._receive(START_SECONDS)
            if ready:
                return ready
        with contextlib.suppress(OSError):
            self.connection.send(name)
        found = self._receive(limit)
        if "broken" in found:
            self.end()
        return found

    def _receive(self, limit: float) -> Result:
        if not self.connection.poll(limit):
            self.end()
            return {"failed": f"stopped after {limit:.0f} s"}
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            reason = f"its process ended with code {self.process.exitcode}{self._last_words()}"
            self.end()
            return {"failed": reason}

    def _last_words(self) -> str:
        lines = Path(self.folder.name, "log").read_text(errors="replace").strip().splitlines()
        return f": {lines[-1][:200]}" if lines else ""

    def end(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.connection.close()
            # one that waits for its next task ends by itself
            self.process.join(1)
            self.process.kill()
            self.process.join()
            self.process = None


def _serve(connection: Any, build: Callable[[], dict[str, Task]], threads: int, log: str) -> None:
    """The child's side of a `Worker`."""
    with open(log, "w") as words:
        for stream in (1, 2):
            os.dup2(words.fileno(), stream)
    torch.set_num_threads(threads)
    tasks = build()
    connection.send({})
    while True:
        try:
            name = connection.recv()
        except EOFError:
            # nobody waits for the rest
            return
        result = attempt(tasks[name])
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except RuntimeError as error:
            # after an illegal access nothing works here any more
            result = {"failed": f"left a broken device behind: {_first_line(error)}", "broken": True}
        connection.send(result)
