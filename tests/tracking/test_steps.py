"""A video whose frames are given one by one, with objects that are corrected, added and removed on the way."""

import numpy as np
import pytest
import torch

from stm_model import Tracker
from stm_model.labels import VOID
from stm_model.tracking.budget import MemoryBudget
from stm_model.tracking.memory import OBJECT, SpaceTimeMemory


@pytest.fixture(params=["own keys", "shared keys"])
def model(request, small_model, shared_model):
    return small_model if request.param == "own keys" else shared_model


def same(one, other):
    assert (one.index, one.objects, one.certainty, one.trust) == (
        other.index,
        other.objects,
        other.certainty,
        other.trust,
    )
    assert one.familiarity == other.familiarity and np.array_equal(one.labels, other.labels)
    assert torch.equal(one.probabilities, other.probabilities)


def test_a_network_that_sees_the_previous_masks_has_not_that_frame_in_memory(model):
    assert Tracker(model).memory == ("first+every:5" if model.config.prior else "every:5")
    assert Tracker(model, memory="every:2").memory == "every:2"


def test_steps_are_what_track_does(model, clip):
    frames, labels = clip
    masks = {1: labels[1], 4: np.where(labels[4] == 2, 3, 0)}
    session = Tracker(model, memory="every:2").start(masks)
    for expected, frame in zip(Tracker(model, memory="every:2").track(frames, masks), frames, strict=True):
        same(session.step(frame), expected)


@pytest.mark.parametrize("size", [None, 48])
def test_what_is_corrected_after_a_frame_counts_as_its_given_mask(model, clip, size):
    frames, labels = clip
    # one object is corrected, one enters, some of it is void
    correction = np.where(labels[3] == 1, 1, np.where(labels[3] == 2, 7, 0)).astype(np.uint8)
    correction[:5] = VOID
    masks = {0: np.where(labels[0] == 1, 1, 0), 3: correction}
    session = Tracker(model, size=size).start({0: masks[0]})
    for expected, frame in zip(Tracker(model, size=size).track(frames, masks), frames, strict=True):
        result = session.step(frame)
        if result.index == 3:
            result = session.correct(correction)
        same(result, expected)


def test_a_state_after_a_correction_is_that_of_its_masks(model, clip):
    frames, labels = clip
    tracker = Tracker(model)
    session = tracker.start({0: np.where(labels[0] == 1, 1, 0)})
    for frame in frames[:4]:
        session.step(frame)
    session.add_object(2, labels[3] == 2)
    session.correct(np.where(labels[3] == 1, 1, 0))
    # a correction that names other objects leaves the mask of the first in force
    assert set(np.unique(session.masks[3])) == {0, 1, 2}
    state, masks = tracker.state(), dict(session.masks)
    resumed = Tracker(model).track(frames, masks, resume=state)
    for frame, again in zip(frames[4:], resumed, strict=True):
        same(session.step(frame), again)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_removed_object_leaves_the_others_their_memory(model, clip, place):
    frames, labels = clip
    mask = labels[0].copy()
    mask[:20, :20] = 3
    tracker = Tracker(model, memory="every:1")
    session = tracker.start({0: mask})
    for frame in frames[:4]:
        session.step(frame)
    query = torch.randn(1, 16, 5, 6, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before, familiar = session.bank.read(query)
    held = session.bank.memories[0].pages.nbytes
    removed = session.remove(place + 1)
    staying = [other for other in range(3) if other != place]
    assert removed.objects == tuple(other + 1 for other in staying) and place + 1 not in removed.labels
    with torch.inference_mode():
        after, still = session.bank.read(query)
    # the same values in another product: equal to rounding
    torch.testing.assert_close(after, before[staying])
    torch.testing.assert_close(still, familiar[staying])
    assert session.bank.memories[0].pages.nbytes < held
    result = session.step(frames[4])
    assert len(result.certainty) == len(result.familiarity) == len(result.trust) == 2
    torch.testing.assert_close(result.probabilities.sum(0), torch.ones(70, 90))


def test_objects_may_all_leave_and_others_come(model, clip):
    frames, labels = clip
    session = Tracker(model).start()
    assert not session.step(frames[0]).labels.any()
    assert session.add_object(5, labels[0] == 1).objects == (5,)
    session.step(frames[1])
    # it entered alone: its memory goes as a whole
    assert session.add_object(9, labels[1] == 2).objects == (5, 9)
    session.step(frames[2])
    assert session.remove(5).objects == (9,) and len(session.bank.memories) == 1
    assert session.remove(9).objects == () and not session.bank.memories
    assert not session.step(frames[3]).labels.any()
    assert session.add_object(5, labels[3] == 1).objects == (5,)
    assert session.step(frames[4]).objects == (5,)


def test_what_makes_no_sense_is_refused_and_changes_nothing(model, clip):
    frames, labels = clip
    session = Tracker(model).start({0: labels[0]})
    for edit in (lambda: session.correct(labels[0]), lambda: session.add_object(3, labels[0] == 1)):
        with pytest.raises(ValueError, match="expected a frame to be tracked before, got none"):
            edit()
    first = session.step(frames[0])
    for message, edit in {
        "object 1: expected a label that is not tracked yet": lambda: session.add_object(1, labels[0] == 1),
        "object 0: expected a label from 1 to 254": lambda: session.add_object(0, labels[0] == 1),
        "object 255: expected a label from 1 to 254": lambda: session.add_object(VOID, labels[0] == 1),
        "object 3: expected a mask with the object in it": lambda: session.add_object(3, labels[0] == 77),
        r"mask of frame 0: expected \[H, W\] = \[70, 90\] like its frame, got \[9, 9\]": lambda: session.correct(
            np.ones((9, 9), np.uint8)
        ),
        r"object 3: expected one of \[1, 2\]": lambda: session.remove(3),
        "frame 1: expected": lambda: session.step(frames[0][:9]),
    }.items():
        with pytest.raises(ValueError, match=message):
            edit()
    with pytest.raises(ValueError):
        session.step(frames[1].astype(np.float32))
    assert session.masks.keys() == {0} and session.objects == [1, 2]
    second = session.step(frames[1])
    expected = list(Tracker(model).track(frames[:2], {0: labels[0]}))
    same(first, expected[0])
    same(second, expected[1])


def test_memories_are_told_where_objects_are(model, clip, monkeypatch):
    frames, labels = clip
    told = []
    read = SpaceTimeMemory.read
    monkeypatch.setattr(SpaceTimeMemory, "read", lambda self, key, cells: told.append(cells) or read(self, key, cells))
    session = Tracker(model, memory="every:1", budget=MemoryBudget(share=0.5)).start({0: labels[0]})
    session.step(frames[0])
    result = session.step(frames[1])
    # padded to a multiple of 16: 80 × 96
    padded = np.pad(labels[0], ((5, 5), (3, 3)))
    cells = [(padded == label).reshape(5, 16, 6, 16).any((1, 3)) for label in (1, 2)]
    assert torch.equal(told[0], torch.tensor(np.array(cells)).float())
    owners = session.bank.memories[0].notes[:, OBJECT].reshape(5, 6)
    for label in (1, 2):
        assert set(owners[cells[label - 1] & ~cells[2 - label]].tolist()) == {label - 1}
    session.step(frames[2])
    assert told[1].amax((1, 2)).tolist() == pytest.approx(result.probabilities[1:].amax((1, 2)).tolist())
