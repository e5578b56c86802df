"""What forgetting costs: J on real clips by eviction rule, beside everything kept."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path

import torch

from bench.workers import Result, Task
from stm_model import STM, Tracker
from stm_model.data.davis import davis_videos
from stm_model.evaluation.metrics import sequence_scores
from stm_model.network import STRIDE
from stm_model.network.weights import DEFAULT_WEIGHTS_SIZE
from stm_model.tracking.budget import EVICTIONS, MemoryBudget, budget_page
from stm_model.tracking.tracker import network_size

BUDGET_FRAMES = (5, 10)
RULES = ("every:1", "every:5")


def eviction_tasks(data: Path | None, split: str, device: torch.device, quick: bool) -> dict[str, Task]:
    """Each memory rule with everything kept, and with every eviction at every budget."""
    rules, counts = (RULES[:1], (3,)) if quick else (RULES, BUDGET_FRAMES)
    choices = [(None, None), *((eviction, count) for count in counts for eviction in EVICTIONS)]
    return {
        f"{rule}, {f'{eviction}, {count} frames' if eviction else 'everything kept'}": partial(
            eviction_score, data, split, rule, eviction, count, device
        )
        for rule in rules
        for eviction, count in choices
    }


def eviction_score(
    data: Path | None, split: str, rule: str, eviction: str | None, count: int | None, device: torch.device
) -> Result:
    """Mean J of the default weights over the videos of a split, with a budget of so many frames."""
    if data is None or not data.is_dir():
        return {"skipped": "no clips: --data names a folder in the DAVIS layout"}
    model, scores, evicted, most = STM.load(device=device), {}, 0, 0
    for sequence in davis_videos(data, split):
        frames, truths = sequence.load()
        budget = None
        if eviction:
            budget = MemoryBudget(device=budget_bytes(model, frames[0].shape[:2], count), eviction=eviction)
        tracker = Tracker(model, memory=rule, size=min(DEFAULT_WEIGHTS_SIZE, *frames[0].shape[:2]), budget=budget)
        labels = []
        for result in tracker.track(frames, {0: truths[0]}):
            labels.append(result.labels)
            most = max([most, *(len(memory.frames) for memory in tracker.bank.memories)])
        scores[sequence.name] = statistics.mean(j for j, _ in sequence_scores(labels, truths).values())
        evicted += tracker.bank.evicted
    found = {"rule": rule, "eviction": eviction, "budget_frames": count, "J": statistics.mean(scores.values())}
    return found | {"J_by_sequence": scores, "most_frames_in_memory": most, "evicted": evicted}


def budget_bytes(model: STM, frame_size: tuple[int, int], count: int) -> int:
    """Bytes of the pages that hold so many frames of one object."""
    height, width = (-(-side // STRIDE) for side in network_size(frame_size, min(DEFAULT_WEIGHTS_SIZE, *frame_size)))
    page = budget_page(0, height * width, 1)
    pages = -(-count * height * width // page)
    position = model.config.key_channels + model.config.value_channels
    return pages * page * position * next(model.parameters()).dtype.itemsize
