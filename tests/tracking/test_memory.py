"""The memories of a video within a budget."""

import gc

import numpy as np
import pytest
import torch

from stm_kernels import memory_usage
from stm_model import Tracker
from stm_model.tracking.budget import MemoryBudget, MemoryRule, budget_page, format_size, parse_size
from stm_model.tracking.memory import USAGE_DECAY, MemoryBank

C, V, SIDE = 4, 6, 3
FRAME = 128 * (C + V) * 4
"""Bytes of a page of 128 positions, which holds one frame of 3 × 3."""


def frame(index: int, objects: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    return tuple(torch.randn(objects, channels, SIDE, SIDE, generator=generator) for channels in (C, V))


def filled(budget: MemoryBudget, frames: int, rule: str = "every:1", objects: int = 1, **options) -> MemoryBank:
    bank = MemoryBank(MemoryRule.parse(rule), budget, **options)
    bank.add_objects(objects)
    for index in range(frames):
        remember(bank, index, [index == 0] * objects)
    return bank


def remember(bank: MemoryBank, index: int, given: list[bool]) -> None:
    bank.remember(index, bank.wanted(index, given, [True] * len(given)), *frame(index, len(given)))


def held(bank: MemoryBank) -> list[list[int]]:
    return [sorted(entry.index for entry in memory.frames) for memory in bank.memories]


def test_without_a_budget_everything_is_kept():
    bank = filled(MemoryBudget(), 300)
    assert held(bank) == [list(range(300))] and bank.evicted == 0


def test_first_in_first_out():
    # 9 positions a frame: 14 frames in a page, 28 in two
    bank = filled(MemoryBudget(device=2 * FRAME), 60)
    assert held(bank) == [[0, *range(33, 60)]]
    assert bank.evicted == 60 - 28
    assert bank.most == {"device": 2 * FRAME, "host": 0}


def test_what_is_read_is_what_is_held():
    bank = filled(MemoryBudget(device=FRAME), 40)
    (indices,) = held(bank)
    assert len(indices) == 14
    keys, values = (torch.cat([frame(index)[i].flatten(2) for index in indices], 2).mT for i in (0, 1))
    query_key = frame(99)[0]
    expected = torch.softmax(query_key.flatten(2).mT @ keys.mT * C**-0.5, -1) @ values
    torch.testing.assert_close(bank.read(query_key)[0].flatten(2).mT, expected)


def test_importance_keeps_what_is_read():
    bank = MemoryBank(MemoryRule.parse("every:1"), MemoryBudget(device=FRAME, eviction="importance"))
    bank.add_objects(1)
    asked = 5
    for index in range(40):
        remember(bank, index, [index == 0])
        # queries like the keys of one frame read that frame
        bank.read(frame(asked)[0] * 20)
        assert asked in held(bank)[0] or index < asked
    assert 0 in held(bank)[0] and 39 in held(bank)[0]
    fifo = filled(MemoryBudget(device=FRAME), 40)
    assert asked not in held(fifo)[0]


def test_use_is_the_share_of_the_reads_weight():
    bank = filled(MemoryBudget(device=10 * FRAME, eviction="importance"), 5, objects=2)
    query_key = frame(50)[0]
    bank.read(query_key)
    queries = query_key.flatten(2).mT.expand(2, -1, -1)
    keys = torch.cat([frame(index, 2)[0].flatten(2) for index in range(5)], 2).mT
    usage = memory_usage(queries, keys, implementation="reference").sum(0).unflatten(0, (5, 9)).sum(1)
    used = torch.tensor([entry.used for entry in bank.memories[0].frames])
    torch.testing.assert_close(used, usage / usage.sum())


def test_use_is_decayed_from_read_to_read():
    bank = filled(MemoryBudget(device=10 * FRAME, eviction="importance"), 3)
    expected = torch.zeros(3)
    for seed in (50, 51, 52):
        query_key = frame(seed)[0]
        bank.read(query_key)
        keys = torch.cat([frame(index)[0].flatten(2) for index in range(3)], 2).mT
        usage = memory_usage(query_key.flatten(2).mT, keys, implementation="reference").unflatten(1, (3, 9)).sum((0, 2))
        expected = expected * USAGE_DECAY + usage / usage.sum()
    torch.testing.assert_close(torch.tensor([entry.used for entry in bank.memories[0].frames]), expected)
    reads = [entry.reads for entry in bank.memories[0].frames]
    assert reads == [pytest.approx(1 + USAGE_DECAY + USAGE_DECAY**2)] * 3
    # a frame that came late is judged by the reads since
    remember(bank, 3, [False])
    bank.read(frame(53)[0])
    late = bank.memories[0].frames[3]
    assert late.reads == 1 and late.importance == late.used


def test_familiarity_is_the_log_of_the_mean_exponential_similarity():
    for count in (1, 2, 7):
        bank = filled(MemoryBudget(), count, objects=2)
        query_key = frame(50)[0]
        keys = torch.cat([frame(index, 2)[0].flatten(2) for index in range(count)], 2).double()
        similarity = query_key.flatten(2).mT.double() @ keys * C**-0.5
        expected = similarity.exp().mean(2).log().unflatten(1, (SIDE, SIDE))
        torch.testing.assert_close(bank.read(query_key)[1], expected.float())


RULE = MemoryRule(kept=1, first=True, previous=False)
"""Wants no frame for being the previous one."""


@pytest.mark.parametrize(
    "rule, index, given, certain, kept",
    [
        # a mask of one of two objects is enough, whether or not the other is certain
        ("first", 3, [True, False], [True, True], True),
        ("first", 3, [False, False], [True, True], None),
        (RULE, 3, [False, False], [True, True], True),
        (RULE, 3, [False, False], [True, False], None),
        (RULE, 3, [False, True], [True, False], True),
        ("every:5", 5, [False, False], [True, False], False),
        ("every:5", 4, [False, False], [True, True], False),
        ("previous", 0, [True, True], [True, True], False),
    ],
)
def test_which_frames_enter_and_which_of_them_stay(rule, index, given, certain, kept):
    bank = MemoryBank(MemoryRule.parse(rule) if isinstance(rule, str) else rule, MemoryBudget())
    bank.add_objects(2)
    entries = bank.wanted(index, given, certain)
    assert [entry.kept for entry in entries] == ([] if kept is None else [kept])
    if entries:
        bank.remember(index, entries, *frame(index, 2))
        assert [entry.given for entry in bank.memories[0].frames] == [any(given)]
        bank.wanted(index + 1, [False] * 2, [True] * 2)
        assert len(bank.memories[0].frames) == kept


def test_every_memory_asks_for_its_own_objects():
    bank = MemoryBank(MemoryRule.parse("first"), MemoryBudget())
    bank.add_objects(1)
    bank.add_objects(2)
    (entry,) = bank.wanted(3, [False, False, True], [True] * 3)
    assert entry.memory is bank.memories[1] and entry.part == slice(1, 3) and entry.given


@pytest.mark.parametrize("eviction", ["fifo", "importance"])
def test_given_masks_stay(eviction):
    bank = MemoryBank(MemoryRule.parse("every:1"), MemoryBudget(device=FRAME, eviction=eviction))
    bank.add_objects(1)
    given = {0, 7, 21}
    for index in range(50):
        remember(bank, index, [index in given])
        bank.read(frame(index)[0])
    assert given <= set(held(bank)[0])


@pytest.mark.parametrize("host", [0, 3])
def test_objects_share_one_budget(host):
    bank = filled(MemoryBudget(device=4 * FRAME, host=host * FRAME), 30)
    bank.add_objects(2)
    for index in range(30, 120):
        remember(bank, index, [False] + [index == 30] * 2)
        assert sum(memory.pages.device_nbytes for memory in bank.memories if memory.pages) <= 4 * FRAME
        assert sum(memory.pages.nbytes for memory in bank.memories if memory.pages) <= (4 + host) * FRAME
    first, second = held(bank)
    assert 0 in first and 30 in second and 119 in first and 119 in second
    # the mask of frame 30 is not the first object's
    assert 30 not in first


def test_what_one_object_leaves_on_the_device_another_takes():
    """The first object's frames are forgotten one by one; the pages of the later two move to the device for them."""
    bank = filled(MemoryBudget(device=8 * FRAME, host=4 * FRAME), 60)
    bank.add_objects(2)
    for index in range(60, 200):
        remember(bank, index, [False] + [index == 60] * 2)
    assert bank.most == {"device": 8 * FRAME, "host": 4 * FRAME}
    assert [memory.pages.device_nbytes // FRAME for memory in bank.memories] == [4, 4]


def test_the_host_takes_what_the_device_does_not():
    bank = filled(MemoryBudget(device=FRAME, host=2 * FRAME), 60)
    assert bank.most == {"device": FRAME, "host": 2 * FRAME}
    assert len(held(bank)[0]) == 42 and bank.evicted == 18
    everything = filled(MemoryBudget(device=3 * FRAME), 60)
    query_key = frame(99)[0]
    torch.testing.assert_close(bank.read(query_key), everything.read(query_key))


@pytest.mark.parametrize("frames, pages", [(32, 1), (64, 2), (100, 3)])
def test_small_frames_share_the_pages_of_a_large_budget(frames, pages):
    bank = filled(MemoryBudget(device=frames * FRAME), 100 * frames // 7)
    assert bank.memories[0].pages.page_nbytes == pages * FRAME
    # 9 positions a frame: all pages but the last are full of frames
    assert frames * 128 // 9 - pages * 128 // 9 < len(held(bank)[0]) <= frames * 128 // 9
    assert bank.most["device"] <= frames * FRAME


def test_a_page_is_no_larger_than_pays_and_holds_a_frame():
    assert budget_page(2**40, 9, 40) == 4096
    assert budget_page(2**40, 8160, 40) == 8192 and budget_page(0, 129, 40) == 256


def test_a_budget_too_small_says_what_would_do():
    with pytest.raises(ValueError, match=rf"memory budget: expected at least {format_size(FRAME)} for 1 objects"):
        filled(MemoryBudget(device=FRAME - 1), 1)
    # 14 frames with given masks fill a page
    bank = MemoryBank(MemoryRule.parse("every:1"), MemoryBudget(device=FRAME))
    bank.add_objects(1)
    with pytest.raises(ValueError, match=rf"expected at least {format_size(2 * FRAME)} for 1 objects and the frames"):
        for index in range(15):
            remember(bank, index, [True])


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"device": -1}, "device budget: expected at least 0 bytes, got -1"),
        ({"host": -1}, "host budget: expected at least 0 bytes, got -1"),
        ({"eviction": "oldest"}, "eviction: expected one of fifo, importance, got 'oldest'"),
    ],
)
def test_what_is_no_budget(wrong, message):
    with pytest.raises(ValueError, match=message):
        MemoryBudget(**wrong)


def test_sizes():
    sizes = {"2GiB": 2**31, "500 MB": 5 * 10**8, "4096": 4096, "1.5kib": 1536, "7B": 7}
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("", "GiB", "-1", "2 gallons", "1e9"):
        with pytest.raises(ValueError, match="expected a size like 2GiB"):
            parse_size(text)
    assert [format_size(size) for size in (5, 2048, 3 * 2**20, 2**31)] == ["5 bytes", "2.0 KiB", "3.0 MiB", "2.0 GiB"]


def test_a_large_budget_changes_no_mask(small_model, clip):
    frames, labels = clip
    masks = {0: labels[0]}
    plain = list(Tracker(small_model).track(frames, masks))
    for budget in (MemoryBudget(device=2**30), MemoryBudget(device=0, host=2**30, eviction="importance")):
        found = list(Tracker(small_model, budget=budget).track(frames, masks))
        for one, other in zip(plain, found, strict=True):
            np.testing.assert_array_equal(one.labels, other.labels)


def test_a_small_budget_tracks_on(small_model, clip):
    frames, labels = clip
    video = np.concatenate([frames] * 3)
    tracker = Tracker(small_model, memory="every:1", budget=MemoryBudget(device=2**21))
    assert len(list(tracker.track(video, {0: labels[0]}))) == len(video)
    page = tracker.bank.memories[0].pages.page_nbytes
    assert tracker.bank.most["device"] > page and tracker.bank.evicted == 0
    tracker = Tracker(small_model, memory="every:1", budget=MemoryBudget(device=page))
    assert len(list(tracker.track(video, {0: labels[0]}))) == len(video)
    assert tracker.bank.evicted > 0 and tracker.bank.most == {"device": page, "host": 0}


@pytest.mark.parametrize("eviction", ["fifo", "importance"])
def test_nothing_grows_with_the_video_under_a_budget(small_model, clip, eviction):
    frames, labels = clip
    tracker = Tracker(small_model, memory="every:1", budget=MemoryBudget(device=2**17, eviction=eviction))
    held, tensors = [], {}
    for result in tracker.track((frames[index % 8] for index in range(60)), {0: labels[0]}):
        held.append(tracker.bank.memories[0].pages.nbytes if tracker.bank.evicted else 0)
        if (index := result.index) in (20, 59):
            del result
            tensors[index] = live_bytes()
    assert held[20] and len(set(held[20:])) == 1 and tensors[20] == tensors[59]


def live_bytes() -> int:
    """Of all tensors that anyone still refers to."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def test_what_a_video_will_take():
    rule = MemoryRule.parse("every:5")
    assert [rule.most_frames(count) for count in (1, 2, 6, 8, 100)] == [0, 1, 2, 3, 21]
    assert MemoryRule.parse("first").most_frames(100) == 1
    assert MemoryRule.parse("previous").most_frames(100) == 1
    assert MemoryRule.parse("first+previous").most_frames(100) == 2
    assert MemoryRule.parse("uniform:5", 100).most_frames(100) == 7


@pytest.mark.parametrize("rule", ["first", "previous", "first+previous", "every:3", "every:1", "uniform:4"])
def test_it_takes_no_more(rule, small_model, clip):
    frames, labels = clip
    tracker = Tracker(small_model, memory=rule)
    counts = []
    for _ in tracker.track(frames, {0: labels[0]}):
        counts.append(max((len(memory.frames) for memory in tracker.bank.memories), default=0))
    assert max(counts) == MemoryRule.parse(rule, len(frames)).most_frames(len(frames))
