"""How a command ends: exit codes, and the one line that says why."""

from __future__ import annotations

import sys

BAD_INPUT, INTERRUPTED = 2, 130


def fail(message: str, code: int) -> int:
    """Print a line on stderr; returns the exit code."""
    print(f"stm: error: {message}", file=sys.stderr)
    return code
