"""The part of a video that is tracked: some of its frames, and of each all or a rectangle."""

from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from stm_model.io.formats.export import Clip
from stm_model.io.images import MediaError
from stm_model.io.live import LiveVideo
from stm_model.io.pictures import EVERY
from stm_model.io.video import Video


class Crop(NamedTuple):
    """A rectangle of a frame, in pixels."""

    left: int
    top: int
    width: int
    height: int

    @property
    def place(self) -> tuple[slice, slice]:
        """Its rows and columns."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


class Part:
    """Frames `start`, `start + stride`, … before `end` of a video, of which the tracker sees the `crop`.

    Iterating yields what the tracker sees, as `frames_from` does; `whole_frames` yields the same frames whole. Indices
    count the frames of the part, `numbers` are those of the video.

    Args:
        video: an opened one; of a live one all frames.
        start, end: places of frames in it; an `end` of None is the video's.
        stride: at least 1.
        crop: None is the whole frame.

    Raises:
        MediaError: frames of a folder differ in their suffix alone, so that their masks would have one name.
    """

    def __init__(
        self,
        video: Video | LiveVideo,
        start: int = 0,
        end: int | None = None,
        stride: int = 1,
        crop: Crop | None = None,
    ):
        self.video, self.clip, self.crop = video, Clip(video.name, video), crop
        self.numbers = EVERY[start:end:stride]
        self.frame_count = None if video.frame_count is None else len(range(video.frame_count)[start:end:stride])
        self.size = (crop.height, crop.width) if crop else video.size
        """Height and width of what the tracker sees."""
        self.fps: Fraction = video.fps / stride
        stems: dict[str, Any] = {}
        for file in video.files:
            if (other := stems.setdefault(file.stem, file)) != file:
                raise MediaError(f"{file}: its mask would have the name of that of {other.name}; rename one of them")

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.seen, self.whole_frames())

    def whole_frames(self) -> Iterator[np.ndarray]:
        """The frames, as iterating over the video gives them."""
        assert not isinstance(self.video, LiveVideo)
        return self.video.frames(self.numbers)

    def frames_from(self, index: int) -> Iterator[np.ndarray]:
        """What the tracker sees of the frames from an index on."""
        assert not isinstance(self.video, LiveVideo)
        following = self.video.frames_from(self.numbers[index])
        end = min(self.numbers.stop - self.numbers[index], EVERY.stop)
        return map(self.seen, islice(following, 0, end, self.numbers.step))

    def seen(self, image: np.ndarray) -> np.ndarray:
        """What the tracker sees of a frame `[H, W, 3]`, or of labels `[H, W]`."""
        return np.ascontiguousarray(image[self.crop.place]) if self.crop else image

    def whole(self, labels: np.ndarray) -> np.ndarray:
        """Labels `[h, w]` of what the tracker sees in the frame's size, 0 around them."""
        if self.crop is None:
            return labels
        whole = np.zeros(self.video.size, labels.dtype)
        whole[self.crop.place] = labels
        return whole

    def masks(self, given: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Of masks `[H, W]` by their frames' places in the video those of this part, as the tracker sees them."""
        return {self.numbers.index(number): self.seen(given[number]) for number in given if number in self.numbers}

    def number(self, index: int) -> int:
        """The number in the video of a frame of the part; of live input among all frames that came, once it is read."""
        return self.video.arrived[index] if isinstance(self.video, LiveVideo) else self.numbers[index]

    def name(self, number: int) -> int:
        """What a user calls a frame of the video: the number in its file's name, else its place."""
        numbers = getattr(self.video, "numbers", ())
        return numbers[number] if number < len(numbers) else number

    @property
    def mask_names(self) -> list[str] | None:
        """The names of the masks, where frames have names of their own."""
        if not self.video.files:
            return None
        return [self.mask_name(index) for index in range(self.frame_count or 0)]

    def mask_name(self, index: int) -> str:
        """The name of a frame's mask."""
        return f"{self.clip.stem(self.number(index))}.png"

    @property
    def settings(self) -> dict[str, Any]:
        """What makes it another part, for a run that goes on."""
        end = None if self.numbers.stop == EVERY.stop else self.numbers.stop
        crop = ",".join(map(str, self.crop)) if self.crop else None
        return {"start": self.numbers.start, "end": end, "stride": self.numbers.step, "crop": crop}
