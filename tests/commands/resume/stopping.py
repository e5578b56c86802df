"""Runs of `stm track` that are stopped on the way, and what they leave."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stm_model import Tracker
from stm_model.io.video import open_video

ROOT = Path(__file__).parents[3]
FRAMES = 10
TIMES = {"seconds", "fps", "peak_memory_bytes", "settings", "files"}
"""What in summary.json an unbroken run may have otherwise."""


def arguments(clip, out, *extra, video="clip.mp4"):
    # every frame has its checkpoint, where writing one may take as long as it takes
    settings = ["--checkpoint", clip / "tiny.safetensors", "--device", "cpu", "--save-every", "1e-9"]
    return ["track", *map(str, [clip / video, "--mask", clip / "masks", "--out", out, *settings, *extra])]


DYING = """
import os, signal, sys
import stm_model.tracking.resume
from stm_model import Tracker
from stm_model.commands.main import main
stm_model.tracking.resume.MAX_WRITING_SHARE = float("inf")
track, last = Tracker.track, int(sys.argv[1])
def dying(frames):
    for index, frame in enumerate(frames):
        if index == last:
            os.kill(os.getpid(), signal.SIGKILL)
        yield frame
Tracker.track = lambda self, frames, *rest, **options: track(self, dying(frames), *rest, **options)
sys.exit(main(sys.argv[2:]))
"""


def killed_at(frame: int, command: list[str]) -> None:
    """Run a command in a process of its own, which is killed as the tracker asks for a frame."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = [sys.executable, "-c", DYING, str(frame), *command]
    done = subprocess.run(process, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr


class Stop(BaseException):
    """Ends a run as nothing that is foreseen does."""


def stopped_at(frame: int, monkeypatch, run, *extra, **options) -> None:
    """The same within this process, which closes its files."""
    original = Tracker.track

    def stopping(self, frames, *rest, **named):
        def until():
            for index, picture in enumerate(frames):
                if index == frame:
                    raise Stop
                yield picture

        return original(self, until(), *rest, **named)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Tracker, "track", stopping)
        run(*extra, **options)


def files(folder: Path) -> dict[str, bytes | int]:
    """All results but the summary: the bytes of a mask, the overlay's length: encodings need not be equal."""
    found = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    return {
        name: open_video(file).frame_count if name == "overlay.mp4" else file.read_bytes()
        for name, file in found.items()
        if name != "summary.json"
    }


def summary(folder: Path) -> dict:
    found = json.loads((folder / "summary.json").read_text())
    return {name: value for name, value in found.items() if name not in TIMES}


def at(out: Path) -> int:
    """How many frames the checkpoint knows."""
    return torch.load(out / "resume.pt", weights_only=True)["summary"]["frames"]
