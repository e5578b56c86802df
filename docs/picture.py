"""The picture of the README: what `stm demo` tracks, as a small GIF.

python docs/picture.py
"""

import tempfile
from pathlib import Path

from PIL import Image

from stm_model.commands.main import main
from stm_model.io.video import open_video

EVERY = 2
"""One frame of so many is shown."""
SCALE = 0.75
"""Size of a pixel of the video in the picture."""


def draw(path: Path) -> None:
    """Run the demo and write its overlay to a GIF, all frames in the same 256 colours."""
    with tempfile.TemporaryDirectory() as folder:
        main(["demo", "--out", f"{folder}/demo"])
        video = open_video(Path(folder, "demo", "overlay.mp4"))
        frames = [Image.fromarray(frame) for frame in list(video)[::EVERY]]
    width, height = (round(side * SCALE) for side in frames[0].size)
    frames = [frame.resize((width, height), Image.Resampling.LANCZOS) for frame in frames]
    column = Image.new("RGB", (width, height * len(frames)))
    for index, frame in enumerate(frames):
        column.paste(frame, (0, index * height))
    palette = column.quantize(256)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=round(1000 * EVERY / 24), loop=0, optimize=True)


if __name__ == "__main__":
    draw(Path(__file__).with_name("demo.gif"))
