"""What the table of faults is tried on: a small clip as a file and as frames, its masks, and `stm track` on it."""

import numpy as np
import pytest

from stm_model.commands.main import main
from stm_model.data.synthetic import procedural_clip
from stm_model.io import images
from stm_model.io.masks import write_mask
from stm_model.io.video import VideoWriter

FRAMES = 10


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A folder with clip.mp4, the same as frames/, mask.png of the first frame, and true/, the masks of all."""
    folder = tmp_path_factory.mktemp("clip")
    frames, labels = procedural_clip(frames=FRAMES, size=(48, 80), objects=2, seed=1)
    for name in ("frames", "true"):
        (folder / name).mkdir()
    with VideoWriter(folder / "clip.mp4") as writer:
        for index, (frame, mask) in enumerate(zip(frames, labels)):
            writer.write(frame)
            images.write_image(folder / "frames" / f"{index:05d}.png", frame)
            write_mask(folder / "true" / f"{index:05d}.png", mask.astype(np.uint8))
    write_mask(folder / "mask.png", labels[0].astype(np.uint8))
    return folder


@pytest.fixture
def out(tmp_path):
    """Where results go."""
    return tmp_path / "out"


@pytest.fixture
def track(clip, weights, out, capsys):
    """Run `stm track` on the clip, with changed arguments; the exit code, stdout and stderr."""

    def run(*extra, video=clip / "clip.mp4", mask=clip / "mask.png", out=out, checkpoint=weights, overlay=False):
        arguments = [video, "--mask", mask, "--out", out, "--checkpoint", checkpoint, "--device", "cpu"]
        arguments += ["--dtype", "float32", *([] if overlay else ["--no-overlay"]), *extra]
        code = main(["track", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run
