"""A clip, and `stm track` on it."""

import numpy as np
import pytest

from stm_model.commands.main import main
from stm_model.data.synthetic import procedural_clip
from stm_model.io.masks import write_mask
from stm_model.io.video import VideoWriter


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A folder with clip.mp4, mask.png (labels 7 and 9) and the folder of true masks; eight frames."""
    folder = tmp_path_factory.mktemp("clip")
    frames, labels = procedural_clip(frames=8, size=(48, 80), objects=2, seed=1)
    labels = np.array([0, 7, 9], dtype=np.uint8)[labels]
    with VideoWriter(folder / "clip.mp4") as writer:
        for frame in frames:
            writer.write(frame)
    (folder / "true").mkdir()
    for index, mask in enumerate(labels):
        write_mask(folder / "true" / f"{index:05d}.png", mask)
    write_mask(folder / "mask.png", labels[0])
    return folder


@pytest.fixture
def track(clip, weights, tmp_path, capsys):
    """Run `stm track` on the clip with changed arguments; the exit code, stdout and stderr."""

    def run(*extra, video=clip / "clip.mp4", mask=clip / "mask.png", out=tmp_path / "out", checkpoint=weights):
        arguments = [video, "--mask", mask, "--out", out, "--checkpoint", checkpoint, "--device", "cpu", *extra]
        code = main(["track", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run
