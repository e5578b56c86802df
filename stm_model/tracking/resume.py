"""Going on where a run was stopped: what must be the same, and the file that holds the state."""

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stm_model.io.files import is_unchanged, write_torch

FORMAT = 8
"""Of the resume file and of the run's folder; those of another are refused."""
MAX_WRITING_SHARE = 0.02
"""Most of the time that may go into writing the file."""
SAMPLE = 2**20
"""Bytes of each sample by which a video is recognized."""
DIGESTS = ("video", "masks", "weights")
"""What a state knows by a digest."""


class ResumeFile:
    """The file that a run resumes from: when it is due, written whole, read.

    Args:
        path: where it is.
        every: seconds from one to the next, more if writing takes more than `MAX_WRITING_SHARE` of them; 0 writes none.
        video: the file or folder that is tracked.
        part: which part of it, by name.

    Raises:
        ValueError: `every` is negative.
    """

    def __init__(self, path: Path, every: float, video: Path, part: Mapping[str, Any]):
        if not every >= 0:
            raise ValueError(f"save_every: expected at least 0 seconds, got {every}")
        self.path, self.every, self.made_with = path, every, {"video": source_digest(video), **part}
        self.saved: dict[str, Any] | None = None
        """What an earlier run wrote there, once it is read."""
        self._written, self._took = time.monotonic(), 0.0

    def due(self) -> bool:
        """Whether it is time to write it."""
        passed = time.monotonic() - self._written
        return self.every > 0 and passed >= max(self.every, self._took / MAX_WRITING_SHARE)

    def write(self, content: dict[str, Any]) -> None:
        """Write it, whole or not at all; all other files are on the disk before it is.

        Raises:
            OSError: it cannot be written, as on a full disk; the one before stays.
        """
        started = time.monotonic()
        # else it may be there after a power failure, and the masks that it speaks of not
        if hasattr(os, "sync"):
            os.sync()
        write_torch(self.path, {"format": FORMAT, "made_with": self.made_with} | content)
        self._written = time.monotonic()
        self._took = self._written - started

    def read(self) -> dict[str, Any] | None:
        """What it holds, from now on in `saved`; None if there is none. Tensors stay in the file until they are used.

        Raises:
            ValueError: it can't be read, is of another version, was changed since, or is of another video.
        """
        if not self.path.exists():
            return None
        try:
            content = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
            version = content.get("format")
        except MemoryError:
            raise
        except Exception as error:
            # the reader fails in many ways on a file that is none of ours
            raise ValueError(
                f"{self.path}: can't be read as a state to resume from ({type(error).__name__})"
            ) from error
        check_format(self.path, version)
        if not is_unchanged(self.path):
            raise ValueError(
                f"{self.path}: is damaged, its checksum is wrong; --overwrite tracks from the start, and the masks in "
                f"{self.path.parent / 'masks'} are as they were"
            )
        check_same(content["made_with"], self.made_with)
        self.saved = content
        return content


def check_format(path: Path, found: object) -> None:
    """Raise a ValueError unless a file or folder was written in this version's format."""
    if found != FORMAT:
        raise ValueError(
            f"{path}: was written by another version (format {found or 1} instead of {FORMAT}); choose another --out, "
            "or add --overwrite"
        )


def check_same(made_with: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first setting or content that is not what a state was made with."""
    for name, value in asked.items():
        if (found := made_with.get(name)) != value:
            differs = "not those" if name in DIGESTS else f"{value} instead of the {found}"
            raise ValueError(f"{name}: {differs} that the saved state was made with")


def array_digest(arrays: Mapping[Any, np.ndarray | Tensor]) -> str:
    """A short text, equal for arrays or tensors of equal names, shapes, types and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {list(array.shape)};".encode())
        if isinstance(array, Tensor):
            array = array.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def source_digest(path: Path) -> str:
    """A short text, equal for a video file or folder of equal content: the names and sizes of its files, and samples
    from the start, middle and end of three of them. A single file may have another name.
    """
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.name if path.is_dir() else ''} {file.stat().st_size};".encode())
    for file in dict.fromkeys(files[place * (len(files) - 1) // 2] for place in range(3)):
        with open(file, "rb") as stream:
            for place in range(3):
                stream.seek(max(0, file.stat().st_size - SAMPLE) * place // 2)
                digest.update(stream.read(SAMPLE))
    return digest.hexdigest()
