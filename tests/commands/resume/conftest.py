"""A clip to track, and the command, with a state saved for every frame."""

import numpy as np
import pytest
import torch
from stopping import FRAMES, arguments

import stm_model.tracking.resume as resume
from stm_model import STM, STMConfig
from stm_model.commands.main import main
from stm_model.data.synthetic import procedural_clip
from stm_model.io import images
from stm_model.io.masks import write_mask
from stm_model.io.video import VideoWriter
from stm_model.network.weights import write_tensors


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A folder with a tiny network, clip.mp4, the same as frames/, and masks/ of frames 0 and 6."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = STM(STMConfig("resnet18", key_channels=16, value_channels=16, decoder_channels=16))
    write_tensors(model.state_dict(), folder / "tiny.safetensors")
    frames, labels = procedural_clip(frames=FRAMES, size=(48, 80), objects=2, seed=1)
    (folder / "frames").mkdir()
    (folder / "masks").mkdir()
    with VideoWriter(folder / "clip.mp4") as writer:
        for index, frame in enumerate(frames):
            writer.write(frame)
            images.write_image(folder / "frames" / f"{index:05d}.png", frame)
    write_mask(folder / "masks" / "00000.png", np.where(labels[0] == 1, 1, 0))
    write_mask(folder / "masks" / "00006.png", labels[6])
    return folder


@pytest.fixture
def track(clip, tmp_path, capsys, monkeypatch):
    """Run `stm track`; the exit code, stdout and stderr."""
    monkeypatch.setattr(resume, "MAX_WRITING_SHARE", float("inf"))

    def run(*extra, out=tmp_path / "out", **options):
        code = main(arguments(clip, out, *extra, **options))
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def unbroken(clip, tmp_path_factory):
    """Results of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("unbroken")
    assert main(arguments(clip, out, "--no-overlay", "--skip-uncertain", "--memory", "every:2")) == 0
    return out
