"""Tracking both ways: backwards from the masks of later frames, then forwards, the two mixed."""

import numpy as np
import pytest
import torch

from stm_model import STM, Tracker
from stm_model.evaluation.metrics import region_similarity
from stm_model.tracking.both_ways import Backward, Hint
from stm_model.tracking.frames import pad_to_stride


@pytest.fixture(params=["own keys", "shared keys"])
def model(request, small_model, shared_model):
    return small_model if request.param == "own keys" else shared_model


def test_without_later_masks_it_is_tracking_forwards(model, clip):
    frames, labels = clip
    for one, other in zip(
        Tracker(model).track_both_ways(frames, {0: labels[0]}),
        Tracker(model).track(frames, {0: labels[0]}),
        strict=True,
    ):
        assert torch.equal(one.probabilities, other.probabilities) and np.array_equal(one.labels, other.labels)


def test_before_the_first_mask_it_is_the_reversed_video(model, clip):
    frames, labels = clip
    last = len(frames) - 1
    results = list(Tracker(model).track_both_ways(frames, {last: labels[last]}))
    mirrored = list(Tracker(model).track(frames[::-1], {0: labels[last]}))
    assert [result.index for result in results] == list(range(last + 1))
    for result, expected in zip(results, reversed(mirrored)):
        assert result.objects == expected.objects
        # two objects are kept in eight bits, the background is the rest
        torch.testing.assert_close(result.probabilities, expected.probabilities, atol=2 / 510 + 1e-5, rtol=0)
    assert np.array_equal(results[last].labels, labels[last])


def test_given_masks_come_back_and_probabilities_sum_to_one(model, clip):
    frames, labels = clip
    masks = {1: np.where(labels[1] == 1, 1, 0), 4: labels[4]}
    for result in Tracker(model, size=48).track_both_ways(frames, masks):
        total = result.probabilities.sum(0)
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)
        assert result.probabilities.min() >= 0
        assert set(result.objects) == {1, 2}
        if result.index in masks:
            for label in np.unique(masks[result.index])[1:]:
                assert np.array_equal(result.labels == label, masks[result.index] == label)


def test_what_goes_on_is_the_mixture(shared_model, clip, monkeypatch):
    """What is remembered, and seen by the decoder at the next frame, is the mixture."""
    frames, labels = clip
    masks = {0: labels[0], 4: labels[4]}
    tracker = Tracker(shared_model)
    results = list(tracker.track_both_ways(frames, masks))
    seen, segment = [], STM.segment
    monkeypatch.setattr(STM, "segment", lambda self, *inputs: seen.append(inputs[3][0]) or segment(self, *inputs))
    list(tracker.track_both_ways(frames, masks))
    # four frames backwards come before
    expected = pad_to_stride(results[2].probabilities[1:])[0]
    torch.testing.assert_close(seen[4 + 2], expected, atol=1e-6, rtol=0)


def test_weights_rise_linearly_between_the_masks_of_an_object(tmp_path):
    one, both = np.eye(4, dtype=np.uint8), np.eye(4, dtype=np.uint8) + np.eye(4, k=1, dtype=np.uint8)
    backward = Backward(tmp_path, {2: one, 10: both * one + 2 * (both - one), 6: one})
    assert backward.start == 10 and sorted(backward.mirrored) == [0, 4, 8]
    for index in range(10):
        backward.write(index, {1: torch.full((2, 3), 0.5), 2: torch.full((2, 3), 0.25)}, [0.75, 0.5])

    def weights(index: int) -> dict[int, float]:
        return {hint.label: hint.weight(hint.certainty) for hint in backward.hints(index, torch.device("cpu"))}

    assert weights(0) == {1: 1.0, 2: 1.0}
    assert weights(2) == {2: 1.0}
    assert weights(3) == {1: 0.25, 2: 1.0}
    assert weights(9) == {1: 0.75, 2: 1.0}
    assert weights(10) == weights(11) == {}
    for hint in backward.hints(5, torch.device("cpu")):
        assert hint.certainty == {1: 0.75, 2: 0.5}[hint.label]
        torch.testing.assert_close(hint.mask, torch.full((2, 3), 0.5 / hint.label), atol=1 / 255, rtol=0)


def test_a_pass_that_lost_an_object_says_little():
    mask = torch.zeros(1, 1)
    assert Hint(1, 0.5, 0.0, mask).weight(0.9) == 0
    assert Hint(1, 0.5, 0.9, mask).weight(0.0) == 1
    assert Hint(1, 0.25, 0.0, mask).weight(0.0) == 0.25
    assert Hint(1, 0.5, 0.8, mask).weight(0.4) == pytest.approx(0.8)
    assert Hint(1, 1.0, 0.1, mask).weight(1.0) == 1


def test_what_hints_leave_is_shared_by_the_others(small_model):
    session = Tracker(small_model).start()
    session.objects = [1, 2]
    session.bank.add_objects(2)
    probabilities = torch.tensor([0.5, 0.3, 0.2]).view(3, 1, 1)
    # object 1 wins the one pixel: of 2 nothing is certain
    hints = [Hint(2, 0.5, 0.0, torch.full((1, 1), 0.6)), Hint(7, 1.0, 1.0, torch.full((1, 1), 0.2))]
    found = session._mix(probabilities, hints)
    assert session.objects == [1, 2, 7]
    torch.testing.assert_close(found.flatten(), torch.tensor([0.25, 0.15, 0.4, 0.2]))
    # where all else is impossible what is left is background
    found = session._mix(torch.tensor([0.0, 0, 1, 0]).view(4, 1, 1), [Hint(2, 1.0, 1.0, torch.full((1, 1), 0.25))])
    torch.testing.assert_close(found.flatten(), torch.tensor([0.75, 0, 0.25, 0]))
    # two that want it all share it
    ones = [Hint(label, 1.0, 1.0, torch.ones(1, 1)) for label in (1, 2)]
    found = session._mix(torch.tensor([0.0, 0, 0, 1]).view(4, 1, 1), ones)
    torch.testing.assert_close(found.flatten(), torch.tensor([0, 0.5, 0.5, 0]))


def test_objects_are_followed_to_frames_before_their_mask():
    """With the weights of the package, an object shown in the middle is found at the start."""
    from stm_model.data.aquarium import aquarium_clip

    frames, labels = aquarium_clip(frames=12, size=(120, 208))
    results = list(Tracker(STM.load(dtype=torch.float32), size=192).track_both_ways(frames, {6: labels[6]}))
    for index in (0, 3, 9, 11):
        for label in (1, 2):
            assert region_similarity(results[index].labels == label, labels[index] == label) > 0.7, (index, label)


def test_a_state_of_other_later_masks_is_refused(shared_model, clip, tmp_path):
    frames, labels = clip
    masks, tracker = {0: labels[0], 5: labels[5]}, Tracker(shared_model)
    backward = Backward(tmp_path, masks)
    assert len(list(tracker.track_backward(frames, backward))) == 6
    for _ in zip(range(3), tracker.track(frames, masks, backward=backward)):
        pass
    state = tracker.state()
    assert len(list(Tracker(shared_model).track(frames, masks, resume=state, backward=backward))) == len(frames) - 3
    # what the pass backwards found depends on it
    others = masks | {5: np.where(labels[5] == 1, 1, 0)}
    with pytest.raises(ValueError, match="masks: not those that the saved state was made with"):
        Tracker(shared_model).track(frames, others, resume=state, backward=backward)
