"""Label maps with what is hard for formats: parts, holes, single pixels, an object that goes and comes, odd sides."""

import numpy as np
import pytest

from stm_model.io.formats.export import Clip
from stm_model.io.formats.table import Exports

SIZE = (61, 87)


@pytest.fixture(scope="session")
def labels():
    """Five uint8 label maps; object 7 has a hole and a second part, 9 is gone in frames 0, 2 and 4, 250 is a speck."""
    rows, columns = np.indices(SIZE)
    maps = np.zeros((5, *SIZE), dtype=np.uint8)
    for index, one in enumerate(maps):
        distance = np.hypot(rows - 30, columns - 30 - 2 * index)
        one[(distance < 20) & (distance > 6)] = 7
        one[50:58, 2 + index : 9 + index] = 7
        if index in (1, 3):
            one[:12, 60:] = 9
            one[20, 86] = 9
        one[59, 80] = 250
    return maps


@pytest.fixture(scope="session")
def frames():
    """The pixels of as many frames."""
    smooth = np.linspace(20, 220, SIZE[1])[None, :, None] + np.zeros((SIZE[0], 1, 3))
    return [np.roll(smooth, index, axis=1).astype(np.uint8) for index in range(5)]


@pytest.fixture
def export(tmp_path, labels, frames):
    """Write the label maps in a format; its file or folder."""

    def run(name, clip=None):
        with Exports([name], tmp_path, clip or Clip("walk")) as exports:
            for index, (one, frame) in enumerate(zip(labels, frames)):
                exports.write(index, one, frame)
        assert not [file for file in tmp_path.rglob("*") if "partial" in file.name]
        return tmp_path / exports.files[name]

    return run
