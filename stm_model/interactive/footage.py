"""Random access to the frames of a video, for scrubbing."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from stm_model.io.damage import BrokenVideo
from stm_model.io.images import MediaError
from stm_model.io.video import open_video
from stm_model.progress import Progress


class Footage:
    """The frames of a video, uint8 `[T, H, W, 3]`, decoded once into a temporary file that lives as long as they do.

    Raises MediaError for what is no video, or too long for `most_frames` or the disk. `name` None is the file's.
    """

    def __init__(self, path: str | os.PathLike, most_frames: int, name: str | None = None):
        source = open_video(path)
        self.name, self.fps, self.size = name or source.name, source.fps, source.size
        self.source = source
        """The video as it was opened: the names of its pictures, the times of its frames."""
        too_long = f"{self.name}: expected at most {most_frames} frames, got {{}}"
        if (source.frame_count or 0) > most_frames:
            raise MediaError(too_long.format(source.frame_count))
        frame_bytes = self.size[0] * self.size[1] * 3
        self.damage: str | None = None
        """Why the video ends early or has frames that stand in for missing ones, if so."""
        with tempfile.TemporaryFile() as file:
            free = shutil.disk_usage(Path(tempfile.gettempdir())).free
            if (source.frame_count or 1) * frame_bytes > free:
                need = f"{(source.frame_count or 1) * frame_bytes >> 20} MiB"
                raise MediaError(f"{self.name}: needs {need} in {tempfile.gettempdir()}, which has {free >> 20} MiB")
            count = 0
            try:
                for frame in Progress(source, desc="read", unit="frame", total=source.frame_count):
                    if count == most_frames:
                        raise MediaError(too_long.format("more"))
                    file.write(np.ascontiguousarray(frame).data)
                    count += 1
            except BrokenVideo as error:
                self.damage = str(error)
            if not count:
                raise MediaError(f"{self.name}: no frames")
            file.flush()
            # the mapping keeps the file alive
            self.frames = np.memmap(file, np.uint8, "r", shape=(count, *self.size, 3))
