"""How far a command is: a bar on a terminal, a line every ten seconds in a log or a pipe; on stderr."""

import sys
import time
from collections.abc import Iterable, Sized
from typing import Any

from tqdm import tqdm

SECONDS = 10.0
"""Between two lines, and before the first."""
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s in {elapsed}, {remaining} left{postfix}"
ENDLESS = "{desc}: {n_fmt} {unit}s in {elapsed}, {rate_fmt}{postfix}"
"""Where nobody knows how many there will be."""


class Progress(tqdm):
    """tqdm over `items`, or told of them by `update`; what is done with them is `desc`, one of them a `unit`."""

    def __init__(self, items: Iterable | None = None, *, desc: str, unit: str, shown: bool = True, **options: Any):
        self._on_terminal, self._said = sys.stderr.isatty(), time.monotonic()
        ends = options.get("total") is not None or isinstance(items, Sized)
        log = {"bar_format": LINE if ends else ENDLESS, "leave": False}
        options |= {"delay": 1} if self._on_terminal else log
        super().__init__(items, desc=desc, unit=unit, disable=not shown, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show the state; what tqdm calls, with an empty `msg` to remove the bar."""
        if self._on_terminal:
            return super().display(msg, pos)
        if msg is None and time.monotonic() - self._said >= SECONDS:
            self._said = time.monotonic()
            print(self, file=sys.stderr, flush=True)
        return False


def say(message: str) -> None:
    """A line on stderr, above the bar if there is one."""
    if sys.stderr.isatty():
        Progress.write(message, file=sys.stderr)
    else:
        print(message, file=sys.stderr, flush=True)
