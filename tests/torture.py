"""Kill runs at random moments, resume them until they are done, and compare with runs that nothing stopped.

By hand: `make torture`, some minutes; `ARGS="--seed 3 --kills 5"` picks others. The exit code is 1 if anything
differed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from layouts import write_davis

from stm_model.data.aquarium import aquarium_clip
from stm_model.io.masks import write_mask
from stm_model.io.video import VideoWriter

FRAMES, SIZE = 24, (120, 208)
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TIMES = {"seconds", "fps", "peak_memory_bytes", "settings", "files", "speed", "command"}
"""What differs between runs that do the same."""


class Case:
    """A command that writes to a folder, which comes last, and can be run again to go on."""

    def __init__(self, name: str, command: list[str], again: list[str], result: Callable[[Path], dict[str, Any]]):
        self.name, self.command, self.again, self.result = name, command, again, result

    def start(self, out: Path, again: bool = False) -> subprocess.Popen:
        arguments = [*self.command, *(self.again if again else []), "--out", str(out)]
        return subprocess.Popen(
            [sys.executable, "-m", "stm_model", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def undisturbed(self, out: Path) -> float:
        """Run it whole; the seconds it took."""
        started, process = time.monotonic(), self.start(out)
        _, err = process.communicate()
        if process.returncode:
            sys.exit(f"{self.name}: fails undisturbed: {err}")
        return time.monotonic() - started

    def disturbed(self, out: Path, seconds: float, dice: random.Random) -> list[str]:
        """Stop it up to three times, each time at a random moment, and let it end; how it was stopped."""
        stops: list[str] = []
        while True:
            process = self.start(out, again=bool(stops))
            if len(stops) < 3 and (not stops or dice.random() < 0.7):
                moment, how = dice.uniform(0.3, 1.0) * seconds, dice.choice(SIGNALS)
                try:
                    process.wait(moment)
                except subprocess.TimeoutExpired:
                    process.send_signal(how)
                    stops.append(f"{how.name} after {moment:.1f} s")
                    process.communicate()
                    continue
            _, err = process.communicate()
            if process.returncode:
                stops.append(f"FAILED: {err.strip().splitlines()[-1] if err.strip() else process.returncode}")
            return stops


def tracked(out: Path) -> dict[str, Any]:
    """Masks and formats by name, and what the summary says besides times."""
    summary = json.loads((out / "summary.json").read_text())
    found: dict[str, Any] = {name: value for name, value in summary.items() if name not in TIMES}
    return found | {
        str(file.relative_to(out)): file.read_bytes()
        for file in sorted(out.rglob("*"))
        if file.is_file() and file.name != "summary.json"
    }


def evaluated(out: Path) -> dict[str, Any]:
    written = json.loads((out / "evaluation.json").read_text())
    return {"scores": written["scores"]} | {
        str(file.relative_to(out)): file.read_bytes() for file in sorted((out / "masks").rglob("*.png"))
    }


def trained(out: Path) -> dict[str, Any]:
    return {"weights": (out / "weights.safetensors").read_bytes()}


def cases(data: Path) -> list[Case]:
    """The commands, on a clip of fish that is written to a folder."""
    frames, labels = aquarium_clip(frames=FRAMES, size=SIZE)
    with VideoWriter(data / "clip.mp4") as writer:
        for frame in frames:
            writer.write(frame)
    (data / "masks").mkdir()
    write_mask(data / "masks" / "00000.png", labels[0])
    write_mask(data / "masks" / "00015.png", labels[15])
    davis = write_davis(data / "DAVIS", {"one": (frames, labels), "two": (frames[::-1], labels[::-1])})
    track = [
        "track",
        str(data / "clip.mp4"),
        "--size",
        "120",
        "--dtype",
        "float32",
        "--save-every",
        "0.2",
        "--no-overlay",
    ]
    score = ["evaluate", "--dataset", "davis2017", "--data", str(davis), "--size", "120", "--dtype", "float32"]
    train = ["train", "--preset", "smoke", "--steps", "24", "--crop", "64", "--save-every", "3", "--dtype", "float32"]
    return [
        Case("track", [*track, "--mask", str(data / "masks" / "00000.png"), "--export", "coco"], ["--resume"], tracked),
        Case("track both ways", [*track, "--mask", str(data / "masks"), "--both-ways"], ["--resume"], tracked),
        Case("evaluate", [*score, "--no-report", "--workers", "1"], ["--resume"], evaluated),
        Case("train", [*train, "--picture-every", "0", "--workers", "0"], [], trained),
    ]


def two_at_once(case: Case, folder: Path, whole: dict[str, Any]) -> str:
    """A second run into one folder is refused, and the first is none the worse."""
    first, deadline = case.start(folder), time.monotonic() + 60
    while not (folder / ".lock").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    second = case.start(folder)
    _, err = second.communicate()
    first.communicate()
    if second.returncode != 2 or "another run writes there" not in err:
        return f"the second: exit code {second.returncode}, {err.strip()!r}"
    return differing(whole, case.result(folder))


def differing(whole: dict[str, Any], found: dict[str, Any]) -> str:
    """What differs, by name; empty if nothing does."""
    return ", ".join(name for name in sorted(whole.keys() | found.keys()) if whole.get(name) != found.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="runs that are stopped, over all commands")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    dice, wrong = random.Random(arguments.seed), 0
    print(f"seed {arguments.seed}")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        all_cases = cases(data)
        # tracking is what people run for hours
        shares = (0.4, 0.3, 0.15, 0.15)
        for case, share in zip(all_cases, shares):
            unbroken = data / f"{case.name} unbroken"
            seconds = case.undisturbed(unbroken)
            whole = case.result(unbroken)
            for turn in range(max(1, round(share * arguments.kills))):
                out = data / f"{case.name} {turn}"
                stops = case.disturbed(out, seconds, dice)
                differs = differing(whole, case.result(out)) if "FAILED" not in " ".join(stops) else "no result"
                wrong += bool(differs)
                print(f"{case.name}: {'; '.join(stops) or 'ended before'}: {differs or 'the same'}", flush=True)
            if case.name == "track":
                differs = two_at_once(case, data / "two at once", whole)
                wrong += bool(differs)
                print(f"two at once: {differs or 'the second refused, the first the same'}", flush=True)
    print(f"{wrong} differed" if wrong else "all the same")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
