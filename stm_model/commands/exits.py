"""How a command ends: exit codes, signals, and the one line that says why; options that are amounts of memory."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from stm_model.runtime import SIGNALS

BAD_INPUT = 2

_received: list[int] = []
"""The signals that this command has got."""


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise KeyboardInterrupt as Ctrl-C does; one that is ignored stays so."""
    _received.clear()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in SIGNALS:
            number = getattr(signal, name, None)
            # nohup ignores SIGHUP, and a shell SIGINT of what it runs in the background
            if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, _: FrameType | None) -> None:
    _received.append(number)
    raise KeyboardInterrupt


def was_interrupted() -> bool:
    """Whether a signal asked this command to end: what fails after it is no error of its own."""
    return bool(_received)


def interrupted(message: str = "interrupted") -> int:
    """Print the line of a command that a signal ended; the exit code, 128 and the signal's number: 130 for Ctrl-C."""
    return fail(message, 128 + (_received[0] if _received else signal.SIGINT))


def fail(message: str, code: int) -> int:
    """Print a line on stderr; returns the exit code."""
    print(f"stm: error: {message}", file=sys.stderr)
    return code


def nobody_reads() -> int:
    """The exit code of a command whose output nobody reads any more, as after `head`; the rest of it goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + 13  # SIGPIPE, which Windows lacks


def option_bytes(config: Any, name: str) -> int | None:
    """An option like 2GiB in bytes; None stays None. Raises a ValueError that names the option."""
    from stm_model.tracking.budget import parse_size

    text = getattr(config, name)
    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise ValueError(f"--{name.replace('_', '-')}: {error}") from error
