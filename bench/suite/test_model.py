"""One tracked frame, as it runs by default and as public code runs it; its stages are in bench/tracker.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from bench.tracker import VERSIONS, agreement, build_tracker, network_of, steady_memory
from stm_model.data.synthetic import procedural_clip

OBJECTS = 2


def test_tracked_frame(race: Callable, quick: bool) -> None:
    """A frame of a video, with 5 remembered ones and 2 objects, by the default weights."""
    size = (240, 432) if quick else (480, 854)
    assert agreement("cpu", OBJECTS, size, None, frames=4) >= 0.98
    frames, labels = procedural_clip(12, size, OBJECTS, seed=0)
    tracks = {}
    for version in VERSIONS:
        tracker = build_tracker(version, network_of("default"), "cpu", steady_memory(5))
        tracks[version] = tracker.track((frames[index % len(frames)] for index in itertools.count()), {0: labels[0]})
        for _ in range(5):
            next(tracks[version])
    race(lambda: next(tracks["default"]), lambda: next(tracks["naive"]), 9, 1.0)
    for track in tracks.values():
        track.close()
