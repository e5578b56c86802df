"""`stm interact`: a video in a page in the browser, scribbles in, masks out."""

import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import tyro

from stm_model.commands.exits import option_bytes
from stm_model.runtime import NetworkOptions, one_line


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
    """Address to listen on. Whoever reaches it sees the video and draws on it: another than the loopback's needs
    --yes."""
    port: int = 7860
    """Port to listen on; 0 takes a free one."""
    yes: bool = False
    """Let others on the network use the page, at a --host that they can reach."""
    memory_limit: str = "2GiB"
    """How much the features of frames may take, so that a round need not compute them anew."""
    most_frames: int = 2000
    """Longer videos are refused."""
    upload_limit: str = "1GiB"
    """Larger uploads are refused."""


def interact(config: InteractConfig) -> int:
    """Serve the page until interrupted; the exit code."""
    # what can be refused is refused before seconds of loading
    memory_limit, upload_limit = (option_bytes(config, name) or 0 for name in ("memory_limit", "upload_limit"))
    with listen(config.host, config.port, others=config.yes) as listener:
        from stm_model.interactive.footage import Footage
        from stm_model.interactive.session import ScribbleSession
        from stm_model.interactive.web.workbench import Workbench
        from stm_model.network import STM
        from stm_model.runtime import DEFAULT_INTERACTIVE_WEIGHTS, chosen_side

        try:
            from stm_model.interactive.web.app import serve
        except ImportError as error:
            raise ValueError(f"the page needs FastAPI and uvicorn ({error}): pip install 'stm-kernels[app]'") from error
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
            workbench.start_warm_up()
            serve(workbench, listener, lambda address: print(f"open {address}", flush=True))
        finally:
            workbench.close()
    return 0


def listen(host: str, port: int, others: bool) -> socket.socket:
    """A socket that listens there. Raises a ValueError where it cannot, or `others` must not reach it and could."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port: expected 0 to 65535, got {port}")
    try:
        # an empty name is every address of the machine
        found = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)
        family, *_, address = found[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(f"--host {host}: no such address ({one_line(error)})") from error
    if not others and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise ValueError(
            f"--host {host}: everyone who reaches this machine could see the video and draw on it; --yes allows it"
        )
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port}: {os.strerror(error.errno or 0)}; choose another --port, or 0 for a free one"
        ) from error
