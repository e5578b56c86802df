"""`stm interact`: a video in a page in the browser, scribbles in, masks out."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import tyro

from stm_model.commands.exits import option_bytes
from stm_model.runtime import NetworkOptions


@dataclass(frozen=True, kw_only=True)
class InteractConfig(NetworkOptions):
    """Segment a video with scribbles, in a page in the browser."""

    video: tyro.conf.Positional[Path]
    """A video file, or a folder of frames."""
    checkpoint: Path | None = None
    """A network guided by scribbles; None takes the one in the package."""
    tracking_checkpoint: Path | None = None
    """A network guided by masks, to track from a frame; None takes the one in the package."""
    session: Path | None = None
    """A saved session of this video to go on from."""
    host: str = "127.0.0.1"
    """Address to listen on. The page is for whoever reaches it: with another than the loopback's, for the network."""
    port: int = 7860
    """Port to listen on; 0 takes a free one."""
    memory_limit: str = "2GiB"
    """How much the features of frames may take, so that a round need not compute them anew."""
    most_frames: int = 2000
    """Longer videos are refused."""
    upload_limit: str = "1GiB"
    """Larger uploads are refused."""


def interact(config: InteractConfig) -> int:
    """Serve the page until interrupted; the exit code."""
    from stm_model.interactive.footage import Footage
    from stm_model.interactive.session import ScribbleSession
    from stm_model.interactive.web.workbench import Workbench
    from stm_model.network import STM
    from stm_model.runtime import DEFAULT_INTERACTIVE_WEIGHTS, chosen_side

    try:
        from stm_model.interactive.web.app import serve
    except ImportError as error:
        raise ValueError(f"the page needs FastAPI and uvicorn ({error}): pip install 'stm-kernels[app]'") from error
    memory_limit, upload_limit = (option_bytes(config, name) or 0 for name in ("memory_limit", "upload_limit"))
    weights = config.checkpoint or DEFAULT_INTERACTIVE_WEIGHTS
    model = STM.load(weights, device=config.device, dtype=config.dtype)
    footage = Footage(config.video, config.most_frames)

    def make_session(footage: Footage) -> ScribbleSession:
        size = chosen_side(config.size, weights, footage.size)
        return ScribbleSession(model, cast(Any, footage.frames), size=size, memory_limit=memory_limit)

    workbench = Workbench(
        footage,
        make_session,
        lambda: STM.load(config.tracking_checkpoint, device=config.device, dtype=config.dtype),
        most_frames=config.most_frames,
        upload_bytes=upload_limit,
    )
    try:
        if config.session is not None:
            workbench.session.restore(config.session)
        threading.Thread(target=workbench.warm_up, daemon=True).start()
        serve(workbench, config.host, config.port, lambda address: print(f"open {address}", flush=True))
    finally:
        workbench.close()
    return 0
