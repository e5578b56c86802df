"""Pictures in and out, overlays and contact sheets; a frame is uint8 RGB `[H, W, 3]`."""

import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageOps

from stm_model.io.files import whole
from stm_model.labels import VOID

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
# Okabe & Ito's colors, told apart with any kind of color vision; objects take them in turn
OVERLAY_COLORS = np.array(
    [(213, 94, 0), (86, 180, 233), (240, 228, 66), (204, 121, 167), (0, 158, 115), (0, 114, 178), (230, 159, 0)],
    dtype=np.uint8,
)


class MediaError(ValueError):
    """A picture, mask or video that cannot be used; the message names the file and what was expected."""


def reason(error: Exception) -> str:
    """What an error of the system or of a decoder says."""
    return getattr(error, "strerror", None) or str(error)


def width_by_height(size: Sequence[int]) -> str:
    """`854x480` for a size (H, W), as people write the size of a picture."""
    return f"{size[1]}x{size[0]}"


def picture_files(folder: Path) -> list[Path]:
    """The pictures in a folder in natural order: `frame2` before `frame10`."""
    files = (file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    return sorted((file for file in files if not file.name.startswith(".")), key=_natural)


def file_number(path: Path) -> int | None:
    """The number in which a file's name ends."""
    number = re.search(r"(\d+)$", path.stem)
    return int(number[1]) if number else None


def _natural(path: Path) -> list:
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", path.name)]


@contextmanager
def open_picture(path: str | os.PathLike | io.BytesIO) -> Iterator[Image.Image]:
    """An opened picture; whatever goes wrong in the block becomes a MediaError that names the file."""
    try:
        # a pipe to which nobody writes would be waited for
        if isinstance(path, (str, os.PathLike)) and Path(path).is_fifo():
            raise MediaError(f"{path}: is a pipe; expected a file")
        with Image.open(path) as image:
            yield image
    except MediaError:
        raise
    except FileNotFoundError:
        raise MediaError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: cannot be read as a picture ({reason(error)})") from error


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture as it is shown, without decoding it."""
    with open_picture(path) as image:
        return (image.width, image.height) if _orientation(image) >= 5 else (image.height, image.width)


def _orientation(image: Image.Image) -> int:
    """How a picture is turned or mirrored, by EXIF: 1 is not at all, from 5 on its sides are exchanged."""
    # without it in front of the pixels, a PNG would have to be decoded to look for it
    sought = image.format != "PNG" or "exif" in image.info
    return image.getexif().get(ExifTags.Base.Orientation, 1) if sought else 1


def upright(image: Image.Image) -> Image.Image:
    """A picture turned as its EXIF orientation says."""
    return ImageOps.exif_transpose(image) if _orientation(image) > 1 else image


def read_image(path: str | os.PathLike | io.BytesIO) -> np.ndarray:
    """Read a picture as uint8 RGB `[H, W, 3]`, turned as its EXIF orientation says. Raises MediaError if it cannot be
    read or has 16 bits a channel.
    """
    with open_picture(path) as image:
        if image.mode.startswith(("I", "F")):
            raise MediaError(f"{path}: more than 8 bits a channel (mode {image.mode}); expected an 8-bit picture")
        return np.array(upright(image).convert("RGB"))


def write_image(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write uint8 RGB `[H, W, 3]` as a picture of the suffix's format, whole or not at all."""
    with whole(path) as partial:
        Image.fromarray(image).save(partial)


def encode_jpeg(image: np.ndarray, quality: int = 88, subsampling: str = "4:4:4") -> bytes:
    """Uint8 RGB `[H, W, 3]` as the bytes of a JPEG."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="JPEG", quality=quality, subsampling=subsampling)
    return stream.getvalue()


def resize_frame(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize uint8 RGB `[H, W, 3]` to `size` (H, W) in pixels, antialiased."""
    return np.array(Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def fill_polygons(size: tuple[int, int], polygons: Sequence[Sequence[float]]) -> np.ndarray:
    """Bool `[H, W]` of `size`, true inside any of the polygons: corners x₀, y₀, x₁, y₁, … in pixels."""
    canvas = Image.new("1", (size[1], size[0]))
    for corners in polygons:
        ImageDraw.Draw(canvas).polygon(list(corners), fill=1, outline=1)
    return np.array(canvas)


def label_colors() -> np.ndarray:
    """The color of each label in overlays, uint8 `[256, 3]`."""
    return OVERLAY_COLORS[(np.arange(256) - 1) % len(OVERLAY_COLORS)]


def draw_line(size: tuple[int, int], points: Sequence[Sequence[float]], width: int) -> np.ndarray:
    """Bool `[H, W]` of `size`, true where a round brush of `width` pixels comes along the points (x, y), in pixels."""
    canvas = Image.new("1", (size[1], size[0]))
    draw, radius = ImageDraw.Draw(canvas), width / 2
    draw.line([tuple(point) for point in points], fill=1, width=width)
    for x, y in points:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
    return np.array(canvas)


def overlay(frame: np.ndarray, labels: np.ndarray, alpha: float = 0.5, colors: np.ndarray | None = None) -> np.ndarray:
    """Color the objects in a frame, with an outline around each.

    Args:
        frame: uint8 RGB `[H, W, 3]`.
        labels: uint8 `[H, W]`; 0 and 255 stay as they are.
        alpha: opacity of the color over an object, 0 to 1.
        colors: of each label, uint8 `[256, 3]`; None are `label_colors`.

    Returns:
        A new uint8 RGB `[H, W, 3]`.
    """
    colors = label_colors() if colors is None else colors
    inside = (labels > 0) & (labels < VOID)
    result = frame.copy()
    result[inside] = np.round(frame[inside] * (1 - alpha) + colors[labels[inside]] * alpha).astype(np.uint8)
    thickness = max(1, round(min(labels.shape) / 400))
    edge = np.zeros_like(inside)
    for down, right in ((thickness, 0), (0, thickness)):
        differs = labels[: labels.shape[0] - down, : labels.shape[1] - right] != labels[down:, right:]
        edge[: differs.shape[0], : differs.shape[1]] |= differs
        edge[down:, right:] |= differs
    edge &= inside
    result[edge] = colors[labels[edge]]
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
