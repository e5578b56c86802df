"""A checkpoint is there whole or not at all."""

import pytest
import torch

from stm_model.io.files import write_torch

resource = pytest.importorskip("resource")


@pytest.fixture
def small_files():
    """Files of this process end at 100 000 bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_error_of_the_system_and_what_was_there_stays(tmp_path, small_files):
    path = tmp_path / "checkpoint.pt"
    write_torch(path, {"step": 1})
    with pytest.raises(OSError, match="too large"):
        write_torch(path, {"step": 2, "weights": torch.zeros(100_000)})
    assert torch.load(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
