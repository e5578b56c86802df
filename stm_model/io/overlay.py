"""The overlay video's frames: objects in colors that stand out against the picture, outlined and numbered."""

from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stm_model.io.images import OVERLAY_COLORS, label_colors, overlay
from stm_model.labels import VOID, objects_in

Style = Literal["fill", "outline", "side-by-side"]
STYLES: tuple[Style, ...] = get_args(Style)
VANISHES = 150.0
"""Distance of two colors below which one does not stand out from the other; from black to white it is 765."""
ALIKE = 0.25
"""Share of an object's pixels with a color like its label's, from which on it gets another."""


class Overlay:
    """Draws the objects of one video into its frames.

    An object has its label's color, unless many of its pixels have one like it in the frame where it is first drawn, or
    another object has it: then the one that is least like it and what is around it. A line of black or white goes
    around every outline, so that it is seen on any ground. Where there are several objects, each has its number.

    Args:
        style: `fill`, `outline` alone, or `side-by-side` with the frame as it is.
    """

    def __init__(self, style: Style = "fill"):
        self.style = style
        self.colors = label_colors()
        self._chosen: set[int] = set()

    def draw(self, frame: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """A frame uint8 `[H, W, 3]` with the objects of labels uint8 `[H, W]`, twice as wide side by side."""
        objects = sorted(objects_in(labels))
        for label in objects:
            if label not in self._chosen:
                self.colors[label] = self._color(frame, labels, label)
                self._chosen.add(label)
        drawn = overlay(frame, labels, 0.0 if self.style == "outline" else 0.45, self.colors)
        self._ring(drawn, labels)
        if len(objects) > 1:
            drawn = self._numbered(drawn, labels, objects)
        return np.hstack([frame, drawn]) if self.style == "side-by-side" else drawn

    def _color(self, frame: np.ndarray, labels: np.ndarray, label: int) -> np.ndarray:
        mask = labels == label
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        margin = max(4, len(rows) // 4)
        box = tuple(slice(max(0, side[0] - margin), side[-1] + margin + 1) for side in (rows, columns))
        own, around = frame[box][mask[box]], frame[box].reshape(-1, 3)
        taken = {tuple(self.colors[other]) for other in self._chosen}
        usual = label_colors()[label]
        if tuple(usual) not in taken and (color_distance(usual, own) < VANISHES).mean() < ALIKE:
            return usual
        free = [color for color in OVERLAY_COLORS if tuple(color) not in taken] or [*OVERLAY_COLORS]
        return min(
            free, key=lambda color: sum((color_distance(color, each) < VANISHES).mean() for each in (own, around))
        )

    def _ring(self, drawn: np.ndarray, labels: np.ndarray) -> None:
        """Draw a line around what is colored, dark around bright colors and bright around dark ones."""
        thickness = max(1, round(min(labels.shape) / 400))
        colored = np.where(labels == VOID, 0, labels)
        nearest = colored.copy()
        # views of both, so that rows and then columns are shifted in place
        for near, own in ((nearest, colored), (nearest.T, colored.T)):
            np.maximum(near[thickness:], own[:-thickness], out=near[thickness:])
            np.maximum(near[:-thickness], own[thickness:], out=near[:-thickness])
        ring = (nearest > 0) & (colored == 0)
        bright = self.colors @ np.array((0.299, 0.587, 0.114)) > 128
        drawn[ring] = np.where(bright, 0, 255)[nearest[ring], None]

    def _numbered(self, drawn: np.ndarray, labels: np.ndarray, objects: list[int]) -> np.ndarray:
        picture = Image.fromarray(drawn)
        font = ImageFont.load_default(max(12, min(labels.shape) // 20))
        for label in objects:
            rows, columns = np.nonzero(labels == label)
            # the pixel of the object that is nearest to its centre
            place = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
            at = (int(columns[place]), int(rows[place]))
            draw = ImageDraw.Draw(picture)
            draw.text(at, str(label), "white", font, anchor="mm", stroke_width=2, stroke_fill="black")
        return np.array(picture)


def color_distance(color: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How different a color looks from others, RGB in 0…255 in the last axis: 0…765.

    Source: "redmean", a weighted distance (T. Riemersma, CompuPhase).
    """
    color, others = np.asarray(color, np.float32), np.asarray(others, np.float32)
    red, green, blue = np.moveaxis((others - color) ** 2, -1, 0)
    mean = (others[..., 0] + color[0]) / 2
    return np.sqrt((2 + mean / 256) * red + 4 * green + (2 + (255 - mean) / 256) * blue)
