"""What a user of the page waits for: python bench/interactive.py --video VIDEO [--out FILE]

A video of at most 300 frames and one object, scribbled on where --at says. Seconds are from a request to its
whole answer, without the network: a frame with its masks while nothing else is done and while a round
runs, the preview of a scribble on its own frame (the first one apart), and rounds.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fastapi.testclient import TestClient

# a checkout that nobody installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import Peak, describe, options, write_json
from stm_model.interactive.footage import Footage
from stm_model.interactive.session import ScribbleSession
from stm_model.interactive.web.app import make_app
from stm_model.interactive.web.workbench import Workbench
from stm_model.network import STM
from stm_model.runtime import DEFAULT_INTERACTIVE_WEIGHTS, chosen_side

MAX_FRAMES = 300
SCRUBBED = 60


class Client(TestClient):
    """Asks the page's server as a browser does."""

    def ask(self, method: str, path: str, content: Any = None) -> float:
        """Seconds until the whole answer is there."""
        started = time.perf_counter()
        self.request(method, path, json=content).raise_for_status()
        return time.perf_counter() - started

    def do(self, action: str, **content: Any) -> dict[str, Any]:
        return self.post(f"/stm/do/{action}", json=content).raise_for_status().json()

    def wait(self) -> float:
        """Seconds until the work in the background is done."""
        started = time.perf_counter()
        while (status := self.do("status"))["job"]["running"]:
            time.sleep(0.05)
        if status["job"]["error"]:
            raise RuntimeError(status["job"]["error"])
        return time.perf_counter() - started


def summary(seconds: Sequence[float]) -> dict[str, float]:
    return {"median_s": statistics.median(seconds), "worst_s": max(seconds), "measured": len(seconds)}


def measure(client: Client, frames: int, at: Sequence[float]) -> dict[str, Any]:
    """Two rounds, and what is looked at before, between and during them."""
    spread = [round(place * (frames - 1) / (SCRUBBED - 1)) for place in range(SCRUBBED)]

    def scrub(masks: bool, times: Sequence[int] = spread) -> list[float]:
        return [client.ask("GET", f"/stm/frame/{index}?masks={masks}") for index in times]

    def scribble(frame: int) -> float:
        x, y = at
        client.do("scribble", frame=frame, object=1, path=[[x, y], [x + 0.02, y + 0.02]])
        return client.ask("POST", "/stm/preview", {"frame": frame})

    found: dict[str, Any] = {"scrub_before": summary(scrub(False))}
    found["first_preview_s"] = scribble(0)
    found["preview"] = summary([scribble(frame) for frame in (frames // 5, frames // 3, frames // 2)])
    for _ in range(3):
        client.do("undo")
    client.do("run")
    found["round_1_s"] = client.wait()
    found["scrub"] = summary(scrub(True))
    client.do("scribble", frame=frames // 2, object=0, path=[[0.05, 0.05], [0.3, 0.05]])
    client.do("run")
    during = scrub(True, spread[::6])
    # the requests are part of the round's time
    found |= {"scrub_during_a_round": summary(during), "round_2_s": client.wait() + sum(during)}
    return found


def main(words: Sequence[str] | None = None) -> int:
    parser = options(__doc__)
    parser.add_argument("--video", type=Path, required=True)
    parser.add_argument("--at", type=float, nargs=2, default=(0.5, 0.5), help="a point of the object, from 0 to 1")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    model = STM.load(DEFAULT_INTERACTIVE_WEIGHTS, device=arguments.device)
    found: dict[str, Any] = {}
    try:
        begun = time.perf_counter()
        footage = Footage(arguments.video, MAX_FRAMES)
        found["open_s"] = time.perf_counter() - begun
    except (OSError, ValueError) as error:
        print(f"interactive: {error}", file=sys.stderr)
        return 2
    size = chosen_side(None, DEFAULT_INTERACTIVE_WEIGHTS, footage.size)
    workbench = Workbench(
        footage,
        lambda footage: ScribbleSession(model, footage.frames, size=size),
        STM.load,
        most_frames=MAX_FRAMES,
        upload_bytes=2**30,
    )
    # as the command does it: while the user looks at the video
    threading.Thread(target=workbench.warm_up, daemon=True).start()
    client, frames = Client(make_app(workbench), headers={"x-stm-tab": "bench"}), len(footage.frames)
    client.do("enter")
    found |= {"frames": frames, "size": list(footage.size), "network_size": size}
    found |= measure(client, frames, arguments.at) | {"encoded_frames": workbench.session.encoded_frames}
    client.do("leave")
    found["peak_memory_bytes"] = Peak("cpu").read()
    print(json.dumps(found, indent=1))
    write_json(describe(arguments.device) | found, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
