"""What reads that leave positions out cost and save as the memory grows: which one should track?

    python bench/choices.py IMAGES MASKS [--frames 5 20 100 1000] [--scored 6] [--out FILE]

Two folders of a video, its frames and the true masks of one object. The memory are frames of its first three quarters
with their true masks, in an order that is drawn; where they are not enough they come again and again, shifted and
darker or lighter. The next frames are segmented by every read in turn, each of which sees its own last mask: seconds of
the processor a read, the bytes it takes beyond the memory's, J and F.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

# a checkout that nobody installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import MIB, at_least, clock, describe, options, table, write_json
from bench.read import CHOICES
from stm_kernels import PagedMemory
from stm_kernels.testing import extra_memory
from stm_model import STM, Tracker
from stm_model.evaluation.metrics import contour_accuracy, region_similarity
from stm_model.io.masks import read_mask
from stm_model.io.video import open_video
from stm_model.tracking.frames import pad_to_stride, prepare_frame

SHIFT = 24
"""Pixels by which a frame that is shown again is shifted at most."""
Picture = tuple[Tensor, Tensor]
"""A frame `[1, 3, H, W]` in 0…1 and the object's true mask `[1, H, W]`, float32, both padded."""


def load(images: Path, masks: Path) -> list[Picture]:
    """All frames of the video, at its own size.

    Raises:
        ValueError: a folder cannot be read, or the two do not fit together.
    """
    frames, files = [*open_video(images)], sorted(masks.glob("*.png"))
    if len(files) != len(frames) or len(frames) < 12:
        raise ValueError(f"{masks}: expected a mask of each of 12 or more frames, got {len(files)} of {len(frames)}")
    pictures = []
    for frame, file in zip(frames, files):
        image = prepare_frame(frame, frame.shape[:2], torch.device("cpu"))
        mask = torch.from_numpy(read_mask(file) == 1)[None].float()
        pictures.append((pad_to_stride(image)[0], pad_to_stride(mask)[0]))
    return pictures


def again(pictures: Sequence[Picture]) -> Iterator[Picture]:
    """The pictures in a drawn order without end, changed from the second pass on."""
    generator = np.random.default_rng(0)
    for turn in itertools.count():
        for place in generator.permutation(len(pictures)):
            image, mask = pictures[place]
            if turn:
                shifts = tuple(generator.integers(-SHIFT, SHIFT + 1, 2).tolist())
                image = (image * generator.uniform(0.8, 1.2)).clamp(0, 1).roll(shifts, (2, 3))
                mask = mask.roll(shifts, (1, 2))
            yield image, mask


def measure(
    model: STM, pictures: Sequence[Picture], counts: Sequence[int], scored: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every read at each number of remembered frames, in one growing memory."""
    first = len(pictures) * 3 // 4
    asked = pictures[first : first + scored]
    queries = [model.encode_query(image) for image, _ in asked]
    memory = PagedMemory(1, model.config.key_channels, model.config.value_channels)
    remembered = itertools.islice(again(pictures[:first]), max(counts))
    for count, (image, mask) in enumerate(tqdm(remembered, "remember", max(counts), unit="frame", delay=1), 1):
        query = model.encode_query(image)
        key, value = model.memorize(query if model.shares_keys else image, mask, torch.zeros_like(mask), [1])
        memory.append(key.flatten(2).mT, value.flatten(2).mT)
        if count in counts:
            yield count, compare(model, memory, queries, pictures[first - 1][1], asked)


def compare(
    model: STM, memory: PagedMemory, queries: Sequence[Any], before: Tensor, asked: Sequence[Picture]
) -> dict[str, Any]:
    """Every read of one memory. `before` is the true mask of the frame before the first that is segmented."""
    found: dict[str, Any] = {name: {"seconds": [], "J": [], "F": []} for name in CHOICES}
    masks = dict.fromkeys(CHOICES, before)
    for query, (_, truth) in zip(queries, asked):
        key = query.key.flatten(2).mT
        for name, choice in CHOICES.items():
            start = clock("cpu")
            out = memory.read(key, similarity=model.config.similarity, **choice)
            found[name]["seconds"].append(clock("cpu") - start)
            readout = out.mT.unflatten(2, query.key.shape[2:]).contiguous(memory_format=torch.channels_last)
            masks[name] = model.segment(readout, query, [1], (masks[name], torch.zeros_like(before))).float()
            seen, true = (tensor[0].numpy() > 0.5 for tensor in (masks[name], truth))
            found[name]["J"].append(region_similarity(seen, true))
            found[name]["F"].append(contour_accuracy(seen, true))
    key = queries[0].key.flatten(2).mT
    return {
        name: {what: mean(values) for what, values in cell.items()}
        | {
            "extra_bytes": extra_memory(
                lambda name=name: memory.read(key, similarity=model.config.similarity, **CHOICES[name])
            ),
            "memory_bytes": memory.device_nbytes,
        }
        for name, cell in found.items()
    }


@torch.inference_mode()
def main(words: Sequence[str] | None = None) -> int:
    parser = options(__doc__, threads=1)
    parser.add_argument("images", type=Path)
    parser.add_argument("masks", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="weights; default: those of the package")
    parser.add_argument("--frames", type=at_least(1), nargs="+", default=[5, 20, 100, 1000], help="remembered")
    parser.add_argument("--scored", type=at_least(1), default=6, help="frames segmented at each; default: %(default)s")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    try:
        pictures = load(arguments.images, arguments.masks)
        model = Tracker(STM.load(arguments.checkpoint, dtype=torch.float32)).model
    except (ValueError, OSError) as error:
        parser.error(str(error))
    report = describe("cpu") | {"video": arguments.images.name, "scored": arguments.scored, "frames": {}}
    for count, found in measure(model, pictures, arguments.frames, arguments.scored):
        report["frames"][count] = found
        rows = [
            (name, cell["seconds"], found["exact"]["seconds"] / cell["seconds"], cell["J"], cell["F"])
            + (cell["extra_bytes"] / MIB, cell["memory_bytes"] / MIB)
            for name, cell in found.items()
        ]
        print(table((f"{count} frames", "seconds", "times exact", "J", "F", "extra MiB", "memory MiB"), rows))
        write_json(report, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
