"""The masks that `stm evaluate` found on one picture, frames of a video side by side, a row for each video.

python docs/sheet.py OUT/masks FILE.png [ROWS OF EACH VIDEO]

Without the frames and the given mask of the first, which belong to the dataset; OUT/figures has frames with masks.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from stm_model.io.images import contact_sheet, overlay, resize_frame
from stm_model.io.masks import read_mask

COLUMNS, HEIGHT = 8, 80


def draw(folder: Path, picture: Path, rows: int = 1) -> None:
    """Draw masks at even distances, those of the second and the last frame among them."""
    views = []
    for video in sorted(folder.iterdir()):
        paths = sorted(video.glob("*.png"))
        for index in np.linspace(1, len(paths) - 1, rows * COLUMNS).round().astype(int):
            labels = read_mask(paths[index])
            view = overlay(np.zeros((*labels.shape, 3), np.uint8), labels, alpha=1.0)
            views.append(resize_frame(view, (HEIGHT, round(HEIGHT * labels.shape[1] / labels.shape[0]))))
    Image.fromarray(contact_sheet(views, columns=COLUMNS)).quantize(64).save(picture, optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
