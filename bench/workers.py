"""Run tasks in processes of their own: one that hangs or dies takes nothing but itself along."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Result = dict[str, Any]
Task = Callable[[], Result]

OUT_OF_TIME = {"skipped": "out of time"}
POLL_SECONDS = 0.3
# what a task may run over the deadline
GRACE_SECONDS = 20
# for a process to load all it needs before its first task
START_SECONDS = 120.0


def attempt(task: Task) -> Result:
    """A task's result, or in one line why there is none."""
    try:
        return task()
    except torch.OutOfMemoryError as error:
        return {"skipped": f"out of memory: {first_line(error)}"}
    except NotImplementedError as error:
        return {"skipped": f"not built: {first_line(error)}"}
    except ImportError as error:
        return {"skipped": f"not installed: {first_line(error)}"}
    except Exception as error:
        if type(error).__name__ == "OutOfResources":
            # Triton's, which not every machine can import: a tile too large for this GPU
            return {"skipped": first_line(error)}
        return {"failed": f"{type(error).__name__}: {first_line(error)}"}


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def run_here(
    tasks: dict[str, Task], names: Sequence[str], deadline: float, tell: Callable[[str, Result], None]
) -> None:
    """Run tasks one after the other in this process, none begun after the deadline (as `time.time` has it)."""
    for name in names:
        tell(name, attempt(tasks[name]) if time.time() < deadline else OUT_OF_TIME)


def serve(tasks: dict[str, Task], order: Path) -> None:
    """The child's side of `run_apart`: run the tasks named in a file, and write a line for each start and result."""
    work, parent = json.loads(order.read_text()), os.getppid()
    with open(work["results"], "a") as lines:

        def write(**line: Any) -> None:
            lines.write(json.dumps(line) + "\n")
            lines.flush()

        for name in work["names"]:
            if os.getppid() != parent:
                # nobody waits for the rest
                return
            if time.time() >= work["deadline"]:
                write(task=name, result=OUT_OF_TIME)
                continue
            write(task=name)
            result = attempt(tasks[name])
            try:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            except RuntimeError as error:
                # after an illegal access nothing works here any more: a new process goes on
                write(task=name, result={"failed": f"left a broken device behind: {first_line(error)}"})
                raise
            write(task=name, result=result)


@dataclass
class _Share:
    """The tasks of one process."""

    names: list[str]
    """Not done yet, in order."""
    folder: Path
    """Of its files."""
    process: subprocess.Popen | None = None
    """None before the first start."""
    read: int = 0
    """Bytes of the results seen."""
    running: str | None = None
    """The task begun last, if it is not done."""
    since: float = field(default_factory=time.time)
    """When it began, or its process."""
    finished: int = 0
    """Tasks done by this process."""

    def start(self, command: Sequence[str], deadline: float) -> None:
        self.running, self.since, self.finished = None, time.time(), 0
        order = self.folder / "order.json"
        order.write_text(
            json.dumps({"names": self.names, "deadline": deadline, "results": str(self.folder / "results")})
        )
        with open(self.folder / "log", "a") as log:
            self.process = subprocess.Popen([*command, str(order)], stdout=log, stderr=subprocess.STDOUT)

    def collect(self, tell: Callable[[str, Result], None]) -> None:
        """Pass on what is new in the results."""
        path = self.folder / "results"
        if not path.exists():
            return
        with open(path, "rb") as lines:
            lines.seek(self.read)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self.read += len(line)
                entry = json.loads(line)
                if "result" not in entry:
                    self.running, self.since = entry["task"], time.time()
                    continue
                self.running = None
                self.finish(entry["task"], entry["result"], tell)

    def finish(self, name: str, result: Result, tell: Callable[[str, Result], None]) -> None:
        self.names.remove(name)
        self.since, self.finished = time.time(), self.finished + 1
        tell(name, result)

    def last_words(self) -> str:
        lines = (self.folder / "log").read_text(errors="replace").strip().splitlines()
        return f": {lines[-1][:200]}" if lines else ""


def run_apart(
    command: Sequence[str],
    names: Sequence[str],
    deadline: float,
    tell: Callable[[str, Result], None],
    processes: int = 1,
    limit: float = 120.0,
) -> None:
    """Run tasks side by side in processes; each result is told as it comes.

    Args:
        command: starts a child that calls `serve` with the file named after it.
        names: of the tasks, in order.
        deadline: as `time.time` has it; no task begins later.
        tell: called with a task's name and result.
        processes: at once.
        limit: seconds for one task; a process in which one takes longer is ended, and another goes on with the rest.
    """
    with tempfile.TemporaryDirectory() as folder:
        shares = []
        for index in range(min(processes, len(names))):
            shares.append(_Share(list(names[index::processes]), Path(folder, str(index))))
            shares[-1].folder.mkdir()
        try:
            while any(share.names for share in shares):
                for share in shares:
                    _advance(share, command, deadline, tell, limit)
                time.sleep(POLL_SECONDS)
        finally:
            for share in shares:
                _end(share)


def _advance(
    share: _Share, command: Sequence[str], deadline: float, tell: Callable[[str, Result], None], limit: float
) -> None:
    share_ended = share.process is not None and share.process.poll() is not None
    share.collect(tell)
    if not share.names:
        return
    late = time.time() > deadline + GRACE_SECONDS
    if share.process is None or share_ended:
        if share_ended and (share.running or not share.finished):
            # one that dies before its first task would die again; one that dies between two has broken down in the last
            culprit = share.running or share.names[0]
            reason = f"its process ended with code {share.process.returncode}{share.last_words()}"
            share.finish(culprit, {"failed": reason}, tell)
        if share.names:
            share.start(command, deadline)
    elif late or time.time() - share.since > (limit if share.running else max(limit, START_SECONDS)):
        _end(share)
        took = f"stopped after {time.time() - share.since:.0f} s"
        share.finish(share.running or share.names[0], {"failed": took}, tell)
        if late:
            for name in list(share.names):
                share.finish(name, OUT_OF_TIME, tell)
        elif share.names:
            share.start(command, deadline)


def _end(share: _Share) -> None:
    if share.process is not None and share.process.poll() is None:
        share.process.kill()
        share.process.wait()


def write_json(report: dict[str, Any], path: Path) -> None:
    """Write under a temporary name and rename: a run that is killed leaves a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, path)
