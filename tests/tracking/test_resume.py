"""A run that goes on from a saved state gives what one gives that was never stopped, to the bit."""

import numpy as np
import pytest
import torch

import stm_model.tracking.session as session_module
from stm_model import Tracker
from stm_model.tracking.budget import MemoryBudget

PAGE = 128 * 2 * (16 + 32) * 4
"""Bytes of a page of two objects; of the 5 × 6 positions of a frame it holds a little more than four frames."""


def masks_of(labels) -> dict[int, np.ndarray]:
    """The second object enters at frame 3, and the first one's mask is given again there."""
    return {0: np.where(labels[0] == 1, 1, 0).astype(np.uint8), 3: labels[3]}


SETTINGS = {
    "default": {},
    "every frame is kept": {"memory": "every:1"},
    "so many frames": {"memory": "uniform:3"},
    "the previous frame alone": {"memory": "previous"},
    "uncertain frames are not kept": {"memory": "every:1", "skip_uncertain": True},
    "smaller": {"size": 48, "memory": "first+previous"},
    "the best positions": {"top_k": 5},
    "blocks left out": {"skip": 0.1, "memory": "every:1"},
    "first in first out": {"memory": "every:1", "budget": MemoryBudget(device=PAGE, eviction="fifo")},
    "what is used least": {"memory": "every:1", "budget": MemoryBudget(device=PAGE)},
    "on the host": {"memory": "every:1", "budget": MemoryBudget(device=PAGE // 2, host=PAGE)},
    "a share of the best positions": {"memory": "every:1", "budget": MemoryBudget(share=0.2), "top_k": 5},
}


def same(one, other) -> bool:
    return (
        (one.index, one.objects, one.certainty, one.familiarity, one.trust)
        == (other.index, other.objects, other.certainty, other.familiarity, other.trust)
        and np.array_equal(one.labels, other.labels)
        and torch.equal(one.probabilities, other.probabilities)
    )


def saved(tracker, path):
    torch.save(tracker.state(), path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("case", SETTINGS)
def test_it_goes_on_from_any_frame(small_model, clip, tmp_path, monkeypatch, case):
    (frames, labels), options = clip, SETTINGS[case]
    # between what this network is certain of, so that some frames are kept and some are not
    monkeypatch.setattr(session_module, "UNTRUSTED", 0.15)
    masks, unbroken, states = masks_of(labels), [], []
    tracker = Tracker(small_model, **options)
    for result in tracker.track(frames, masks):
        unbroken.append(result)
        states.append(saved(tracker, tmp_path / "resume.pt"))
    # from every frame by default, from some with the other settings, other ones each
    first, step = (0, 1) if not options else (list(SETTINGS).index(case) % 3, 3)
    for index in range(first, len(frames), step):
        again = Tracker(small_model, **options)
        results = list(again.track(iter(frames), masks, frame_count=len(frames), resume=states[index]))
        assert [result.index for result in results] == list(range(index + 1, len(frames)))
        assert all(map(same, results, unbroken[index + 1 :]))
        ends = [(each.bank.summary(), each.bank.most) for each in (again, tracker)]
        assert ends[0] == ends[1]
        for one, other in zip(again.bank.memories, tracker.bank.memories, strict=True):
            assert one.notes.equal(other.notes)
            for place in ("device_nbytes", "host_nbytes"):
                assert getattr(one.pages, place) == getattr(other.pages, place)
            for keys in zip(one.pages.state()["pages"], other.pages.state()["pages"], strict=True):
                assert all(a.view(torch.uint8).equal(b.view(torch.uint8)) for a, b in zip(*keys, strict=True))


def test_it_may_be_stopped_again_and_again(small_model, clip, tmp_path):
    frames, labels = clip
    masks, state, results = masks_of(labels), None, []
    unbroken = list(Tracker(small_model, memory="every:2").track(frames, masks))
    while len(results) < len(frames):
        tracker = Tracker(small_model, memory="every:2")
        tracking = tracker.track(frames, masks, resume=state)
        for result, _ in zip(tracking, range(2)):
            results.append(result)
            state = saved(tracker, tmp_path / "resume.pt")
        # a run that has not gone on yet is where it was
        tracker.track(frames, masks, resume=state)
        again = saved(tracker, tmp_path / "resume.pt")
        assert again["made_with"] == state["made_with"] and again["video"].keys() == state["video"].keys()
        state = again
    assert all(map(same, results, unbroken))


def stopped(model, clip, at=4, **options):
    frames, labels = clip
    tracker = Tracker(model, **options)
    for result in tracker.track(frames, masks_of(labels), frame_count=len(frames)):
        if result.index == at:
            return tracker.state()


OTHER = {
    "memory": ({"memory": "every:2"}, "memory: every:2 instead of the every:5 that the saved state was made with"),
    "size": ({"size": 48}, "size: 48 instead of the None that"),
    "spacing": ({"spacing": 3}, "spacing: 3 instead of the 1 that"),
    "skip_uncertain": ({"skip_uncertain": True}, "skip_uncertain: True instead of the False"),
    "budget": ({"budget": MemoryBudget(device=2**20)}, "device budget: 1048576 instead of the None"),
    "host": ({"budget": MemoryBudget(host=5)}, "host budget: 5 instead of the None"),
    "eviction": ({"budget": MemoryBudget(eviction="fifo")}, "eviction: fifo instead of the use"),
    "top_k": ({"top_k": 5}, "top_k: 5 instead of the None"),
    "skip": ({"skip": 0.1}, r"skip: 0.1 instead of the 0.0"),
    "implementation": ({"implementation": "reference"}, "implementation: reference instead of the auto"),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_settings_are_refused_by_name(small_model, clip, case):
    options, message = OTHER[case]
    tracker = Tracker(small_model, **options)
    with pytest.raises(ValueError, match=f"^{message}"):
        tracker.track(clip[0], masks_of(clip[1]), resume=stopped(small_model, clip))
    assert tracker.bank is None


def test_another_dtype_other_weights_and_another_length_are_refused(small_model, clip):
    frames, masks, state = clip[0], masks_of(clip[1]), stopped(small_model, clip)
    model = type(small_model)(small_model.config).eval()
    model.load_state_dict(small_model.state_dict())
    assert list(Tracker(model).track(frames, masks, resume=state))
    with pytest.raises(ValueError, match="^dtype: bfloat16 instead of the float32"):
        Tracker(model.bfloat16()).track(frames, masks, resume=state)
    model.load_state_dict(small_model.state_dict())
    model = model.float()
    with torch.no_grad():
        model.Decoder.pred2.bias[0] += 1e-3
    with pytest.raises(ValueError, match="^weights: not those that the saved state was made with"):
        Tracker(model).track(frames, masks, resume=state)
    with pytest.raises(ValueError, match="^remembered frames: "):
        even = stopped(small_model, clip, memory="uniform:2")
        Tracker(small_model, memory="uniform:2").track(frames, masks, frame_count=80, resume=even)


def test_other_masks_and_frames_are_refused(small_model, clip):
    (frames, labels), state = clip, stopped(small_model, clip)
    masks, tracker = masks_of(labels), Tracker(small_model)
    for other in ({0: masks[0]}, {**masks, 3: np.roll(labels[3], 1)}, {**masks, 2: labels[2]}):
        with pytest.raises(ValueError, match="^masks: not those that the saved state was made with"):
            tracker.track(frames, other, resume=state)
    # what is said of later frames is no part of it
    assert len(list(tracker.track(frames, {**masks, 6: labels[6]}, resume=state))) == 3
    for other in (frames[::-1], frames[1:], frames[:, ::-1]):
        with pytest.raises(ValueError, match="^frames: frame 4 is not the one that the state was made at"):
            list(tracker.track(other, masks, resume=state))
    with pytest.raises(ValueError, match="^frames: expected at least 5, got 4"):
        list(tracker.track(frames[:4], masks, resume=state))
    # all was done but the end
    assert list(tracker.track(frames[:5], masks, resume=state)) == []


def test_there_is_no_state_before_the_first_frame(small_model, clip):
    tracker = Tracker(small_model)
    for _ in range(2):
        with pytest.raises(ValueError, match="state: expected a frame to be tracked before, got none"):
            tracker.state()
        tracker.track(clip[0], {0: clip[1][0]})
