"""The session of the package `davisinteractive` drives our model, where that package is installed.

with DavisInteractiveSession(host="localhost", davis_root=root, max_nb_interactions=8, max_time=240) as official:
    drive(official, STM.load(DEFAULT_INTERACTIVE_WEIGHTS), read_frames, size=240)
    summary = official.get_global_summary()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stm_model.interactive.scribbles import parse_scribbles
from stm_model.interactive.session import ScribbleSession
from stm_model.network import STM


def drive(
    official: Any, model: STM, read_frames: Callable[[str], Sequence[np.ndarray]], *, size: int | None = None
) -> None:
    """Answer every interaction of an open session with our masks.

    Args:
        official: the session, by its documented methods `next`, `get_scribbles` and `submit_masks`. That package's own
            clock runs between the last two.
        model: a network guided by scribbles.
        read_frames: a sequence's name → its frames, uint8 `[H, W, 3]`.
        size: shorter side in pixels at which the network runs; None is the frames' own.

    Raises:
        ScribbleError: the session gives scribbles that are none.

    Source: the package's user guide, interactive.davischallenge.org/user_guide/usage.
    """
    session = None
    while official.next():
        sequence, content, is_new = official.get_scribbles(only_last=True)
        if is_new or session is None:
            session = ScribbleSession(model, read_frames(sequence), size=size)
        for frame, scribbles in parse_scribbles(content, len(session.frames)).items():
            session.add_scribbles(frame, scribbles)
        session.run()
        official.submit_masks(session.masks())
