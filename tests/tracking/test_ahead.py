"""A frame is encoded while the one in front of it is segmented: the same results, every error in its turn."""

import threading

import numpy as np
import pytest
import torch

from stm_model import Tracker
from stm_model.data.synthetic import procedural_clip
from stm_model.tracking import ahead


@pytest.fixture(params=["own keys", "shared keys"])
def model(request, small_model, shared_model):
    return small_model if request.param == "own keys" else shared_model


def masks_and_frames():
    frames, labels = procedural_clip(frames=7, size=(70, 100), objects=2, seed=3)
    return {2: labels[2]}, list(frames)


def test_results_are_the_same_and_frames_are_encoded_in_another_thread(model, encodes_ahead):
    masks, frames = masks_and_frames()
    tracker, encoded = Tracker(model, ahead=True), []
    encode = tracker.model.encode_query

    def noted(images):
        encoded.append(threading.current_thread() is threading.main_thread())
        return encode(images)

    tracker.model.encode_query = noted
    tracker.ahead = False
    truth = list(tracker.track(frames, masks))
    # frames up to the one with the mask need no query
    assert encoded == [True] * 4
    encoded.clear()
    tracker.ahead = True
    found = list(tracker.track(frames, masks))
    assert encoded == [False] * 4
    for ours, true in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.probabilities, true.probabilities, rtol=1e-5, atol=1e-6)
        assert (ours.index, ours.objects) == (true.index, true.objects)
        np.testing.assert_allclose(ours.trust, true.trust, rtol=1e-4)


@pytest.mark.parametrize("taken_ahead", [True, False])
def test_an_error_comes_after_the_results_of_the_frames_before_it(small_model, encodes_ahead, taken_ahead):
    masks, frames = masks_and_frames()

    def broken():
        yield from frames[:5]
        raise OSError("the disk is gone")

    found = []
    with pytest.raises(OSError, match="the disk is gone"):
        for result in Tracker(small_model, ahead=taken_ahead).track(broken(), masks):
            found.append(result.index)
    assert found == [0, 1, 2, 3, 4]
    frames[4] = frames[4][:-3]
    with pytest.raises(ValueError, match="frame 4"):
        for result in Tracker(small_model, ahead=taken_ahead).track(frames, masks):
            last = result.index
    assert last == 3


def test_frames_that_come_as_they_are_made_are_not_waited_for(small_model, encodes_ahead):
    masks, frames = masks_and_frames()
    given = []

    def camera():
        for frame in frames:
            given.append(frame)
            yield frame

    for result in Tracker(small_model).track(camera(), masks):
        assert len(given) == result.index + 1


def test_one_thread_a_gpu_or_threads_that_spin_leave_no_other_to_encode_in(encodes_ahead, monkeypatch):
    assert ahead.pays(torch.device("cpu")) and not ahead.pays(torch.device("cuda"))
    torch.set_num_threads(1)
    assert not ahead.pays(torch.device("cpu"))
    torch.set_num_threads(2)
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert not ahead.pays(torch.device("cpu"))


def test_the_number_of_threads_stays(small_model, encodes_ahead):
    masks, frames = masks_and_frames()
    list(Tracker(small_model, ahead=True).track(frames, masks))
    assert torch.get_num_threads() == 2
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [2]
