"""Files written whole or not at all, to a temporary name, then renamed; folders that one run at a time writes to."""

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any, cast

CHECKSUM = 16
"""Bytes of the checksum at the end of a file by `write_torch`."""


@contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to `path` when the block ends without an error; an OSError names
    `path`.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        # writing to an open file on a full disk does not name it
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


LOCK = ".lock"
"""In a folder that a run writes to: the file that it holds locked, which says who it is."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder for the time of the block; it is made if it is not there, and not left behind
    empty. The lock of a process that was killed ends with it.

    Raises:
        ValueError: it is a file, or another run writes there.
    """
    from filelock import FileLock, Timeout

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: is a file; expected a folder")
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        holder = path.read_text(encoding="utf-8") or "one that starts"
        raise ValueError(
            f"--out {folder}: another run writes there ({holder}); wait until it ends, or choose another folder"
        ) from None
    try:
        started = datetime.now().isoformat(" ", "seconds")
        path.write_text(f"process {os.getpid()} on {platform.node()} since {started}", encoding="utf-8")
        yield
    finally:
        # while it is held: who has opened the same file sees that it is gone, and makes a new one
        path.unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):
            for place in made:
                place.rmdir()


def is_empty(folder: Path) -> bool:
    """Whether a folder is missing or holds nothing but the lock and the temporary names of a run that was killed."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(file.name == LOCK or ".partial" in file.name for file in folder.iterdir())


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class _Summed:
    """A file to write to that knows the checksum of what was written."""

    def __init__(self, file: IO[bytes]):
        self.file, self.digest = file, hashlib.blake2b(digest_size=CHECKSUM)
        self.flush = file.flush

    def write(self, part: bytes) -> int:
        self.digest.update(part)
        return self.file.write(part)


def write_torch(path: str | os.PathLike, content: Any) -> None:
    """Write what `torch.save` takes, whole or not at all; it is on the disk when this returns, or OSError is raised.

    A checksum follows it, which `torch.load` passes over.
    """
    import torch

    with whole(path) as partial, open(partial, "wb") as file:
        summed = _Summed(file)
        try:
            torch.save(content, cast(IO[bytes], summed))
            file.write(summed.digest.digest())
        except RuntimeError as error:
            # where writing fails, torch.save fails once more as it closes the archive
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
        file.flush()
        os.fsync(file.fileno())


def is_unchanged(path: str | os.PathLike) -> bool:
    """Whether a file is to the bit as `write_torch` wrote it."""
    digest, left = hashlib.blake2b(digest_size=CHECKSUM), os.path.getsize(path) - CHECKSUM
    with open(path, "rb") as file:
        while left > 0 and (part := file.read(min(left, 2**20))):
            digest.update(part)
            left -= len(part)
        return file.read() == digest.digest()
