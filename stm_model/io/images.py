"""Pictures and label masks in and out, and pictures of results.

Arrays are NumPy, colours are RGB. A mask is uint8 `[H, W]`: 0 is background, 255 is void (unknown, ignored), every
other value is an object's label.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from stm_model.io.files import whole

VOID = 255
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
MOST_GREY_LABELS = 64  # a grey picture with more values than this is a photograph or has soft edges, not labels
# Okabe & Ito's colours, told apart with any kind of colour vision; objects take them in turn
OVERLAY_COLOURS = np.array(
    [(213, 94, 0), (86, 180, 233), (240, 228, 66), (204, 121, 167), (0, 158, 115), (0, 114, 178), (230, 159, 0)],
    dtype=np.uint8,
)


class MediaError(ValueError):
    """A picture, mask or video that cannot be used; the message names the file and what was expected."""


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def by(size: Sequence[int]) -> str:
    return f"{size[1]}x{size[0]}"


def _natural(path: Path) -> list:
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", path.name)]


def picture_files(folder: Path) -> list[Path]:
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
        raise MediaError(f"{path}: cannot be read as a picture ({reason(error)})") from error


def picture_size(path: Path) -> tuple[int, int]:
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


def has_palette(path: str | os.PathLike) -> bool:
    """Whether a picture stores indices of a palette, as label maps do. Raises MediaError if it is none."""
    with _picture(path) as image:
        return image.mode in ("P", "PA")


def fill_polygons(size: tuple[int, int], polygons: Sequence[Sequence[float]]) -> np.ndarray:
    """Draw filled polygons: bool `[H, W]`, true inside any of them.

    Args:
        size: height and width in pixels.
        polygons: each the corners x₀, y₀, x₁, y₁, … in pixels.
    """
    canvas = Image.new("1", (size[1], size[0]))
    for corners in polygons:
        ImageDraw.Draw(canvas).polygon(list(corners), fill=1, outline=1)
    return np.array(canvas)


def davis_palette() -> bytes:
    """DAVIS' 256 RGB colours: bits 0, 3, 6 of a label make red, highest bit first; the next, green, blue."""
    labels = np.arange(256)
    channels = [sum(((labels >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
    return np.stack(channels, axis=1).astype(np.uint8).tobytes()


def write_mask(path: str | os.PathLike, labels: np.ndarray) -> None:
    """Write uint8 labels `[H, W]` as a PNG with DAVIS' palette. A file of that name is there whole or not at all."""
    image = Image.fromarray(np.asarray(labels, dtype=np.uint8), mode="P")
    image.putpalette(davis_palette())
    with whole(path) as partial:
        image.save(partial, format="PNG")


def write_image(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write uint8 RGB `[H, W, 3]` as a picture of the suffix's format, whole or not at all."""
    with whole(path) as partial:
        Image.fromarray(image).save(partial)


def encode_jpeg(image: np.ndarray, quality: int = 88) -> bytes:
    """Uint8 RGB `[H, W, 3]` as the bytes of a JPEG."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="JPEG", quality=quality, subsampling=0)
    return stream.getvalue()


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
