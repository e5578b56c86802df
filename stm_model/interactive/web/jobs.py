"""Work in the background of the page, with its progress and the time left."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stm_model.interactive.session import Progress


class _Stopped(Exception):
    pass


@dataclass
class Job:
    """Work in the background."""

    name: str
    done: int = 0  # frames
    total: int = 0  # frames; 0 until it is known
    left: float | None = None  # seconds; None until a frame is done
    error: str | None = None  # why it failed
    running: bool = True
    stopping: bool = False  # asked to stop
    _begun: float = field(default_factory=time.monotonic)

    def progress(self, done: int, total: int) -> None:
        """Note the progress, and stop here if asked to."""
        self.done, self.total = done, total
        # from the start on: frames that are computed together come at once
        self.left = (time.monotonic() - self._begun) / done * (total - done)
        if self.stopping:
            raise _Stopped

    def run(self, work: Callable[[Progress], None]) -> None:
        """Do the work; what goes wrong becomes `error`, as nobody else sees what a thread raises."""
        try:
            work(self.progress)
        except _Stopped:
            self.error = f"{self.name} was stopped"
        except Exception as error:
            self.error = f"{self.name} failed: {str(error).partition(chr(10))[0] or type(error).__name__}"
            if not isinstance(error, (ValueError, OSError, MemoryError)):
                traceback.print_exc()

    def shown(self) -> dict[str, Any]:
        """What the page is told."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}
