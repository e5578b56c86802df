"""What every format that is read gives: the objects of each frame, drawn into labels when they are asked for."""

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from stm_model.io.images import MediaError
from stm_model.io.masks import frame_indices
from stm_model.io.video import Video
from stm_model.labels import VOID

Source = TypeVar("Source")

MAX_LABEL = VOID - 1


class Shape(NamedTuple):
    """A mask of an object in a frame."""

    name: str | None
    """Of the object, the same in all frames; None is void."""
    draw: Callable[[], np.ndarray]
    """Returns bool `[H, W]`."""


class Frame(NamedTuple):
    """What a file holds of a frame."""

    at: int | str
    """Its number, or the name of its picture."""
    size: tuple[int, int]
    """Height and width in pixels."""
    shapes: list[Shape]
    """Later ones lie on those before."""


class LazyMasks(Mapping[int, np.ndarray], Generic[Source]):
    """Frame index → labels uint8 `[H, W]`, which `read` makes of the frame's source when they are asked for."""

    def __init__(self, sources: dict[int, Source], read: Callable[[Source], np.ndarray]):
        self._sources, self._read = sources, read

    def __getitem__(self, index: int) -> np.ndarray:
        return self._read(self._sources[index])

    def __iter__(self) -> Iterator[int]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


class DrawnMasks(LazyMasks[Frame]):
    """The masks of a file, drawn when they are asked for.

    Objects that are called by a label, as in what this package writes, have it; others get 1, 2, … as they come, and a
    warning says which.

    Raises:
        MediaError: two are of one frame, one of no frame, or there are too many objects.
    """

    def __init__(self, path: Path, frames: Sequence[Frame], video: Video | None):
        by_index: dict[int, Frame] = {}
        for index, frame in sorted(zip(_indices(path, frames, video), frames), key=lambda each: each[0]):
            if index in by_index:
                raise MediaError(f"{path}: two pictures of frame {index}: {by_index[index].at} and {frame.at}")
            by_index[index] = frame
        super().__init__(by_index, self._drawn)
        self.path = path
        names = dict.fromkeys(shape.name for frame in by_index.values() for shape in frame.shapes)
        self._labels = _label_table(path, [name for name in names if name is not None])
        self.names = {label: name for name, label in self._labels.items()}
        """What the file calls the object of each label."""

    def _drawn(self, frame: Frame) -> np.ndarray:
        labels = np.zeros(frame.size, dtype=np.uint8)
        with reading(self.path):
            for shape in frame.shapes:
                labels[shape.draw()] = VOID if shape.name is None else self._labels[shape.name]
        return labels


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a file of the wrong content leads to into a MediaError that names it."""
    try:
        yield
    except MediaError:
        raise
    except KeyError as error:
        raise MediaError(f"{path}: lacks {error}, which its format has") from error
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise MediaError(f"{path}: not as its format says ({error})") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises a MediaError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MediaError(f"{path}: no such file") from None
    except ValueError as error:
        raise MediaError(f"{path}: can't be read as JSON ({error})") from error


def distinct_names(names: Sequence[tuple[str, Any]]) -> dict[tuple[str, Any], str]:
    """How to call objects that are known by a name and a number: by the name where it has one number."""
    numbers: dict[str, set[Any]] = {}
    for name, number in names:
        numbers.setdefault(name, set()).add(number)
    return {(name, number): name if len(numbers[name]) == 1 else f"{name} {number}" for name, number in names}


def _indices(path: Path, frames: Sequence[Frame], video: Video | None) -> list[int]:
    named = [Path(frame.at) for frame in frames if isinstance(frame.at, str)]
    if len(frames) == 1 and named and not re.search(r"\d$", named[0].stem) and not (video and video.files):
        return [0]
    try:
        found = iter(frame_indices(named, video))
    except MediaError as error:
        raise MediaError(f"{path}: {error}") from error
    indices = [next(found) if isinstance(frame.at, str) else frame.at for frame in frames]
    count = video.frame_count if video else None
    if count is not None and (late := [index for index in indices if not 0 <= index < count]):
        assert video is not None
        raise MediaError(f"{path}: a mask for frame {late[0]}, but {video.path} has the frames 0 to {count - 1}")
    return indices


def _label_table(path: Path, names: Sequence[str]) -> dict[str, int]:
    numbers = [re.fullmatch(r"(?:object )?(\d+)", name) for name in names]
    table = {name: int(number[1]) for name, number in zip(names, numbers) if number}
    if len(set(table.values())) == len(names) and all(1 <= label <= MAX_LABEL for label in table.values()):
        return table
    if len(names) > MAX_LABEL:
        raise MediaError(f"{path}: {len(names)} objects; expected at most {MAX_LABEL}")
    table = {name: label for label, name in enumerate(names, 1)}
    shown = ", ".join(f"{label} is {name}" for name, label in list(table.items())[:8])
    warnings.warn(f"{path}: labels of its objects: {shown}{', …' if len(table) > 8 else ''}", stacklevel=2)
    return table
