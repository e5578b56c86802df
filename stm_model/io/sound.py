"""The sound of a video, copied into another file as it is."""

import os
import warnings
from fractions import Fraction
from typing import Any

import av

from stm_model.io.images import reason


class Sound:
    """The first sound track of a file, if there is one, to be copied into an mp4 that PyAV writes.

    Nothing must be written to the container before. A format of sound that it cannot hold is left out with a warning.
    """

    def __init__(self, path: str | os.PathLike, container: Any):
        self._container, self._track = container, None
        self._source = av.open(os.path.abspath(path), metadata_errors="ignore")
        for stream in self._source.streams.audio[:1]:
            try:
                self._track = container.add_stream_from_template(stream)
            except (ValueError, av.FFmpegError) as error:
                warnings.warn(f"{path}: its sound is left out ({reason(error)})", stacklevel=3)

    def copy(self, start: Fraction, end: Fraction) -> None:
        """Copy what is heard from `start` to before `end`, in seconds; it begins at once."""
        with self._source as source:
            for packet in source.demux(source.streams.audio[:1]) if self._track is not None else ():
                if packet.pts is None or packet.dts is None:
                    continue
                # at a file's start packets before 0 prepare the decoder
                if start and packet.pts * packet.time_base < start:
                    continue
                if packet.pts * packet.time_base >= end:
                    break
                earlier = round(start / packet.time_base)
                packet.pts, packet.dts = packet.pts - earlier, packet.dts - earlier
                packet.stream = self._track
                self._container.mux(packet)

    def close(self) -> None:
        """Let the file go."""
        self._source.close()
