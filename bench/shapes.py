"""What a frame costs with networks of several shapes: python bench/shapes.py FILE[:SIZE] … [--out FILE]

Trackers of these weights side by side, in alternation in one process: the same clip of 480×854, so many remembered
frames, none remembered meanwhile, no files. FILE may be `default`, the weights in the package; SIZE is the shorter side
at which the network runs, as in `stm track --size`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

# a checkout that nobody installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import alternate, at_least, describe, options, table, write_json
from stm_model import STM, Tracker
from stm_model.data.synthetic import procedural_clip
from stm_model.tracking.budget import MemoryRule

SIZE = (480, 854)


def measure(networks: dict[str, tuple[STM, int | None]], objects: int, remembered: int, repeats: int) -> dict[str, Any]:
    """Seconds of a tracked frame by each network at its size."""
    frames, labels = procedural_clip(remembered + 1, SIZE, objects, seed=0)
    memory = MemoryRule(kept=frozenset(range(remembered)), first=True, previous=False)
    steps, device = {}, "cpu"
    for name, (model, size) in networks.items():
        track = Tracker(model, memory=memory, size=size, spacing=1).track(itertools.cycle(frames), {0: labels[0]})
        for _ in range(remembered):
            next(track)
        steps[name], device = partial(next, track), next(model.parameters()).device.type
    return {"objects": objects, "memory_frames": remembered, "seconds": alternate(steps, repeats, device)}


def shown(found: dict[str, Any]) -> str:
    """What was measured as a table; the first network is what the others are compared with."""
    medians = {name: each["median"] for name, each in found["seconds"].items()}
    first = next(iter(medians.values()))
    rows = [(name, seconds * 1e3, seconds / first) for name, seconds in medians.items()]
    return table((f"{found['objects']} objects, {found['memory_frames']} remembered", "ms", "of the first"), rows)


def file_and_size(word: str) -> tuple[str, int | None]:
    """`FILE` or `FILE:SIZE`."""
    name, _, size = word.rpartition(":")
    return (name, at_least(16)(size)) if name and size.isdigit() else (word, None)


def main(words: Sequence[str] | None = None) -> int:
    parser = options(__doc__, repeats=25, threads=1)
    parser.add_argument("weights", type=file_and_size, nargs="+", metavar="FILE[:SIZE]")
    parser.add_argument("--objects", type=at_least(1), nargs="+", default=[1, 2, 5])
    parser.add_argument("--frames", type=at_least(1), default=5, help="remembered; default: %(default)s")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    networks = {}
    for name, size in arguments.weights:
        try:
            model = STM.load(None if name == "default" else name, arguments.device)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        networks[f"{name}:{size}" if size else name] = (model, size)
    report = describe(arguments.device) | {"frame": SIZE, "dtype": model.dtype_name, "rows": []}
    for objects in arguments.objects:
        report["rows"].append(measure(networks, objects, arguments.frames, arguments.repeats))
        print(shown(report["rows"][-1]), flush=True)
        write_json(report, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
