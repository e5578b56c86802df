"""Formats of one picture a frame: palette masks, MOTS, cut-outs with alpha, layers of OpenEXR."""

import io
from collections.abc import Collection
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from stm_model.io.files import whole
from stm_model.io.formats.export import Clip, FileEach, object_name
from stm_model.io.masks import write_mask
from stm_model.labels import VOID, objects_in

RIM = 8
"""Pixels around objects whose colors are kept where they are transparent: lossy codecs mix neighbours."""
MOTS_CLASS, MOTS_IGNORED = 1000, 10000
"""What MOTS adds to the number of an object of its first class; its value of what is not known."""


class PaletteExport(FileEach):
    """Palette PNGs, as `stm track` writes them."""

    target, suffix = "masks", ".png"

    def write(self, index: int, labels: np.ndarray, frame: np.ndarray | None) -> None:
        write_mask(self.file(index), labels)


class MotsExport(FileEach):
    """MOTS' PNGs of 16 bits: 1000 times the class, of which there is one, plus the object's label."""

    target, inner, suffix = "mots", "instances", ".png"

    def __init__(self, out: Path, clip: Clip, keep: Collection[int] = ()):
        super().__init__(out, clip, keep)
        (self.folder / "labels.txt").write_text("object\n", encoding="utf-8")

    def write(self, index: int, labels: np.ndarray, frame: np.ndarray | None) -> None:
        values = np.arange(VOID + 1, dtype=np.uint16) + MOTS_CLASS
        values[0], values[VOID] = 0, MOTS_IGNORED
        with whole(self.file(index)) as partial:
            Image.fromarray(values[labels]).save(partial, compress_level=1)


class AlphaExport(FileEach):
    """RGBA PNGs: the frame, transparent where no object is."""

    target, suffix, needs_frames = "alpha", ".png", True

    def write(self, index: int, labels: np.ndarray, frame: np.ndarray | None) -> None:
        assert frame is not None
        with whole(self.file(index)) as partial:
            partial.write_bytes(_png(with_alpha(frame, labels)))


class ExrExport(FileEach):
    """OpenEXR files of half floats, one layer an object: `object_7.A` is 1 where it is."""

    target, suffix, extra = "exr", ".exr", "OpenEXR"

    def write(self, index: int, labels: np.ndarray, frame: np.ndarray | None) -> None:
        import OpenEXR

        header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
        layers = {
            f"{object_name(label).replace(' ', '_')}.A": (labels == label).astype(np.float16)
            for label in sorted(objects_in(labels))
        }
        # a file must have a channel
        layers = layers or {"A": np.zeros(labels.shape, dtype=np.float16)}
        stream = io.BytesIO()
        with OpenEXR.File(header, layers) as file:
            file.write(stream)
        # OpenEXR says nothing of a full disk
        with whole(self.file(index)) as partial:
            partial.write_bytes(stream.getvalue())


def _png(picture: np.ndarray) -> bytes:
    """RGBA uint8 `[H, W, 4]` as a PNG by FFmpeg, in half of Pillow's time."""
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width, codec.pix_fmt, codec.time_base = *picture.shape[:2], "rgba", Fraction(1)
    codec.options = {"pred": "up", "compression_level": "1"}
    packets = [*codec.encode(av.VideoFrame.from_ndarray(picture, format="rgba")), *codec.encode(None)]
    return b"".join(map(bytes, packets))


def with_alpha(frame: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A frame with labels uint8 `[H, W]` as RGBA uint8 `[H, W, 4]`: opaque on the objects, black where it is further
    than `RIM` to `3 * RIM` from them.
    """
    from scipy.ndimage import binary_dilation

    height, width = labels.shape
    picture = np.zeros((height, width, 4), dtype=np.uint8)
    picture[..., 3] = alpha = cut_out(labels)
    rows = np.maximum.reduceat(alpha, range(0, height, RIM), axis=0)
    tiles = binary_dilation(np.maximum.reduceat(rows, range(0, width, RIM), axis=1), np.ones((3, 3)))
    if tiles.any():
        # what is far from all objects is not looked at again
        top, *_, bottom = np.pad(tiles.any(1).nonzero()[0], (0, 1), mode="edge")
        left, *_, right = np.pad(tiles.any(0).nonzero()[0], (0, 1), mode="edge")
        near = tiles[top : bottom + 1, left : right + 1].repeat(RIM, 0).repeat(RIM, 1)
        part = picture[RIM * top : RIM * bottom + RIM, RIM * left : RIM * right + RIM, :3]
        near = near[: part.shape[0], : part.shape[1], None]
        np.multiply(frame[RIM * top :, RIM * left :][: part.shape[0], : part.shape[1]], near, out=part)
    return picture


def cut_out(labels: np.ndarray) -> np.ndarray:
    """255 on the objects of uint8 `[H, W]`, else 0."""
    return np.where((labels > 0) & (labels < VOID), 255, 0).astype(np.uint8)
