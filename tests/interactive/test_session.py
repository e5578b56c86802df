"""A session: rounds, history, what is computed and what is not, and input that is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawing import everything, middle, same, stroke

from stm_kernels import memory_read
from stm_model import STM, STMConfig
from stm_model.data.synthetic import procedural_clip
from stm_model.interactive.blending import blend_weights, mix
from stm_model.interactive.session import ScribbleSession
from stm_model.interactive.state import LEVELS, NO_MASKS, FrameMasks
from stm_model.network import as_positions


@pytest.fixture
def session(scribble_model, clip):
    return ScribbleSession(scribble_model, clip[0])


def test_a_round_gives_masks_of_the_whole_video(session, clip):
    assert not session.masks().any() and session.objects == ()
    assert torch.equal(session.probabilities(0), torch.ones(1, 70, 90))
    session.add_scribbles(1, [middle(clip[1][1], 1)])
    done = []
    session.run(lambda *counts: done.append(counts))
    assert done == [(index, 8) for index in range(1, 9)]
    masks = session.masks()
    assert masks.shape == (8, 70, 90) and masks.dtype == np.uint8 and set(np.unique(masks)) == {0, 1}
    probabilities = session.probabilities(3)
    assert probabilities.shape == (2, 70, 90)
    torch.testing.assert_close(probabilities.sum(0), torch.ones(70, 90))
    assert np.array_equal(probabilities.argmax(0).numpy(), session.labels(3))
    assert (session.objects, session.rounds, session.annotated_frames) == ((1,), 1, (1,))


def test_a_preview_is_what_the_first_round_makes_of_that_frame(session, clip):
    session.add_scribbles(1, [middle(clip[1][1], 1)])
    before = everything(session)
    preview = session.preview(1)
    assert session.encoded_frames == 1 and same(before, everything(session))
    session.run()
    assert np.array_equal(preview, session.labels(1))


def test_undo_and_redo_are_exact(session, clip):
    frames, truths = clip
    steps = [
        lambda: session.add_scribbles(1, [middle(truths[1], 1)]),
        session.run,
        lambda: session.paint(4, truths[4] == 2, 2),
        lambda: session.add_scribbles(6, [stroke(0, (0.1, 0.1), (0.2, 0.1))]),
        session.run,
    ]
    seen = [everything(session)]
    for step in steps:
        step()
        seen.append(everything(session))
    assert not any(same(first, second) for first, second in zip(seen, seen[1:]))
    for before in seen[-2::-1]:
        session.undo()
        assert same(before, everything(session))
    with pytest.raises(ValueError, match="nothing to undo"):
        session.undo()
    for after in seen[1:]:
        session.redo()
        assert same(after, everything(session))
    with pytest.raises(ValueError, match="nothing to redo"):
        session.redo()
    session.undo()
    session.add_scribbles(0, [stroke(0, (0.5, 0.5))])
    with pytest.raises(ValueError, match="nothing to redo"):
        session.redo()


def test_no_frame_is_encoded_twice(scribble_model):
    frames, truths = procedural_clip(frames=60, size=(48, 64), objects=1, seed=1)
    session = ScribbleSession(scribble_model, frames)
    session.add_scribbles(10, [middle(truths[10], 1)])
    session.preview(10)
    session.run()
    assert session.encoded_frames == 60
    session.add_scribbles(40, [middle(truths[40], 1)])
    session.run()
    session.preview(3)
    assert session.encoded_frames == 60


def test_a_frame_is_remembered_with_the_mask_that_its_scribbles_make(session, clip):
    scribble = middle(clip[1][1], 1)
    session.add_scribbles(1, [scribble])
    segmenter = session._segmenter
    unknown = session._annotation(session.state, 1)
    assert (unknown.masks == 0.5).all()
    ((_, made),) = segmenter.segment(segmenter.remember([unknown]), [1])
    kept = FrameMasks.pack((1,), made[1:]).unpack(session.network_size)[1:]
    known = unknown._replace(masks=kept, version="known")
    ((_, expected),) = segmenter.segment(segmenter.remember([known]), [6])
    session.run()
    packed = FrameMasks.pack((1,), expected[1:]).unpack(session.network_size)
    torch.testing.assert_close(session.probabilities(6), packed, rtol=0, atol=1 / LEVELS)


def test_features_beyond_the_limit_are_computed_again_to_the_same_masks(scribble_model, clip):
    frames, truths = clip
    sessions = [ScribbleSession(scribble_model, frames, memory_limit=limit) for limit in (0, 300_000, 2**30)]
    for session in sessions:
        session.add_scribbles(1, [middle(truths[1], 1)])
        session.run()
        session.add_scribbles(1, [stroke(0, (0.1, 0.1), (0.3, 0.1))])
        session.run()
    nothing, some, everything_ = (session.encoded_frames for session in sessions)
    # each round looks at the frame just drawn on, then at all
    assert nothing == 18 and 8 < some < 18 and everything_ == 8
    assert all(session._segmenter.held_bytes <= session._segmenter.memory_limit for session in sessions)
    for session in sessions[:2]:
        # how many frames are encoded together may move a probability by a rounding
        assert np.mean(session.masks() != sessions[2].masks()) < 1e-3


def test_frames_segmented_together_are_as_those_by_themselves(scribble_model, clip, monkeypatch):
    frames, truths = clip
    found = []
    for batch_bytes in (1, 2**30):
        monkeypatch.setattr("stm_model.interactive.segmenter.BATCH_BYTES", batch_bytes)
        session = ScribbleSession(scribble_model, frames)
        session.add_scribbles(1, [middle(truths[1], 1), middle(truths[1], 2)])
        session.run()
        found.append(torch.stack([session.probabilities(index) for index in range(8)]))
    assert (found[0] - found[1]).abs().max() <= 1.5 / LEVELS


def test_the_order_of_objects_makes_no_difference(scribble_model, clip):
    frames, truths = clip
    found = []
    for labels in ((1, 2), (2, 1)):
        session = ScribbleSession(scribble_model, frames)
        session.add_scribbles(1, [middle(truths[1], label) for label in labels])
        session.run()
        assert session.objects == labels
        order = [0, *(1 + labels.index(label) for label in (1, 2))]
        found.append(torch.stack([session.probabilities(index)[order] for index in range(8)]))
    # kept in steps of 1/255, which a rounding may move by one
    assert (found[0] - found[1]).abs().max() <= 1.5 / LEVELS


def test_only_annotated_frames_decide(scribble_model, clip):
    frames, truths = clip
    changed = frames.copy()
    changed[5] = 255 - changed[5]
    masks = []
    for video in (frames, changed):
        session = ScribbleSession(scribble_model, video)
        session.add_scribbles(1, [middle(truths[1], 1)])
        session.run()
        masks.append(session.masks())
    others = [0, 1, 2, 3, 4, 6, 7]
    assert np.array_equal(masks[0][others], masks[1][others]) and not np.array_equal(masks[0][5], masks[1][5])


def test_a_new_object_is_not_remembered_where_nothing_is_known_of_it(two_rounds, scribble_model, clip):
    frames, truths = clip
    assert two_rounds.objects == (1, 2)
    # the frame with nothing but another object's scribbles must not count: its picture may be anything
    found = []
    for picture in (frames[1], 255 - frames[1]):
        video = frames.copy()
        video[1] = picture
        session = ScribbleSession(scribble_model, video)
        session.add_scribbles(1, [middle(truths[1], 1)])
        session.add_scribbles(6, [middle(truths[6], 2)])
        annotations = [session._annotation(session.state, index) for index in (1, 6)]
        assert [annotation.known for annotation in annotations] == [(True, False), (False, True)]
        memory = session._segmenter.remember(annotations)
        query = session._segmenter._query([3])
        keys = as_positions(query.key).expand(2, -1, -1)
        found.append(memory_read(keys, memory.key, memory.value, key_bias=memory.bias))
    assert torch.equal(found[0][1], found[1][1]) and not torch.equal(found[0][0], found[1][0])


def test_scribbles_of_other_labels_are_negative(session, clip):
    session.add_scribbles(2, [stroke(1, (0.2, 0.2)), stroke(2, (0.8, 0.8)), stroke(0, (0.2, 0.8))])
    annotation = session._annotation(session.state, 2)
    here = {label: (int(y * 69), int(x * 89)) for label, x, y in ((1, 0.2, 0.2), (2, 0.8, 0.8), (0, 0.2, 0.8))}
    for channel, label in enumerate((1, 2)):
        for other, place in here.items():
            assert annotation.positive[channel][place] == (other == label)
            assert annotation.negative[channel][place] == (other != label)
    assert (annotation.masks == 0.5).all()


def test_blending_falls_linearly_to_the_next_frame_annotated_before():
    nothing_before = blend_weights(5, frozenset({2}), frozenset())
    assert nothing_before.tolist() == [1, 1, 1, 1, 1]
    weights = blend_weights(11, frozenset({4}), frozenset({0, 10}))
    expected = [0, 0.25, 0.5, 0.75, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    np.testing.assert_allclose(weights, expected, atol=1e-12)
    beyond = blend_weights(8, frozenset({5}), frozenset({1, 3}))
    assert beyond.tolist() == [0, 0, 0, 0, 0.5, 1, 1, 1]
    between = blend_weights(6, frozenset({0, 5}), frozenset({2}))
    np.testing.assert_allclose(between, [1, 0.5, 0, 1 / 3, 2 / 3, 1], atol=1e-12)


def test_a_mixture_is_a_distribution_and_lets_new_objects_in():
    generator = torch.Generator().manual_seed(0)
    old = FrameMasks.pack((3,), torch.rand(1, 4, 5, generator=generator))
    new = torch.softmax(torch.randn(3, 4, 5, generator=generator), 0)
    before = old.unpack((4, 5), (7, 3))
    assert torch.equal(before[[0, 2]], old.unpack((4, 5))) and not before[1].any()
    for weight in (0.0, 0.3, 1.0):
        mixed = mix(new, before, [1], weight)
        torch.testing.assert_close(mixed.sum(0), torch.ones(4, 5))
        torch.testing.assert_close(mixed[1], new[1])
        torch.testing.assert_close(mixed[2], weight * new[2] + (1 - weight) * before[2] * (1 - new[1]))
    torch.testing.assert_close(mix(new, before, [1], 1.0), new)


def test_rounds_are_mixed_between_annotated_frames_and_new_objects_enter_everywhere(session, monkeypatch):
    shares = {1: [0.2], 2: [0.6, 0.3]}

    def segment(memory, asked):
        for index in asked:
            objects = torch.tensor(shares[len(memory.key)])[:, None, None].expand(-1, 70, 90)
            yield index, torch.cat([1 - objects.sum(0, keepdim=True), objects])

    monkeypatch.setattr(session._segmenter, "segment", segment)
    session.add_scribbles(0, [stroke(1, (0.5, 0.5))])
    session.add_scribbles(2, [stroke(1, (0.5, 0.5))])
    session.run()
    session.add_scribbles(6, [stroke(2, (0.5, 0.5))])
    session.run()
    for index, weight in enumerate([0, 0, 0, 0.25, 0.5, 0.75, 1, 1]):
        # the first object had 0.2, and keeps what the second one leaves of it
        expected = [weight * 0.6 + (1 - weight) * 0.2 * 0.7, 0.3]
        for found, value in zip(session.probabilities(index)[1:], expected, strict=True):
            torch.testing.assert_close(found, torch.full((70, 90), value), rtol=0, atol=0.5 / LEVELS + 1e-2 / LEVELS)


def test_a_frame_annotated_before_keeps_its_masks(session, clip):
    truths = clip[1]
    session.add_scribbles(0, [middle(truths[0], 1)])
    session.run()
    before = session.masks()
    session.add_scribbles(4, [stroke(0, (0.1, 0.9), (0.9, 0.9)), middle(truths[4], 1)])
    session.run()
    after = session.masks()
    assert np.array_equal(before[0], after[0]) and not np.array_equal(before[4], after[4])


@pytest.mark.parametrize("size", [None, 64])
def test_a_painted_mask_stays_until_scribbles_correct_it(scribble_model, clip, size):
    frames, truths = clip
    session = ScribbleSession(scribble_model, frames, size=size)
    session.paint(2, truths[2] == 1, 1)
    session.paint(2, truths[2] == 2, 2)
    assert np.array_equal(session.labels(2), truths[2]) and session.annotated_frames == (2,)
    session.run()
    assert np.array_equal(session.labels(2), truths[2])
    assert session.labels(5).any()
    session.add_scribbles(2, [stroke(0, *np.argwhere(truths[2] == 1)[:1, ::-1] / (89, 69))])
    session.run()
    assert not np.array_equal(session.labels(2), truths[2])


def test_painting_over_an_object_takes_it_away(session):
    left, all_ = np.zeros((70, 90), bool), np.ones((70, 90), bool)
    left[:, :40] = True
    session.paint(0, all_, 1)
    session.paint(0, left, 2)
    labels = session.labels(0)
    assert (labels[:, :40] == 2).all() and (labels[:, 40:] == 1).all()
    # and it does not come back where the second one is erased
    session.paint(0, np.zeros((70, 90), bool), 2)
    labels = session.labels(0)
    assert not labels[:, :40].any() and (labels[:, 40:] == 1).all()


@pytest.mark.parametrize("direction, changed", [("both", range(8)), ("forward", range(3, 8)), ("backward", range(4))])
def test_tracking_from_a_frame(session, tracking_model, clip, direction, changed):
    truths = clip[1]
    session.paint(3, truths[3] == 1, 1)
    done = []
    session.track_from(3, tracking_model, direction, lambda *counts: done.append(counts))
    assert done[-1] == (len(changed) - 1, len(changed) - 1)
    assert [index for index in range(8) if (session.labels(index) == 1).any()] == list(changed)
    pairs = [(truths[index] == 1, session.labels(index) == 1) for index in changed]
    assert np.mean([(truth & found).sum() / (truth | found).sum() for truth, found in pairs]) > 0.5


def test_tracking_leaves_other_objects_where_there_is_room(session, tracking_model, clip):
    truths = clip[1]
    session.paint(5, truths[5] == 2, 2)
    session.paint(3, truths[3] == 1, 1)
    session.track_from(3, tracking_model)
    labels = session.labels(5)
    assert (labels[truths[5] == 2] == 2).mean() > 0.9 and (labels == 1).any()


def test_work_that_is_stopped_leaves_the_session_as_it_was(session, tracking_model, clip):
    session.add_scribbles(1, [middle(clip[1][1], 1)])
    session.run()
    before = everything(session), session.steps

    def stop(done, total):
        if done == 3:
            raise InterruptedError

    for work in (session.run, lambda progress: session.track_from(1, tracking_model, progress=progress)):
        with pytest.raises(InterruptedError):
            work(stop)
        assert same(before[0], everything(session)) and session.steps == before[1]


@pytest.mark.parametrize(
    "attempt, message",
    [
        (lambda s: s.add_scribbles(8, [stroke(1, (0, 0))]), "frame_index: expected 0 to 7, got 8"),
        (lambda s: s.add_scribbles(-1, [stroke(1, (0, 0))]), "frame_index: expected 0 to 7, got -1"),
        (lambda s: s.add_scribbles(0, [stroke(1, (0, 1.5))]), r"the point \[0, 1.5\] is outside the frame"),
        (lambda s: s.add_scribbles(0, [stroke(-3, (0, 0))]), "object_id: expected a whole number from 0 to 127"),
        (lambda s: s.add_scribbles(0, [{"path": [[0, 0]]}]), "scribble 0: expected"),
        (lambda s: s.add_scribbles(0, []), "expected at least one, got none"),
        (lambda s: s.run(), "draw a scribble on one first"),
        (lambda s: s.preview(0), "draw a scribble on one first"),
        (lambda s: s.labels(9), "frame_index: expected 0 to 7, got 9"),
        (lambda s: s.paint(0, np.zeros((3, 3), bool)), r"mask: expected bool \[70, 90\], got bool \[3, 3\]"),
        (lambda s: s.paint(0, np.zeros((70, 90))), r"got float64 \[70, 90\]"),
        (lambda s: s.paint(0, np.zeros((70, 90), bool), 0), "got 0, the background"),
        (lambda s: s.track_from(0, s._segmenter.model), "expected an object to track, got an empty mask"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(session, attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt(session)
    assert session.steps == (("opened",), 0)


def test_what_a_session_cannot_be_made_of(scribble_model, tracking_model, clip, session):
    for arguments, message in [
        ((tracking_model, clip[0]), "expected a network guided by scribbles"),
        ((scribble_model, []), "frames: expected at least one"),
    ]:
        with pytest.raises(ValueError, match=message):
            ScribbleSession(*arguments)
    with pytest.raises(ValueError, match="size: expected at least 16 pixels, got 8"):
        ScribbleSession(scribble_model, clip[0], size=8)
    session.paint(0, np.ones((70, 90), bool))
    with pytest.raises(ValueError, match="guided by masks"):
        session.track_from(0, scribble_model)
    with pytest.raises(ValueError, match="direction: expected one of"):
        session.track_from(0, tracking_model, "sideways")


def test_masks_of_no_frame_are_all_background():
    assert torch.equal(NO_MASKS.unpack((2, 3)), torch.ones(1, 2, 3))


def test_a_network_of_the_shared_form_takes_scribbles_and_corrections(clip):
    torch.manual_seed(0)
    config = replace(STMConfig.shared("scribbles"), key_channels=8, value_channels=12, decoder_channels=16)
    model = STM(config).eval().requires_grad_(False)
    frames, truths = clip
    cached, anew = (ScribbleSession(model, frames, memory_limit=limit) for limit in (2**30, 0))
    for session in (cached, anew):
        session.add_scribbles(1, [middle(truths[1], 1), middle(truths[1], 2)])
        session.run()
        session.add_scribbles(6, [middle(truths[6], 2)])
        session.run()
    assert cached.encoded_frames == len(frames) < anew.encoded_frames
    assert cached.masks().any() and np.array_equal(cached.masks(), anew.masks())
