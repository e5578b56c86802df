"""A row of the table of faults, and how it is judged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Fault(NamedTuple):
    """What is wrong, and how the command answers."""

    name: str
    arrange: Callable[[Path, Path], dict[str, Any]]
    """Makes it of the clip's folder in an empty one; returns what of the command changes, `extra` are the options."""
    line: str
    """What the last line on stderr says."""
    code: int = 2
    masks: int | None = None
    """How many masks are there at the end; None leaves the results' folder as it was."""
    named: str = "{:05d}.png"
    """Their names, by the number of the frame."""
    first: int = 0
    """The number of the first frame."""


def each(faults: list[Fault]) -> pytest.MarkDecorator:
    """One test for each row."""
    return pytest.mark.parametrize("fault", faults, ids=[fault.name for fault in faults])


def files(folder: Path) -> dict[str, bytes]:
    """All that a folder holds."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def judge(fault: Fault, track: Callable[..., tuple[int, str, str]], clip: Path, made: Path, out: Path) -> None:
    """Raise AssertionError where the command answers otherwise, or loses or leaves a file."""
    made.mkdir()
    changed = fault.arrange(clip, made)
    before = files(out)
    code, _, err = track(*changed.pop("extra", ()), **changed)
    said = err.splitlines()
    assert (code, len(said) == 1) == (fault.code, bool(fault.line)), err
    assert not said or fault.line in said[-1], err
    if fault.masks is None:
        assert files(out) == before and out.exists() == bool(before)
    else:
        expected = [fault.named.format(fault.first + index) for index in range(fault.masks)]
        assert sorted(file.name for file in (out / "masks").iterdir()) == expected
        assert not [name for name in files(out) if name.startswith(".")]
