"""What every written format is: label maps one after the other into a file or folder."""

from array import array
from collections.abc import Collection, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import IO, ClassVar

import numpy as np

from stm_model.io.files import whole
from stm_model.io.live import LiveVideo
from stm_model.io.video import FOLDER_FPS, Video


class Clip:
    """The video that label maps belong to, as far as formats speak of it; without one, what they need is made up.
    `names` are those of objects, by label.
    """

    def __init__(
        self,
        name: str,
        video: Video | LiveVideo | None = None,
        names: Mapping[int, str] | None = None,
    ):
        self.name, self.video, self.names = name, video, names or {}
        self.fps: Fraction = FOLDER_FPS if video is None else video.fps
        self.files: tuple[Path, ...] = () if video is None else video.files
        self.time_base: Fraction = getattr(video, "time_base", None) or 1 / self.fps

    def picture(self, index: int) -> str:
        """The name of a frame as a picture: its file's, else `00042.jpg`."""
        return self.files[index].name if self.files else f"{index:05d}.jpg"

    def stem(self, index: int) -> str:
        """The name of a frame without a suffix."""
        return Path(self.picture(index)).stem

    def object_name(self, label: int) -> str:
        """The name of an object."""
        return self.names.get(label) or object_name(label)

    def time(self, index: int) -> int:
        """When a frame is shown, in units of `time_base`; the video must have been read as far as that."""
        times = getattr(self.video, "times", ())
        return times[index] if index < len(times) else round(index / (self.fps * self.time_base))


class Export:
    """A format being written.

    Args:
        out: the folder that its file or folder, `target`, is in.
        clip: of the label maps.
        keep: the frames whose files of an earlier run stay.
    """

    target: ClassVar[str]
    """Name of the file or folder."""
    needs_frames: ClassVar[bool] = False
    """Whether pixels of the video go into it."""
    extra: ClassVar[str | None] = None
    """A package that it needs and that is not installed with this one."""

    def __init__(self, out: Path, clip: Clip, keep: Collection[int] = ()):
        self.path, self.clip = out / self.target, clip

    def write(self, index: int, labels: np.ndarray, frame: np.ndarray | None) -> None:
        """Write the labels uint8 `[H, W]` of the next frame, which is RGB uint8 `[H, W, 3]` if it is known."""
        raise NotImplementedError

    def close(self) -> None:
        """Finish it: what was written so far is a whole file."""

    @classmethod
    def remove(cls, out: Path, kept: Collection[Path] = ()) -> None:
        """Remove what an earlier run wrote to a folder, but for the files of frames that are `kept`."""
        (out / cls.target).unlink(missing_ok=True)

    def discard(self) -> None:
        """Leave no file, and what was there before as it is, as far as files of single frames are not there yet."""


class FileEach(Export):
    """A folder with one file a frame; those of an earlier run go first."""

    suffix: ClassVar[str]
    inner: ClassVar[str] = ""
    """The folder in it where they are."""

    def __init__(self, out: Path, clip: Clip, keep: Collection[int] = ()):
        super().__init__(out, clip, keep)
        self.folder = self.path / self.inner
        self.folder.mkdir(parents=True, exist_ok=True)
        self.remove(out, {self.file(index) for index in keep})

    @classmethod
    def remove(cls, out: Path, kept: Collection[Path] = ()) -> None:
        # hidden ones too: a killed run's temporary names
        for file in (out / cls.target / cls.inner).glob(f"*{cls.suffix}"):
            if file not in kept:
                file.unlink()

    def file(self, index: int) -> Path:
        """The file of a frame."""
        return self.folder / f"{self.clip.stem(index)}{self.suffix}"


class Spooled(Export):
    """A format that tells one object after the other: the lines of each are kept in a file until the end, so that it
    is written without the video in memory.
    """

    def __init__(self, out: Path, clip: Clip, keep: Collection[int] = ()):
        super().__init__(out, clip, keep)
        self.frames, self.size = array("q"), (0, 0)
        self._spool = self.path.with_name(f".{self.path.stem}.partial.spool")
        self._file = open(self._spool, "w+b")
        self._places: dict[int, array] = {}

    def write(self, index: int, labels: np.ndarray, frame: np.ndarray | None) -> None:
        self.note(index, labels)
        self.frames.append(index)
        self.size = labels.shape

    def note(self, index: int, labels: np.ndarray) -> None:
        """Add the lines of a frame."""
        raise NotImplementedError

    def finish(self, file: IO[str]) -> None:
        """Write the file."""
        raise NotImplementedError

    def add(self, label: int, line: str) -> None:
        """Append a line, without its end, to those of an object."""
        place = self._file.seek(0, 2)
        self._file.write(line.encode() + b"\n")
        self._places.setdefault(label, array("q")).append(place)

    @property
    def labels(self) -> list[int]:
        """The objects that there are lines of."""
        return sorted(self._places)

    def lines(self, label: int) -> Iterator[str]:
        """The lines of an object, as they came."""
        for place in self._places[label]:
            self._file.seek(place)
            yield self._file.readline().decode().rstrip("\n")

    def close(self) -> None:
        try:
            if self.frames:
                with whole(self.path) as path, open(path, "w", encoding="utf-8") as file:
                    self.finish(file)
        finally:
            self.discard()

    def discard(self) -> None:
        self._file.close()
        self._spool.unlink(missing_ok=True)


def object_name(label: int) -> str:
    """What formats that name objects call the one of a label, unless it has a name."""
    return f"object {label}"


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is true in bool `[H, W]`, the last two exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
