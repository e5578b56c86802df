"""Objects that are corrected: what was remembered of them since their last given mask is forgotten, of no other."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stm_model import STM, STMConfig, Tracker
from stm_model.tracking.bank import MemoryBank
from stm_model.tracking.budget import MemoryBudget, MemoryRule
from stm_model.tracking.memory import FRAME, GIVEN
from stm_model.tracking.session import CORRECTION_WEIGHT

C, V, SIDE = 4, 6, 3


def frame(index: int, objects: int, shared: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    key = torch.randn(1 if shared else objects, C, SIDE, SIDE, generator=generator)
    return key, torch.randn(objects, V, SIDE, SIDE, generator=generator)


def bank_of(frames: range, shared: bool, objects: int = 3, given: tuple[int, ...] = (0,)) -> MemoryBank:
    bank = MemoryBank(MemoryRule.parse("every:1"), MemoryBudget(), similarity="l2")
    bank.add_objects(objects)
    for index in frames:
        entries = bank.wanted(index, [index in given] * objects, [True] * objects)
        bank.remember(index, entries, *frame(index, objects, shared))
    return bank


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("places", [(1,), (0, 2), (0, 1, 2)])
def test_some_objects_forget_and_the_others_do_not(shared, places):
    bank = bank_of(range(8), shared, given=(0, 5))
    whole, query = bank_of(range(8), shared, given=(0, 5)), torch.randn(1, C, SIDE, SIDE)
    bank.forget_since(dict.fromkeys(places, 2))
    few = MemoryBank(MemoryRule.parse("every:1"), MemoryBudget(), similarity="l2")
    few.add_objects(3)
    for index in (0, 1, 2, 5):
        few.remember(index, few.wanted(index, [1] * 3, [True] * 3), *frame(index, 3, shared))
    found, expected, forgotten = (each.read(query)[0] for each in (bank, whole, few))
    for place in range(3):
        torch.testing.assert_close(found[place], (forgotten if place in places else expected)[place])
    assert sorted(place for held in bank.places for place in held) == [0, 1, 2]


@pytest.mark.parametrize("shared", [True, False])
def test_a_divided_memory_goes_on_in_order(shared):
    bank = bank_of(range(4), shared)
    bank.forget_since({1: 1, 0: 2})
    assert sorted(bank.places) == [[0], [1], [2]]
    key, value = frame(9, 3, shared)
    entries = bank.wanted(9, [0, 0, 1], [True, False, True])
    assert {entry.places[0]: (entry.given, entry.kept) for entry in entries} == {
        0: (0, True),
        1: (0, False),
        2: (1, True),
    }
    key *= 20
    bank.remember(9, entries, key, value)
    # the frame's own key reads its values
    near = key[0:1]
    for place in range(3):
        query = near if shared else key[place : place + 1]
        torch.testing.assert_close(bank.read(query)[0][place], value[place], atol=1e-3, rtol=1e-3)
    resumed = MemoryBank(bank.rule, bank.budget, similarity="l2")
    resumed.load_state(bank.state(), torch.device("cpu"))
    for one, other in zip(resumed.read(near), bank.read(near)):
        assert torch.equal(one, other)
    bank.remove(1)
    assert sorted(bank.places) == [[0], [1]] and len(bank.read(near)[0]) == 2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = replace(STMConfig.shared(), key_channels=16, value_channels=32, decoder_channels=32)
    return STM(config).eval().requires_grad_(False)


def remembered(session) -> list[dict[int, tuple[int, bool]]]:
    """Of each memory: frame → how often it is there, and whether it is given."""
    found = []
    for memory in session.bank.memories:
        frames, counts = memory.notes[:, FRAME].unique(return_counts=True)
        given = {int(index) for index in memory.notes[memory.notes[:, GIVEN] == 1, FRAME]}
        counts //= memory.positions
        found.append({index: (count, index in given) for index, count in zip(frames.int().tolist(), counts.tolist())})
    return found


def test_a_mask_of_a_wrong_object_is_a_correction(model, clip):
    frames, labels = clip
    session = Tracker(model, memory="first+every:1").start({0: labels[0]})
    for index in range(4):
        result = session.step(frames[index])
    # as it was found, of one object; the other is where nothing of it was found
    other = np.where(result.labels == 1, 1, 0).astype(np.uint8)
    nowhere = np.argwhere(result.labels != 2)[:40]
    other[tuple(nowhere.T)] = 2
    session.correct(other)
    session.step(frames[4])
    found = {held[0]: memory for held, memory in zip(session.bank.places, remembered(session))}
    one, two = found[0], found[1]
    assert one == {0: (1, True), 1: (1, False), 2: (1, False), 3: (1, True)}
    assert two == {0: (1, True), 3: (CORRECTION_WEIGHT, True)}


def test_a_mask_like_the_one_found_is_none(model, clip):
    frames, labels = clip
    session = Tracker(model, memory="first+every:1").start({0: labels[0]})
    for index in range(3):
        result = session.step(frames[index])
    session.correct(result.labels)
    session.step(frames[3])
    given = {label for label in (1, 2) if (result.labels == label).any()}
    assert remembered(session) == [{0: (1, True), 1: (1, False), 2: (1, bool(given))}]


def test_a_resumed_run_with_a_correction_is_the_same(model, clip):
    frames, labels = clip
    masks = {0: labels[0], 3: np.where(labels[3] == 2, 1, np.where(labels[3] == 1, 2, 0)).astype(np.uint8)}
    whole = list(Tracker(model).track(frames, masks))
    for stop in (3, 4, 5):
        tracker = Tracker(model)
        for _ in zip(range(stop + 1), tracker.track(frames, masks)):
            pass
        state = tracker.state()
        for one, other in zip(Tracker(model).track(frames, masks, resume=state), whole[stop + 1 :], strict=True):
            assert torch.equal(one.probabilities, other.probabilities)
