"""Pictures and video in and out: video files, folders of frames, label masks, overlays.

Arrays are NumPy, colours are RGB. A mask is uint8 `[H, W]`: 0 is background, 255 is void (unknown, ignored), every
other value is an object's label.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

VOID = 255
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
FOLDER_FPS = Fraction(24)
MOST_GREY_LABELS = 64  # a grey picture with more values than this is a photograph or has soft edges, not labels

# Okabe & Ito's colours, told apart with any kind of colour vision; objects take them in turn
OVERLAY_COLOURS = np.array(
    [(213, 94, 0), (86, 180, 233), (240, 228, 66), (204, 121, 167), (0, 158, 115), (0, 114, 178), (230, 159, 0)],
    dtype=np.uint8,
)


class MediaError(ValueError):
    """A picture, mask or video that cannot be used; the message names the file and what was expected."""


class BrokenVideo(MediaError):
    """A video that stops before its end; `frames_read` frames came out before that."""

    def __init__(self, message: str, frames_read: int):
        super().__init__(message)
        self.frames_read = frames_read


def open_video(path: str | os.PathLike) -> VideoFile | FrameFolder:
    """Open a video file or a folder of frames, without reading it into memory.

    Args:
        path: a file that FFmpeg reads (mp4, mkv, webm, avi, …), or a folder of pictures, taken in natural order
            (`frame2` before `frame10`).

    Returns:
        A source. Iterating yields uint8 RGB `[H, W, 3]` frames, from the start each time. It has `path`, `name`,
        `size` (H, W) in pixels, `fps` (Fraction, frames a second; 24 for a folder) and `frame_count` (None if unknown).

    Raises:
        MediaError: nothing there, not a video, no frames, or frames of different sizes in a folder.
        BrokenVideo: while iterating, after the last whole frame of a video that breaks off.
    """
    path = Path(path)
    if path.is_dir():
        return FrameFolder(path)
    if not path.exists():
        raise MediaError(f"{path}: no such video file or folder of frames")
    return VideoFile(path)


class FrameFolder:
    """A folder of pictures as a video; see `open_video`."""

    fps = FOLDER_FPS

    def __init__(self, path: Path):
        self.path, self.name = path, path.resolve().name
        self.files = _pictures(path)
        if not self.files:
            raise MediaError(f"{path}: no frames; expected pictures ({' '.join(sorted(IMAGE_SUFFIXES))})")
        self.size = _picture_size(self.files[0])
        for file in self.files[1:]:
            if (size := _picture_size(file)) != self.size:
                raise MediaError(f"{file}: {_by(size)} pixels, but the frames before it are {_by(self.size)}")
        self.frame_count = len(self.files)

    def __iter__(self) -> Iterator[np.ndarray]:
        for index, file in enumerate(self.files):
            try:
                frame = read_image(file)
            except MediaError as error:
                raise BrokenVideo(f"{error}; {index} of {self.frame_count} frames read", index) from error
            yield frame


class VideoFile:
    """A video file read through FFmpeg; see `open_video`. Rotation noted in the file is applied."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.stem
        with self._opened() as (_, stream):
            self.fps = Fraction(stream.average_rate or stream.guessed_rate or FOLDER_FPS)
            self.frame_count = stream.frames or None
        # some containers (mkv, webm) do not say how many frames they hold: count them without decoding
        self.frame_count = self.frame_count or self._count_packets()
        first = next(self._decoded(), None)
        if first is None:
            raise MediaError(f"{path}: no frame in it can be decoded")
        self.size = first.shape[:2]

    def __iter__(self) -> Iterator[np.ndarray]:
        count = 0
        try:
            for frame in self._decoded():
                if frame.shape[:2] != self.size:
                    raise _Break(f"its pictures change from {_by(self.size)} to {_by(frame.shape)} pixels")
                yield frame
                count += 1
        except _Break as stop:
            known = f" of {self.frame_count}" if (self.frame_count or 0) > count else ""
            message = f"{self.path}: the video breaks off after {count}{known} frames ({stop})"
            raise BrokenVideo(message, count) from stop

    @contextmanager
    def _opened(self):
        try:
            container = av.open(str(self.path))
        except (av.error.FFmpegError, OSError) as error:
            raise MediaError(f"{self.path}: does not open as a video ({_reason(error)})") from error
        with container:
            if not container.streams.video:
                raise MediaError(f"{self.path}: holds no video stream")
            yield container, container.streams.video[0]

    def _count_packets(self) -> int | None:
        with self._opened() as (container, stream):
            try:
                return sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream)) or None
            except (av.error.FFmpegError, OSError):
                return None

    def _decoded(self) -> Iterator[np.ndarray]:
        """Every frame that can be decoded; `_Break` where the rest cannot be."""
        started = False
        with self._opened() as (container, stream):
            stream.thread_type = "SLICE"  # frame threads report damage late, after pictures that follow it
            packets = container.demux(stream)
            clock = _Clock(container, stream, self.fps)
            while True:
                packet = None
                try:
                    if (packet := next(packets, None)) is None:
                        break
                    clock.see(packet)
                    frames = packet.decode()
                except (av.error.FFmpegError, OSError) as error:
                    if not started:  # a video cut out of a longer one may start with frames that need an earlier one
                        continue
                    yield from map(_upright, _held_back(stream, packet))
                    raise _Break(_reason(error)) from error
                started = started or bool(frames)
                yield from map(_upright, frames)
            if started and clock.short():
                raise _Break(f"it ends at {float(clock.end):.2f} s of {float(clock.expected):.2f} s")


class _Break(Exception):
    """Why a video cannot be decoded any further."""


class _Clock:
    """Compares where a stream ends with where its file says it ends: FFmpeg takes a cut mkv or avi for a short one."""

    def __init__(self, container, stream, fps: Fraction):
        self.fps, self.start, self.end, self.expected = fps, None, None, None
        if tag := re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", "")):
            self.expected = int(tag[1]) * 3600 + int(tag[2]) * 60 + Fraction(tag[3])
        elif container.format.name == "avi" and stream.frames:
            self.expected = stream.frames / fps
        elif stream.duration:
            self.expected = stream.duration * stream.time_base

    def see(self, packet) -> None:
        if packet.pts is not None:
            start = packet.pts * packet.time_base
            end = start + (packet.duration * packet.time_base if packet.duration else 1 / self.fps)
            self.start = start if self.start is None else min(start, self.start)
            self.end = end if self.end is None else max(end, self.end)

    def short(self) -> bool:
        if self.end is None or self.expected is None:
            return False
        # some files count from their first frame, some from zero
        return max(self.end, self.end - self.start) < self.expected - Fraction(1, 10) - 2 / self.fps


def _held_back(stream, bad_packet) -> list:
    """The pictures that the decoder holds to put them in order, up to the one that cannot be decoded."""
    try:
        frames = stream.codec_context.decode(None)
    except (av.error.FFmpegError, OSError):
        return []
    if bad_packet is None or bad_packet.pts is None:
        return frames
    return [frame for frame in frames if frame.pts is not None and frame.pts < bad_packet.pts]


def _upright(frame) -> np.ndarray:
    pixels = frame.to_ndarray(format="rgb24")
    quarters = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, quarters)) if quarters else pixels


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _by(size: Sequence[int]) -> str:
    return f"{size[1]}x{size[0]}"


def _natural(path: Path) -> list:
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", path.name)]


def _pictures(folder: Path) -> list[Path]:
    files = (file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    return sorted((file for file in files if not file.name.startswith(".")), key=_natural)


@contextmanager
def _picture(path: str | os.PathLike):
    """An opened picture; whatever goes wrong in it becomes a MediaError that names the file."""
    try:
        with Image.open(path) as image:
            yield image
    except MediaError:
        raise
    except FileNotFoundError:
        raise MediaError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: cannot be read as a picture ({_reason(error)})") from error


def _picture_size(path: Path) -> tuple[int, int]:
    with _picture(path) as image:
        return image.height, image.width


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read a picture as uint8 RGB `[H, W, 3]`. Raises MediaError if it cannot be read or has 16 bits a channel."""
    with _picture(path) as image:
        if image.mode.startswith(("I", "F")):
            raise MediaError(f"{path}: more than 8 bits a channel (mode {image.mode}); expected an 8-bit picture")
        return np.array(image.convert("RGB"))


def read_mask(path: str | os.PathLike, *, binary: bool = False) -> np.ndarray:
    """Read the labels of a mask picture.

    Args:
        path: a palette picture (the palette's indices are the labels) or a grey one (the grey values are), usually PNG.
        binary: take the picture for one object, label 1: every pixel brighter than half of the brightest, or with a
            palette every index but 0. For black-and-white masks (0 and 255), soft edges and JPEG.

    Returns:
        uint8 labels `[H, W]`; 255 is void. A 1-bit picture has labels 0 and 1.

    Raises:
        MediaError: unreadable, coloured, labels above 255, JPEG, or a grey picture of more than 64 values.
    """
    with _picture(path) as image:
        mode, lossy = image.mode, image.format in ("JPEG", "MPO")
        pixels = np.array(image.convert("L") if binary and mode.startswith(("RGB", "CMYK", "YCbCr")) else image)
    if mode in ("LA", "PA"):
        pixels = pixels[..., 0]
    if binary:
        return (pixels > (0 if mode in ("P", "PA") else pixels.max() / 2)).astype(np.uint8)
    if lossy:
        raise MediaError(f"{path}: JPEG changes labels; expected a palette or grey PNG (or --binary for one object)")
    if pixels.ndim == 3:
        if (pixels[..., :3] != pixels[..., :1]).any():
            raise MediaError(f"{path}: a colour picture; expected a palette or grey PNG whose values are labels")
        pixels = pixels[..., 0]
    if pixels.min() < 0 or pixels.max() > 255:
        raise MediaError(f"{path}: label {int(pixels.max())} found; expected labels from 0 to 255")
    if mode != "P" and (count := len(np.unique(pixels))) > MOST_GREY_LABELS:
        raise MediaError(
            f"{path}: {count} grey values are too many for labels (soft edges?); expected a palette PNG, at most "
            f"{MOST_GREY_LABELS} grey values, or --binary for one object"
        )
    return pixels.astype(np.uint8)


def read_masks(
    path: str | os.PathLike, video: VideoFile | FrameFolder | None = None, *, binary: bool = False
) -> dict[int, np.ndarray]:
    """Read the given masks of a video by frame index.

    Args:
        path: one mask (for frame 0), or a folder of masks. In a folder the number that ends a file's name is its frame
            (`00005.png`, `mask_5.png`); if `video` is a folder with frames of the same names, the mask's name is.
        video: the source that the masks belong to, if there is one to check against.
        binary: see `read_mask`.

    Returns:
        uint8 labels `[H, W]` by frame index, in order.

    Raises:
        MediaError: what `read_mask` raises, no masks, two for one frame, one of a frame that the video does not have,
            different sizes, or no object in any of them.
    """
    path = Path(path)
    files = _pictures(path) if path.is_dir() else [path]
    if not files:
        raise MediaError(f"{path}: no masks; expected PNG files named by frame number, like 00000.png")
    by_index: dict[int, Path] = {}
    for file, index in zip(files, _frame_indices(files, video) if path.is_dir() else [0]):
        if index in by_index:
            raise MediaError(f"{file}: frame {index} already has the mask {by_index[index].name}")
        by_index[index] = file
    masks = {index: read_mask(by_index[index], binary=binary) for index in sorted(by_index)}
    size = next(iter(masks.values())).shape
    for index, labels in masks.items():
        if labels.shape != size:
            raise MediaError(f"{by_index[index]}: {_by(labels.shape)} pixels, but the masks before it are {_by(size)}")
    if not any(((labels > 0) & (labels < VOID)).any() for labels in masks.values()):
        if any((labels == VOID).any() for labels in masks.values()):
            raise MediaError(f"{path}: its only label is 255, which is void; for a black-and-white mask use --binary")
        raise MediaError(f"{path}: an empty mask, no pixel belongs to an object")
    return masks


def _frame_indices(files: list[Path], video: VideoFile | FrameFolder | None) -> list[int]:
    frame_stems = {file.stem: index for index, file in enumerate(getattr(video, "files", []))}
    by_name = any(file.stem in frame_stems for file in files)
    count = getattr(video, "frame_count", None)
    indices = []
    for file in files:
        number = re.search(r"(\d+)$", file.stem)
        index = frame_stems.get(file.stem) if by_name else int(number[1]) if number else None
        if index is None:
            wanted = "the name of a frame of the video" if by_name else "a name that ends in the frame's number"
            raise MediaError(f"{file}: expected {wanted}")
        if count is not None and index >= count:
            raise MediaError(f"{file}: a mask for frame {index}, but {video.path} has {count} frames, 0 to {count - 1}")
        indices.append(index)
    return indices


def davis_palette() -> bytes:
    """DAVIS' 256 RGB colours: bits 0, 3, 6 of a label make red, highest bit first; the next, green, blue."""
    labels = np.arange(256)
    channels = [sum(((labels >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
    return np.stack(channels, axis=1).astype(np.uint8).tobytes()


@contextmanager
def _whole(path: str | os.PathLike):
    """A temporary name beside `path` that becomes `path` only when the block ends well."""
    path = Path(path)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_mask(path: str | os.PathLike, labels: np.ndarray) -> None:
    """Write uint8 labels `[H, W]` as a PNG with DAVIS' palette. A file of that name is there whole or not at all."""
    image = Image.fromarray(np.asarray(labels, dtype=np.uint8), mode="P")
    image.putpalette(davis_palette())
    with _whole(path) as partial:
        image.save(partial, format="PNG")


def write_image(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write uint8 RGB `[H, W, 3]` as a picture of the suffix's format, whole or not at all."""
    with _whole(path) as partial:
        Image.fromarray(image).save(partial)


class VideoWriter:
    """Writes uint8 RGB `[H, W, 3]` frames as an H.264 mp4 (MPEG-4 where there is no x264); a context manager.

    The file gets its name when it is closed, after an exception too, so that what was written stays watchable; without
    a frame there is no file. An odd side grows by one repeated row or column.

    Args:
        path: where the mp4 goes.
        fps: frames a second.
        codec: FFmpeg's name of an encoder; None chooses.
    """

    def __init__(self, path: str | os.PathLike, fps: Fraction | float = FOLDER_FPS, codec: str | None = None):
        self.path = Path(path)
        self._fps = Fraction(fps).limit_denominator(1001)
        self._codec = codec or ("libx264" if "libx264" in av.codecs_available else "mpeg4")
        self._partial = self.path.with_name(f".{self.path.stem}.partial.mp4")
        self._container = self._stream = None

    def write(self, frame: np.ndarray) -> None:
        """Append one frame; all have the size of the first."""
        height, width = frame.shape[:2]
        if height % 2 or width % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._container is None:
            self._open(frame)
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        self._container.mux(self._stream.encode(picture))

    def _open(self, frame: np.ndarray) -> None:
        self._container = av.open(str(self._partial), "w", format="mp4")
        self._stream = self._container.add_stream(self._codec, rate=self._fps)
        self._stream.height, self._stream.width = frame.shape[:2]
        self._stream.pix_fmt = "yuv420p"
        if self._codec == "libx264":
            self._stream.options = {"crf": "20", "preset": "veryfast"}
        else:
            self._stream.bit_rate = 8_000_000

    def close(self) -> None:
        """Finish the file. Closing twice is fine."""
        if self._container is None:
            return
        container, self._container = self._container, None
        try:
            container.mux(self._stream.encode())
            container.close()
            os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def overlay(frame: np.ndarray, labels: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """Colour the objects in a frame, with a line around each.

    Args:
        frame: uint8 RGB `[H, W, 3]`.
        labels: uint8 `[H, W]`; 0 and 255 stay as they are.
        alpha: how much of the colour covers an object, 0 to 1.

    Returns:
        A new uint8 RGB `[H, W, 3]`.
    """
    colours = OVERLAY_COLOURS[(np.arange(256) - 1) % len(OVERLAY_COLOURS)]
    inside = (labels > 0) & (labels < VOID)
    painted = colours[labels[inside]]
    result = frame.copy()
    result[inside] = np.round(frame[inside] * (1 - alpha) + painted * alpha).astype(np.uint8)
    reach = max(1, round(min(labels.shape) / 400))
    edge = np.zeros_like(inside)
    for down, right in ((reach, 0), (0, reach)):
        first, second = labels[: labels.shape[0] - down, : labels.shape[1] - right], labels[down:, right:]
        differs = first != second
        edge[: differs.shape[0], : differs.shape[1]] |= differs
        edge[down:, right:] |= differs
    edge &= inside
    result[edge] = colours[labels[edge]]
    return result


def contact_sheet(images: Sequence[np.ndarray], columns: int = 4, gap: int = 4) -> np.ndarray:
    """Lay uint8 RGB pictures out in rows, `columns` to a row, `gap` white pixels between them: one RGB picture."""
    height = max(image.shape[0] for image in images)
    width = max(image.shape[1] for image in images)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    return sheet


def resize_frame(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize uint8 RGB `[H, W, 3]` to `size` (H, W) in pixels, antialiased."""
    return np.array(Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def resize_mask(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize uint8 labels `[H, W]` to `size` (H, W) in pixels: each pixel takes its nearest neighbour's label."""
    return np.array(Image.fromarray(labels).resize((size[1], size[0]), Image.Resampling.NEAREST))
