"""One long video under a budget: does `stm track` hold the same, and take the same, at its end as at its beginning?

The command itself runs, decoding, tracking and writing, and is watched from outside: what its process holds, the time
it had on the processor, and when each mask was written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bench.machine import ROOT
from bench.workers import Result
from stm_model import STM, STMConfig
from stm_model.data.synthetic import procedural_clip
from stm_model.network.weights import write_tensors
from stm_model.training.state import initialize

SAMPLE_SECONDS = 0.2
TRACE_POINTS = 200
TICKS = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class LongVideo:
    """A clip that is played forwards and backwards in turn, as one continuous video, and how it is tracked."""

    frames: int = 10_000
    """Length of the video."""
    early: int = 500
    """The frame from which on early ones are compared with the last ones; the budget should be full by then."""
    window: int = 100
    """Frames compared, early and late."""
    clip: int = 48
    """Length of the clip."""
    size: tuple[int, int] = (96, 96)
    """Height and width in pixels."""
    objects: int = 6
    """With these, keys and values of a frame are so large that the budget is full before the early frames."""
    seed: int = 7
    """Of the clip; in this one all objects are seen from the first frame on."""
    budget: str = "256MiB"
    """For what is remembered."""
    memory: str = "every:1"
    """Which frames are remembered."""
    key_channels: int = 128
    """C, as in the released network."""
    value_channels: int = 512
    """V, likewise."""

    @property
    def windows(self) -> dict[str, range]:
        """The frames compared."""
        late = range(self.frames - self.window, self.frames)
        return {"early": range(self.early, self.early + self.window), "late": late}

    def indices(self) -> Iterator[int]:
        """Of the clip's frames, in the order of the video: the first and the last are not shown twice in a row."""
        there_and_back = [*range(self.clip), *range(self.clip - 2, 0, -1)]
        for index in range(self.frames):
            yield there_and_back[index % len(there_and_back)]


def track_long_video(video: LongVideo, device: torch.device, threads: int) -> Result:
    """Track a long video by the command line, and what its process held and took over time."""
    with tempfile.TemporaryDirectory() as folder:
        command = prepare(video, Path(folder), device)
        samples, code, words = watch(command, Path(folder) / "out" / "masks", video.frames, threads)
        if code:
            return {"failed": f"stm track ended with code {code}: {words}"}
        written = [mask.stat().st_mtime for mask in sorted((Path(folder) / "out" / "masks").glob("*.png"))]
        summary = json.loads((Path(folder) / "out" / "summary.json").read_text())
    return {
        "video": asdict(video),
        "options": command[command.index("--memory") :],
        "threads": threads,
        "windows": {name: [window.start, window.stop] for name, window in video.windows.items()},
        **figures(video, samples, written),
        "memory": summary["memory"],
        # with one frame remembered at every step, those that were not evicted are those that the budget holds
        "full_after_frames": video.frames - 1 - summary["memory"]["evicted"],
    }


def prepare(video: LongVideo, folder: Path, device: torch.device) -> list[str]:
    """Write the video, its mask and a network; the command that tracks it."""
    from stm_model.io.images import write_mask
    from stm_model.io.video import VideoWriter

    frames, labels = procedural_clip(video.clip, video.size, video.objects, video.seed)
    with VideoWriter(folder / "video.mp4") as writer:
        for index in tqdm(video.indices(), desc="write the video", unit="frame", total=video.frames, delay=1):
            writer.write(frames[index])
    write_mask(folder / "mask.png", labels[0])
    torch.manual_seed(0)
    # time and memory do not depend on the weights
    network = STM(STMConfig("resnet18", video.key_channels, video.value_channels, decoder_channels=64))
    initialize(network)
    write_tensors(network.state_dict(), folder / "network.safetensors")
    paths = {"--mask": "mask.png", "--out": "out", "--checkpoint": "network.safetensors"}
    command = [sys.executable, "-m", "stm_model", "track", str(folder / "video.mp4")]
    command += [word for option, name in paths.items() for word in (option, str(folder / name))]
    command += ["--memory", video.memory, "--memory-budget", video.budget, "--dtype", "float32"]
    return [*command, "--device", str(device)]


@dataclass(frozen=True)
class Sample:
    """A look at a process from outside."""

    frames: int
    """Masks written so far."""
    held: int
    """Bytes that the process holds."""
    processor: float
    """Seconds that its threads had on the processor."""


def watch(command: list[str], masks: Path, frames: int, threads: int) -> tuple[list[Sample], int, str]:
    """Run a command and look at it again and again; its exit code, and the last line of what it said if it failed."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    samples: list[Sample] = []
    with tempfile.TemporaryFile("w+") as said, tqdm(total=frames, desc="track", unit="frame") as bar:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=said)
        try:
            while process.poll() is None:
                count = samples[-1].frames if samples else 0
                while (masks / f"{count:05d}.png").exists():
                    count += 1
                if (sample := look(process.pid, count)) is not None:
                    samples.append(sample)
                bar.update(count - bar.n)
                time.sleep(SAMPLE_SECONDS)
        finally:
            process.kill()
            process.wait()
        said.seek(0)
        return samples, process.returncode, (said.read().strip().splitlines() or [""])[-1]


def look(process: int, frames: int) -> Sample | None:
    """What a process holds and took so far; None when it has ended."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        # behind the name in brackets, which may hold spaces
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError):
        return None
    return Sample(frames, pages * PAGE_BYTES, (int(fields[11]) + int(fields[12])) / TICKS) if pages else None


def figures(video: LongVideo, samples: list[Sample], written: list[float]) -> dict[str, Any]:
    """Bytes held and seconds a frame, early and late, and a trace of both."""
    # the first look after each frame: before the first one the command starts, behind the last one it ends
    first = {sample.frames: sample for sample in reversed(samples) if sample.frames}
    counts = sorted(first)
    over_frames = [
        np.interp(np.arange(video.frames + 1), counts, [getattr(first[count], name) for count in counts])
        for name in ("held", "processor")
    ]
    seconds, (bytes_held, spent) = np.diff(written), over_frames
    held: dict[str, float] = {}
    wall: dict[str, float] = {}
    processor: dict[str, float] = {}
    for name, window in video.windows.items():
        held[name] = float(np.median(bytes_held[window.start + 1 : window.stop + 1]))
        # between the masks of a frame and the one before
        wall[name] = float(np.median(seconds[window.start - 1 : window.stop - 1]))
        processor[name] = float(spent[window.stop] - spent[window.start]) / len(window)
    most = max(sample.held for sample in samples if sample.frames >= video.windows["early"].start)
    return {
        "held_bytes": held | {"most": most},
        "held_growth": held["late"] / held["early"] - 1,
        "most_growth": most / held["early"] - 1,
        "frame_seconds": wall,
        "frame_processor_seconds": processor,
        "time_ratio": wall["late"] / wall["early"],
        "processor_ratio": processor["late"] / processor["early"],
        "trace": trace(video, bytes_held, seconds, spent),
    }


def trace(video: LongVideo, held: np.ndarray, seconds: np.ndarray, spent: np.ndarray) -> list[dict[str, float]]:
    """By stretches of the video: bytes held at the end, median seconds a frame, processor seconds a frame."""
    edges = np.linspace(0, video.frames, min(TRACE_POINTS, video.frames // 2) + 1).astype(int).tolist()
    return [
        {
            "frame": stop,
            "held_bytes": float(held[stop]),
            "seconds": float(np.median(seconds[max(0, start - 1) : stop - 1])),
            "processor_seconds": float(spent[stop] - spent[start]) / (stop - start),
        }
        for start, stop in zip(edges, edges[1:])
    ]
