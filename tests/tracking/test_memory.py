"""The memories of a video within a budget."""

import gc

import numpy as np
import pytest
import torch

from stm_kernels import memory_usage
from stm_model import Tracker
from stm_model.tracking.bank import MemoryBank
from stm_model.tracking.budget import EVICTIONS, MemoryBudget, MemoryRule, budget_page, format_size, parse_size
from stm_model.tracking.memory import FAR, GIVEN, OBJECT, PROBATION, USAGE_DECAY, USE, USED
from stm_model.tracking.memory import FRAME as FRAME_COLUMN

C, V, SIDE = 4, 6, 3
FRAME = 128 * (C + V) * 4
"""Bytes of a page of 128 positions, which holds one frame of 3 × 3."""


def frame(index: int, objects: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    return tuple(torch.randn(objects, channels, SIDE, SIDE, generator=generator) for channels in (C, V))


def fifo(device: int, host: int | None = None) -> MemoryBudget:
    return MemoryBudget(device, host, "fifo")


def filled(budget: MemoryBudget, frames: int, rule: str = "every:1", objects: int = 1, **options) -> MemoryBank:
    bank = MemoryBank(MemoryRule.parse(rule), budget, **options)
    bank.add_objects(objects)
    for index in range(frames):
        remember(bank, index, [index == 0] * objects)
    return bank


def remember(bank: MemoryBank, index: int, given: list[bool]) -> None:
    bank.remember(index, bank.wanted(index, given, [True] * len(given)), *frame(index, len(given)))


def held(bank: MemoryBank) -> list[list[int]]:
    return [memory.frames for memory in bank.memories]


def dropped(bank: MemoryBank) -> int:
    return bank.summary()["positions_dropped"]


def test_without_a_budget_everything_is_kept():
    bank = filled(MemoryBudget(), 300)
    assert held(bank) == [list(range(300))] and dropped(bank) == 0


def test_first_in_first_out():
    # 9 positions a frame: 14 frames in a page, 28 in two
    bank = filled(fifo(2 * FRAME), 60)
    assert held(bank) == [[0, *range(33, 60)]]
    assert dropped(bank) == (60 - 28) * 9
    assert bank.most == {"device": 2 * FRAME, "host": 0}


def test_what_is_read_is_what_is_held():
    bank = filled(fifo(FRAME), 40)
    (indices,) = held(bank)
    assert len(indices) == 14
    keys, values = (torch.cat([frame(index)[i].flatten(2) for index in indices], 2).mT for i in (0, 1))
    query_key = frame(99)[0]
    expected = torch.softmax(query_key.flatten(2).mT @ keys.mT * C**-0.5, -1) @ values
    torch.testing.assert_close(bank.read(query_key)[0].flatten(2).mT, expected)


def position_of(frame_index: int, place: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value of one position of a frame."""
    return tuple(part[0, :, place // SIDE, place % SIDE] for part in frame(frame_index))


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"skip": 0.01}], ids=["exact", "top_k", "skip"])
def test_positions_that_are_read_stay(options):
    bank = MemoryBank(MemoryRule.parse("every:1"), MemoryBudget(device=FRAME), similarity="l2", scale=50.0, **options)
    bank.add_objects(1)
    key, value = position_of(5, 4)
    for index in range(60):
        remember(bank, index, [index == 0])
        # of a frame that nobody else asks for one position is read
        query_key = key[None, :, None, None].expand(1, C, SIDE, SIDE)
        readout = bank.read(query_key)[0]
        if index >= 5:
            torch.testing.assert_close(readout[0, :, 0, 0], value, rtol=0.05, atol=0.05)
    assert len(bank.memories[0].notes) == 128
    (indices,) = held(bank)
    assert {0, 5, 59} <= set(indices) and (bank.memories[0].notes[:, FRAME_COLUMN] == 0).sum() == 9
    assert (bank.memories[0].notes[:, FRAME_COLUMN] == 5).sum() < 9


def test_use_is_the_share_of_the_reads_mass_and_decays():
    bank = filled(MemoryBudget(device=10 * FRAME), 5, objects=2)
    expected = torch.zeros(2, 45, dtype=torch.float64)
    for seed in (50, 51, 52):
        query_key = frame(seed)[0]
        bank.read(query_key)
        queries = query_key.flatten(2).mT.expand(2, -1, -1).double()
        keys = torch.cat([frame(index, 2)[0].flatten(2) for index in range(5)], 2).mT.double()
        usage = memory_usage(queries, keys, implementation="reference").sum(0)
        expected = expected * torch.tensor([[USAGE_DECAY], [1]]) + usage / usage.sum()
    torch.testing.assert_close(bank.memories[0].notes[:, [USED, USE]].mT, expected, rtol=1e-5, atol=1e-7)


def at(*places: tuple[int, int] | None) -> torch.Tensor:
    """Where objects are: each at one cell, or nowhere."""
    cells = torch.zeros(len(places), SIDE, SIDE)
    for cell, place in zip(cells, places):
        if place is not None:
            cell[place] = 0.9
    return cells


def test_what_is_read_at_an_object_counts_as_use():
    bank = filled(MemoryBudget(device=10 * FRAME), 5)
    query_key = frame(50)[0]
    bank.read(query_key, at((0, 0)))
    queries = query_key.flatten(2).mT.double()
    keys = torch.cat([frame(index)[0].flatten(2) for index in range(5)], 2).mT.double()
    mass = torch.stack([memory_usage(queries[:, m : m + 1], keys, implementation="reference")[0] for m in range(9)])
    # the object's cell and those beside it
    weight = torch.tensor([0.9, 0.9, 0, 0.9, 0.9, 0, 0, 0, 0]).double() + FAR
    expected = (weight[:, None] * mass).sum(0) * 0.9 / weight.sum()
    torch.testing.assert_close(bank.memories[0].notes[:, USED], expected, rtol=1e-5, atol=1e-7)


def test_the_use_of_an_object_that_is_gone_does_not_decay():
    bank = MemoryBank(MemoryRule.parse("every:1"), MemoryBudget(device=10 * FRAME))
    bank.add_objects(2)
    key, value = frame(0, 2)
    bank.remember(0, bank.wanted(0, [1, 1], [True, True]), key, value, at((0, 0), (2, 2)))
    (memory,) = bank.memories
    assert memory.notes[:, OBJECT].reshape(SIDE, SIDE).tolist() == [[0, 0, -1], [0, 0, 1], [-1, 1, 1]]
    owners = memory.notes[:, OBJECT].long()
    for places, seen in (((None, (2, 2)), [0.0, 0.9, 1.0]), ((None, None), [0.0, 0.0, 1.0])):
        memory.notes[:, USED] = 1.0
        bank.read(frame(50)[0], at(*places))
        # of the first object, the second, and the background
        mass = memory.notes[:, USED] - USAGE_DECAY ** torch.tensor(seen).double()[owners]
        assert mass.sum().item() == pytest.approx(max(seen[:2]), abs=1e-6) and mass.min() >= -1e-6
    bank.remove(0)
    assert bank.memories[0].notes[:, OBJECT].tolist() == [-1, -1, -1, -1, -1, 0, -1, 0, 0]


@pytest.mark.parametrize("budget", [MemoryBudget(device=FRAME), MemoryBudget(share=0.3)], ids=["bytes", "share"])
def test_what_was_dropped_is_said(budget):
    """Of every position the mass that it had in all reads while it was held, from the reference's affinity."""
    bank = MemoryBank(MemoryRule.parse("every:1"), budget)
    bank.add_objects(1)
    use: dict[tuple[float, ...], float] = {}
    for index in range(40):
        remember(bank, index, [index == 0])
        query_key = frame(index + 100)[0]
        key = torch.cat([part[0] for part in bank.memories[0].pages.state()["pages"]], 1).double()
        usage = memory_usage(query_key.flatten(2).mT.double(), key, implementation="reference")[0]
        names = [tuple(row) for row in key[0].tolist()]
        for name, mass in zip(names, (usage / usage.sum()).tolist(), strict=True):
            use[name] = use.get(name, 0.0) + mass
        bank.read(query_key)
    held = sum(use[name] for name in names)
    summary = bank.summary()
    assert summary["positions_kept"] == len(names) and summary["positions_dropped"] == 40 * 9 - len(names)
    assert summary["share_of_use_dropped"] == pytest.approx(1 - held / sum(use.values()), abs=1e-5)


def test_a_share_is_kept_beside_probation_and_half_of_it_is_given():
    bank = filled(MemoryBudget(share=0.1), 101)
    (memory,) = bank.memories
    frames = memory.notes[:, FRAME_COLUMN]
    # the last frames are on probation
    assert ((frames > 100 - PROBATION).sum(), (frames <= 100 - PROBATION).sum()) == (PROBATION * 9, 91)
    # when the probation of the first ended, a tenth of 54 positions was less than a frame's 9, so that 9 could stay:
    # half of them for the given mask
    assert (frames == 0).sum() == 4
    (memory,) = filled(MemoryBudget(share=0.01), 41).memories
    assert (memory.notes[:, FRAME_COLUMN] <= 40 - PROBATION).sum() == 9


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
        assert bank.memories[0].notes[:, GIVEN].tolist() == [any(given)] * 9
        bank.wanted(index + 1, [False] * 2, [True] * 2)
        assert len(bank.memories[0].frames) == kept


def test_every_memory_asks_for_its_own_objects():
    bank = MemoryBank(MemoryRule.parse("first"), MemoryBudget())
    bank.add_objects(1)
    bank.add_objects(2)
    (entry,) = bank.wanted(3, [False, False, True], [True] * 3)
    assert entry.memory is bank.memories[1] and entry.places == [1, 2] and entry.given


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_given_masks_stay(eviction):
    bank = MemoryBank(MemoryRule.parse("every:1"), MemoryBudget(device=FRAME, eviction=eviction))
    bank.add_objects(1)
    given = {0, 7, 21}
    for index in range(50):
        remember(bank, index, [index in given])
        bank.read(frame(index)[0])
    frames = bank.memories[0].notes[:, FRAME_COLUMN]
    assert all((frames == index).sum() == 9 for index in given)


@pytest.mark.parametrize("eviction", EVICTIONS)
@pytest.mark.parametrize("host", [0, 3])
def test_objects_share_one_budget(host, eviction):
    bank = filled(MemoryBudget(4 * FRAME, host * FRAME, eviction), 30)
    bank.add_objects(2)
    for index in range(30, 120):
        remember(bank, index, [False] + [index == 30] * 2)
        assert sum(memory.pages.device_nbytes for memory in bank.memories if memory.pages) <= 4 * FRAME
        assert sum(memory.pages.nbytes for memory in bank.memories if memory.pages) <= (4 + host) * FRAME
    first, second = held(bank)
    assert 0 in first and 30 in second and 119 in first and 119 in second
    # the mask of frame 30 is not the first object's
    assert eviction == "use" or 30 not in first


def test_what_one_object_leaves_on_the_device_another_takes():
    """The first object's frames are forgotten one by one; the pages of the later two move to the device for them."""
    bank = filled(fifo(8 * FRAME, 4 * FRAME), 60)
    bank.add_objects(2)
    for index in range(60, 200):
        remember(bank, index, [False] + [index == 60] * 2)
    assert bank.most == {"device": 8 * FRAME, "host": 4 * FRAME}
    assert [memory.pages.device_nbytes // FRAME for memory in bank.memories] == [4, 4]


def test_the_host_takes_what_the_device_does_not():
    bank = filled(fifo(FRAME, 2 * FRAME), 60)
    assert bank.most == {"device": FRAME, "host": 2 * FRAME}
    assert len(held(bank)[0]) == 42 and dropped(bank) == 18 * 9
    everything = filled(fifo(3 * FRAME), 60)
    query_key = frame(99)[0]
    torch.testing.assert_close(bank.read(query_key), everything.read(query_key))


@pytest.mark.parametrize("frames, pages", [(32, 1), (64, 2), (100, 3)])
def test_small_frames_share_the_pages_of_a_large_budget(frames, pages):
    bank = filled(fifo(frames * FRAME), 100 * frames // 7)
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
        ({"share": 0.0}, "memory share: expected a share above 0 and up to 1, got 0.0"),
        ({"share": 1.1}, "memory share: expected a share above 0 and up to 1, got 1.1"),
        ({"share": float("nan")}, "memory share: expected a share above 0 and up to 1, got nan"),
        ({"share": 0.5, "device": 5}, "memory share: expected no budget in bytes beside it; choose one of them"),
        ({"share": 0.5, "host": 5}, "memory share: expected no budget in bytes beside it; choose one of them"),
        ({"share": 0.5, "eviction": "fifo"}, "memory share: expected eviction by use beside it, got fifo"),
        ({"eviction": "oldest"}, "eviction: expected one of use, fifo, got 'oldest'"),
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
    for budget in (fifo(2**30), MemoryBudget(device=0, host=2**30), MemoryBudget(share=1.0)):
        found = list(Tracker(small_model, budget=budget).track(frames, masks))
        for one, other in zip(plain, found, strict=True):
            np.testing.assert_array_equal(one.labels, other.labels)


def test_a_small_budget_tracks_on(small_model, clip):
    frames, labels = clip
    video = np.concatenate([frames] * 3)
    tracker = Tracker(small_model, memory="every:1", budget=MemoryBudget(device=2**21))
    assert len(list(tracker.track(video, {0: labels[0]}))) == len(video)
    page = tracker.bank.memories[0].pages.page_nbytes
    assert tracker.bank.most["device"] > page and dropped(tracker.bank) == 0
    tracker = Tracker(small_model, memory="every:1", budget=MemoryBudget(device=page))
    assert len(list(tracker.track(video, {0: labels[0]}))) == len(video)
    assert dropped(tracker.bank) > 0 and tracker.bank.most == {"device": page, "host": 0}


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_nothing_grows_with_the_video_under_a_budget(small_model, clip, eviction):
    frames, labels = clip
    tracker = Tracker(small_model, memory="every:1", budget=MemoryBudget(device=2**17, eviction=eviction))
    held, tensors = [], {}
    for result in tracker.track((frames[index % 8] for index in range(60)), {0: labels[0]}):
        held.append(tracker.bank.memories[0].pages.nbytes if dropped(tracker.bank) else 0)
        if (index := result.index) in (20, 59):
            del result
            tensors[index] = live_bytes()
    assert held[20] and len(set(held[20:])) == 1 and tensors[20] == tensors[59]


def live_bytes() -> int:
    """Of all tensors that anyone still refers to."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.layout == torch.strided:
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


def test_the_given_and_the_newest_frame_may_not_go():
    (memory,) = filled(MemoryBudget(device=10 * FRAME), 3).memories
    assert memory.stay(2).tolist() == [True] * 9 + [False] * 9 + [True] * 9
    # of a given mask so many positions as may stay, those used most
    memory.notes[:9, USED] = torch.arange(9.0)
    assert memory.stay(1, given=2).tolist() == [False] * 7 + [True] * 11 + [False] * 9
