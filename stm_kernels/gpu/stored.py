"""Tiles that `stm_kernels.tune` measured on this machine: a file in the user's cache folder, looked up at a launch."""

import json
import os
import tempfile
import warnings
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from stm_kernels.version import __version__

Tiles = TypeVar("Tiles")


def cache_file() -> Path:
    """Where measured tiles are kept."""
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "stm-kernels" / "tiles.json"


def tiles_key(
    kernel: str, architecture: str, dtype: torch.dtype, queries: int, positions: int, C: int, V: int
) -> str:  # fmt: skip
    """What tiles are kept by: `queries` (B · M) and `positions` (N) up to a factor of two, all else as it is."""
    sizes = f"C={C} V={V} queries<{1 << queries.bit_length()} positions<{1 << positions.bit_length()}"
    return f"{__version__} {architecture} {str(dtype).removeprefix('torch.')} {kernel} {sizes}"


def read_name(skips: bool, descriptors: bool) -> str:
    """The kernel in the key of a read: whether it may skip, and whether its inputs suit the copy engine."""
    return "read" + ", skipping" * skips + ", descriptors" * descriptors


def backward_name(skips: bool) -> str:
    """The kernel in the key of a backward pass."""
    return "backward" + ", skipping" * skips


def measured_tiles(default: Tiles, key: str) -> Tiles:
    """The tiles kept under a key of `tiles_key`, in the class of `default`; the default where there are none."""
    found = _entries().get(key)
    if found is None:
        return default
    kinds = {field.name: type(getattr(default, field.name)) for field in fields(default)}
    if not isinstance(found, dict) or {name: type(value) for name, value in found.items()} != kinds:
        _complain(f"expected {', '.join(kinds)} under {key!r}, got {found!r}")
        # once a process
        del _entries()[key]
        return default
    return type(default)(**found)


def store_tiles(tiles: Any, key: str) -> Path:
    """Keep tiles under a key, beside what the file holds already; a broken file is replaced.

    Raises:
        OSError: the file cannot be written; what it held stays.
    """
    _entries.cache_clear()
    entries = _entries() | {key: asdict(tiles)}
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(entries, indent=1) + "\n")
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _entries.cache_clear()
    return path


@lru_cache(maxsize=1)
def _entries() -> dict[str, Any]:
    """What the file holds, read once a process; nothing where it is absent or no file of ours."""
    try:
        entries = json.loads(cache_file().read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _complain(str(error))
        return {}
    if not isinstance(entries, dict):
        _complain(f"expected an object, got {type(entries).__name__}")
        return {}
    return entries


def _complain(reason: str) -> None:
    warnings.warn(f"{cache_file()}: measured tiles ignored, {reason}", stacklevel=3)
