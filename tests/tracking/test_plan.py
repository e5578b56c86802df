"""What a video will take, said beforehand: it is what is taken, and a budget that it accepts is enough."""

import re

import numpy as np
import pytest

from stm_model import Tracker
from stm_model.tracking.budget import MemoryBudget, MemoryPlan, MemoryRule, parse_size, plan_memory

PAGE = 128 * (16 + 32) * 4
"""Bytes of a page of one object; of the 5 × 6 positions of a frame it holds a little more than four frames."""
LONG = 12


@pytest.fixture(scope="module")
def video(clip):
    frames, labels = clip
    order = [*range(8), *reversed(range(4, 8))]
    return frames[order], labels[order]


def masks_of(labels, given: dict[int, tuple[int, ...]]) -> dict[int, np.ndarray]:
    return {index: np.where(np.isin(labels[index], objects), labels[index], 0) for index, objects in given.items()}


GIVEN = {
    "one mask": {0: (1, 2)},
    "an object enters later": {0: (1,), 5: (2,)},
    "objects enter when nearly all is over": {0: (1,), LONG - 2: (2,)},
    "an object enters with the last frame": {0: (1,), LONG - 1: (2,)},
    "masks that fill a page but for the previous frame": dict.fromkeys(range(0, 8, 2), (1, 2)),
    "many masks": dict.fromkeys(range(0, 10, 2), (1, 2)),
    "the last remembered frames are given": {0: (1,), LONG - 3: (1,), LONG - 2: (1,)},
    "the last remembered frames are given and fill a page": {0: (1,)} | dict.fromkeys(range(LONG - 4, LONG - 1), (1,)),
    "masks of one object, then of the other": {0: (1,), 1: (1,), 2: (1,), 3: (1, 2), 4: (1,), 9: (2,)},
}


def track(model, video, given, budget, rule):
    frames, labels = video
    tracker = Tracker(model, memory=rule, budget=MemoryBudget(device=budget))
    return tracker, list(tracker.track(frames, masks_of(labels, given)))


@pytest.mark.parametrize("rule", ["every:1", "first", "previous"])
@pytest.mark.parametrize("case", GIVEN)
def test_the_least_budget_is_enough_and_no_less_is(small_model, video, case, rule):
    labels, given = video[1], GIVEN[case]
    plan = Tracker(small_model, memory=rule, budget=MemoryBudget(device=0)).plan
    with pytest.raises(ValueError, match="memory budget: expected at least .* for . objects and the frames") as caught:
        plan(labels[0].shape, LONG, masks_of(labels, given))
    least = parse_size(re.search(r"at least (\S+ \S+) for", str(caught.value))[1])
    assert least > 0 and least % PAGE == 0
    tracker, results = track(small_model, video, given, least, rule)
    assert len(results) == LONG and tracker.bank.most["device"] <= least
    tracker.plan(labels[0].shape, LONG, masks_of(labels, given))
    with pytest.raises(ValueError, match="memory budget: expected at least"):
        Tracker(small_model, memory=rule, budget=MemoryBudget(device=least - 1)).plan(
            labels[0].shape, LONG, masks_of(labels, given)
        )
    with pytest.raises(ValueError, match="memory budget: expected at least"):
        track(small_model, video, given, least - 1, rule)


def test_the_least_budget_counts_with_its_own_larger_pages():
    """1400 frames of 30 positions fill 329 pages of 128, and 33 of the 1280 that such a budget has: more is needed."""
    masks = dict.fromkeys(range(1400), np.ones((80, 96), np.uint8))

    def plan(device: int) -> MemoryPlan:
        rule, size = MemoryRule.parse("first"), (80, 96)
        return plan_memory(rule, MemoryBudget(device), masks, 1402, size, lambda objects: 16 * objects)

    least = 33 * 1280 * 16
    with pytest.raises(ValueError, match=f"at least {least / 2**10:.1f} KiB for 1 objects"):
        plan(0)
    assert plan(least).held == 33 * 1280 // 30
    with pytest.raises(ValueError, match="memory budget: expected at least"):
        plan(least - 1)


def test_a_budget_between_two_pages_is_what_its_whole_pages_hold(small_model, video):
    """Two frames' bytes are less than a page: such a budget would be refused at the second frame."""
    labels = video[1]
    two_frames = 2 * 30 * 2 * (16 + 32) * 4
    assert two_frames < 2 * PAGE
    budget = MemoryBudget(device=two_frames)
    with pytest.raises(ValueError, match="expected at least 48.0 KiB for 2 objects"):
        Tracker(small_model, budget=budget).plan(labels[0].shape, LONG, {0: labels[0]})
    # two pages of two objects: 256 positions, eight frames of 30
    budget = MemoryBudget(device=2 * 2 * PAGE + 1000, host=2 * PAGE - 2024, eviction="fifo")
    tracker = Tracker(small_model, memory="every:1", budget=budget)
    plan = tracker.plan(labels[0].shape, LONG, {0: labels[0]})
    assert str(plan).endswith("the budget of 143.0 KiB holds about 8 of them")
    for _ in tracker.track(video[0], {0: labels[0]}):
        pass
    assert len(tracker.bank.memories[0].frames) == 8
