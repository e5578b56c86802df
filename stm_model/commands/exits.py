"""How a command ends: exit codes, and the one line that says why; options that are amounts of memory."""

from __future__ import annotations

import sys
from typing import Any

BAD_INPUT, INTERRUPTED = 2, 130


def fail(message: str, code: int) -> int:
    """Print a line on stderr; returns the exit code."""
    print(f"stm: error: {message}", file=sys.stderr)
    return code


def option_bytes(config: Any, name: str) -> int | None:
    """An option like 2GiB in bytes; None stays None. Raises a ValueError that names the option."""
    from stm_model.tracking.budget import parse_size

    text = getattr(config, name)
    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise ValueError(f"--{name.replace('_', '-')}: {error}") from error
