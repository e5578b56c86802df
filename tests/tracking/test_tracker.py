"""Tracking: what is remembered, objects that enter later, sizes, void, and wrong input."""

import weakref

import numpy as np
import pytest
import torch

import stm_model.tracking.session as session_module
from stm_kernels import PagedMemory
from stm_model.tracking.budget import MemoryRule
from stm_model.tracking.frames import pad_to_stride, scaled_size
from stm_model.tracking.tracker import Tracker
from stm_model.tracking.trust import FAINT


def track(model, frames, masks, **options):
    return list(Tracker(model, **options).track(frames, masks))


def remembered(rule: str, frame_count: int, monkeypatch, model, clip) -> list[list[int]]:
    """The frames in memory when each frame is segmented, seen from outside: by the keys that are read."""
    reads = []

    original = PagedMemory.read

    def spy(self, query_key, **options):
        keys = torch.cat([key for key, _ in self.state()["pages"]], 1)[0]
        reads.append(torch.stack(keys.split(query_key.shape[1])))
        return original(self, query_key, **options)

    monkeypatch.setattr(PagedMemory, "read", spy)
    frames, labels = clip
    frames = np.stack([frames[index % len(frames)] for index in range(frame_count)])
    # every frame looks different, so its keys tell it
    frames = frames // 2 + (np.arange(frame_count, dtype=np.uint8) * 9)[:, None, None, None]
    everything = track(model, frames, {0: labels[0]}, memory="every:1")
    all_keys = reads[-1]
    reads.clear()
    # the first mask is given again and again, so that memories do not drift apart
    del everything
    masks = {0: labels[0]}
    track(model, frames, masks, memory=rule)
    return [[int((all_keys - key).abs().amax((1, 2)).argmin()) for key in keys] for keys in reads]


@pytest.mark.parametrize(
    "rule, expected",
    [
        ("first", [[0]] * 7),
        ("previous", [[t - 1] for t in range(1, 8)]),
        ("first+previous", [[0]] + [[0, t - 1] for t in range(2, 8)]),
        ("first+every:3", [[0], [0], [0], [0, 3], [0, 3], [0, 3], [0, 3, 6]]),
        ("every:3", [[0], [0, 1], [0, 2], [0, 3], [0, 3, 4], [0, 3, 5], [0, 3, 6]]),
        # round(linspace(0, 8, 4)[:-1]) = 0, 3, 5
        ("uniform:2", [[0], [0, 1], [0, 2], [0, 3], [0, 3, 4], [0, 3, 5], [0, 3, 5, 6]]),
    ],
)
def test_rules_remember_the_frames_they_name(rule, expected, monkeypatch, small_model, clip):
    assert remembered(rule, 8, monkeypatch, small_model, clip) == expected


def test_the_released_grid_of_a_fixed_number():
    rule = MemoryRule.parse("uniform:5", frame_count=80)
    assert rule.kept == {0, 13, 27, 40, 53, 67}


@pytest.mark.parametrize(
    "text", ["", "every", "every:0", "every:-1", "every:x", "uniform:", "second", "every:5:5", "previous+every:5"]
)
def test_what_is_no_rule(text, small_model):
    with pytest.raises(ValueError, match="memory: expected first, previous"):
        Tracker(small_model, memory=text)


def test_uniform_needs_the_number_of_frames(small_model, clip):
    frames, labels = clip
    with pytest.raises(ValueError, match="uniform:2 needs the number of frames"):
        Tracker(small_model, memory="uniform:2").track(iter(frames), {0: labels[0]})
    assert len(list(Tracker(small_model, memory="uniform:2").track(iter(frames), {0: labels[0]}, frame_count=8))) == 8


def test_masks_sum_to_one_and_have_the_frames_size(small_model, clip):
    frames, labels = clip
    for size in (None, 32, 200):
        for index, result in enumerate(track(small_model, frames, {0: labels[0]}, size=size)):
            assert result.index == index and result.objects == (1, 2)
            assert result.labels.shape == frames.shape[1:3] and result.labels.dtype == np.uint8
            assert result.probabilities.shape == (3, *frames.shape[1:3])
            torch.testing.assert_close(result.probabilities.sum(0), torch.ones(frames.shape[1:3]))
            if size is None:
                values = np.array([0, 1, 2])
                np.testing.assert_array_equal(values[result.probabilities.argmax(0).numpy()], result.labels)


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 31), (33, 90)])
def test_any_frame_size(small_model, size):
    frames = np.random.default_rng(0).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    mask = np.zeros(size, np.uint8)
    mask[: max(1, size[0] // 2)] = 1
    assert [result.labels.shape for result in track(small_model, frames, {0: mask})] == [size] * 3


def test_labels_come_back_as_they_were_given(small_model, clip):
    frames, labels = clip
    renamed = np.array([0, 7, 200], np.uint8)[labels]
    plain = track(small_model, frames, {0: labels[0]})
    results = track(small_model, frames, {0: renamed[0]})
    np.testing.assert_array_equal(results[0].labels, renamed[0])
    for one, other in zip(plain, results, strict=True):
        np.testing.assert_array_equal(np.array([0, 7, 200], np.uint8)[one.labels], other.labels)
        assert other.objects == (7, 200)


def test_the_given_mask_comes_back_exactly_at_any_network_size(small_model, clip):
    frames, labels = clip
    results = track(small_model, frames, {0: labels[0], 4: labels[4]}, size=32)
    np.testing.assert_array_equal(results[0].labels, labels[0])
    np.testing.assert_array_equal(results[4].labels, labels[4])


def test_at_another_network_size_a_mask_of_one_object_leaves_the_other(small_model, clip, monkeypatch):
    frames, labels = clip
    found = torch.zeros(3, 32, 41)
    found[2, :, :20], found[0, :, 20:] = 1, 1  # object 2 on the left
    segment = session_module.TrackingSession._segment

    def segmented(video, image, query):
        return (None, found, [0.0, 0.0]) if video.objects else segment(video, image, query)

    monkeypatch.setattr(session_module.TrackingSession, "_segment", segmented)
    mask = np.zeros_like(labels[1])
    mask[:30, :30] = 1
    result = track(small_model, frames[:2], {0: labels[0], 1: mask}, size=32)[1].labels
    np.testing.assert_array_equal(result == 1, mask == 1)
    # but for the few pixels over which the resized mask's edge blurs
    assert (result[34:, :42] == 2).all() and (result[:, 34:42] == 2).all() and not result[:, 46:].any()


@pytest.mark.parametrize("size", [(70, 90), (90, 70)])
def test_the_shorter_side_is_what_is_asked_for(size):
    assert scaled_size(size, 35) == tuple(side // 2 for side in size) and scaled_size(size, None) == size


def test_masks_lie_where_the_frame_does_and_not_its_padding(small_model, clip):
    """A frame that comes with the padding around it gives the same masks within it."""
    frames, labels = clip
    around = ((5, 5), (3, 3))  # 70 × 90 → 80 × 96
    wide = np.stack([np.pad(frame, (*around, (0, 0))) for frame in frames[:2]])
    padded = track(small_model, wide, {0: np.pad(labels[0], around)})[1].probabilities[:, 5:-5, 3:-3]
    torch.testing.assert_close(track(small_model, frames[:2], {0: labels[0]})[1].probabilities, padded)


def test_an_object_too_small_for_the_networks_size_is_not_forgotten(small_model, clip):
    frames, labels = clip
    mask = np.zeros_like(labels[0])
    mask[20:50, 20:50], mask[0, 1] = 1, 2
    results = track(small_model, frames, {0: mask}, size=16)
    np.testing.assert_array_equal(results[0].labels, mask)
    assert all(result.objects == (1, 2) for result in results)


def test_a_rule_must_remember_something():
    with pytest.raises(ValueError, match="expected a rule that remembers the first or the previous frame"):
        MemoryRule(kept=None, first=False, previous=False)


def test_void_says_nothing(small_model, clip):
    frames, labels = clip
    with_void = labels[0].copy()
    with_void[:20, :20][with_void[:20, :20] == 0] = 255
    for one, other in zip(
        track(small_model, frames, {0: labels[0]}), track(small_model, frames, {0: with_void}), strict=True
    ):
        np.testing.assert_array_equal(one.labels, other.labels)
    # later in the video a void pixel keeps its prediction
    before = track(small_model, frames, {0: labels[0]})[3].labels
    mask = np.full_like(labels[3], 255)
    mask[-1, -1] = 1
    after = track(small_model, frames, {0: labels[0], 3: mask})[3].labels
    before[-1, -1] = 1
    np.testing.assert_array_equal(after, before)


def test_an_object_that_enters_later(small_model, clip):
    frames, labels = clip
    first = np.where(labels[0] == 1, 1, 0).astype(np.uint8)
    second = np.where(labels[4] == 2, 2, 0).astype(np.uint8)
    results = track(small_model, frames, {0: first, 4: second}, memory="every:2")
    alone = track(small_model, frames, {0: first}, memory="every:2")
    for index in range(4):
        np.testing.assert_array_equal(results[index].labels, alone[index].labels)
        assert results[index].objects == (1,)
    for index in range(4, 8):
        assert results[index].objects == (1, 2) and results[index].probabilities.shape[0] == 3
    # the new mask takes its pixels and leaves the others to the prediction
    np.testing.assert_array_equal(results[4].labels, np.where(second, 2, alone[4].labels))


def test_a_mask_before_anything_is_known_leaves_background(small_model, clip):
    frames, labels = clip
    results = track(small_model, frames, {3: labels[3]})
    for index in range(3):
        assert not results[index].labels.any() and results[index].objects == ()
        assert torch.equal(results[index].probabilities, torch.ones(1, *frames.shape[1:3]))
    np.testing.assert_array_equal(results[3].labels, labels[3])
    # and from there on it is as if the video had started there
    late = track(small_model, frames[3:], {0: labels[3]}, memory="first+previous")
    for one, other in zip(track(small_model, frames, {3: labels[3]}, memory="first+previous")[3:], late, strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)


def test_a_mask_of_a_known_object_replaces_its_prediction(small_model, clip):
    frames, labels = clip
    results = track(small_model, frames, {0: labels[0], 3: labels[3]})
    np.testing.assert_array_equal(results[3].labels, labels[3])
    assert results[3].objects == (1, 2)
    torch.testing.assert_close(results[3].probabilities.sum(0), torch.ones(labels[3].shape))


def test_frames_stream_and_are_let_go(small_model, clip):
    frames, labels = clip
    alive = []

    class Frame(np.ndarray):
        """An array that can be watched."""

    def source():
        for frame in frames:
            watched = frame.copy().view(Frame)
            alive.append(weakref.ref(watched))
            yield watched
            del watched

    for count, _ in enumerate(Tracker(small_model).track(source(), {0: labels[0]}), start=1):
        assert len(alive) == count, "frames are taken one at a time"
        assert sum(reference() is not None for reference in alive) <= 2


def test_gradient_mode_is_the_callers_between_frames(small_model, clip):
    frames, labels = clip
    for _ in Tracker(small_model).track(frames, {0: labels[0]}):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_a_folded_copy_runs_and_the_model_stays(small_model, clip):
    before = {name: value.clone() for name, value in small_model.state_dict().items()}
    track(small_model, clip[0][:3], {0: clip[1][0]})
    after = small_model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_padding_is_symmetric_with_the_odd_pixel_below_and_right():
    padded, (top, left) = pad_to_stride(torch.ones(1, 21, 33))
    assert padded.shape == (1, 32, 48) and (top, left) == (5, 7)
    assert padded[0, 5:26, 7:40].all() and padded.sum() == 21 * 33


def test_certainty_is_the_mean_probability_weighted_by_itself(small_model, clip):
    frames, labels = clip
    first, *others = track(small_model, frames, {0: labels[0]})
    assert first.certainty == (1.0, 1.0)
    for result in others:
        for channel, certainty in enumerate(result.certainty, 1):
            seen = result.probabilities[channel].double()
            seen = seen[seen > FAINT]
            shown = (result.labels == result.objects[channel - 1]).any()
            expected = (seen.square().sum() / seen.sum()).item() if shown else 0.0
            assert certainty == pytest.approx(expected, abs=1e-6)


def test_familiarity_is_the_similarity_that_the_read_finds(small_model, clip):
    frames, labels = clip
    noise = np.random.default_rng(0).integers(0, 256, frames[0].shape, dtype=np.uint8)
    results = track(small_model, np.stack([frames[0], frames[0], noise]), {0: labels[0]}, memory="first")
    assert results[0].familiarity == (-np.inf, -np.inf)
    assert all(again > other for again, other in zip(results[1].familiarity, results[2].familiarity, strict=True))
    # a memory that holds the same twice is as familiar
    twice = track(small_model, np.stack([frames[0]] * 3), {0: labels[0], 1: labels[0]}, memory="first")
    # without the mean it would grow by ln 2 = 0.69; float32 rounds the similarities, some tens here, at 1e-5
    assert twice[2].familiarity == pytest.approx(twice[1].familiarity, abs=1e-3)


@pytest.mark.parametrize("skip_uncertain", [False, True])
def test_uncertain_frames_are_kept_out_of_the_memory(small_model, clip, monkeypatch, skip_uncertain):
    frames, labels = clip
    certainties = iter([[1.0, 1.0], [0.9, 0.6], [0.6, 0.1], [0.9, 0.7], [0.1, 0.1], [0.9, 0.9], [1.0, 1.0], [1.0, 1.0]])
    monkeypatch.setattr(session_module, "certainty_of", lambda *_: next(certainties))
    monkeypatch.setattr(session_module, "agreement_of", lambda *_: [1.0, 1.0])
    monkeypatch.setattr(session_module, "UNTRUSTED", 0.7)
    # the mask of frame 2 is no correction
    monkeypatch.setattr(session_module, "WRONG", 0.0)
    tracker = Tracker(small_model, memory="every:1", skip_uncertain=skip_uncertain)
    assert len(list(tracker.track(frames, {0: labels[0], 2: labels[2]}))) == 8
    # the mask of frame 2 was given; frame 7 is nobody's previous frame
    kept = [0, 2, 3, 5, 6] if skip_uncertain else [0, 1, 2, 3, 4, 5, 6]
    assert tracker.bank.memories[0].frames == kept
