"""What a tracker is given: frames of any kind, settings, and input that is refused."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from stm_kernels import PagedMemory
from stm_model.tracking.tracker import Tracker


def track(model, frames, masks, **options):
    return list(Tracker(model, **options).track(frames, masks))


WRONG = {
    "no frames": (lambda f, m: ([], {0: m}), "frames: expected at least one, got none"),
    "float frames": (
        lambda f, m: (f.astype(np.float32), {0: m}),
        r"frame 0: expected a uint8 array or tensor \[H, W, 3\], or an RGB PIL image, got float32",
    ),
    "grey frames": (lambda f, m: (f[..., 0], {0: m}), r"frame 0: expected a uint8 array"),
    "channels first": (
        lambda f, m: (torch.from_numpy(f).permute(0, 3, 1, 2), {0: m}),
        r"frame 0: expected .*, got torch.uint8 \[3, 70, 90\]",
    ),
    "grey PIL image": (
        lambda f, m: ([Image.fromarray(f[0]).convert("L")], {0: m}),
        r"frame 0: .*, got uint8 \[70, 90\]",
    ),
    "names of files": (lambda f, m: (["a.png"], {0: m}), "frame 0: expected .*, got str"),
    "frames without values": (
        lambda f, m: (torch.from_numpy(f).to("meta"), {0: m}),
        "frame 0: expected a dense tensor with values, got a meta one",
    ),
    "nested frames": (
        lambda f, m: ([torch.nested.nested_tensor([torch.from_numpy(f[0])])], {0: m}),
        "frame 0: expected a dense tensor with values, got a nested one",
    ),
    "frames of eight bits with a point": (
        lambda f, m: (torch.from_numpy(f).to(torch.float8_e4m3fn), {0: m}),
        r"frame 0: expected a uint8 array or tensor .*, got torch.float8_e4m3fn \[70, 90, 3\]",
    ),
    "mask of four bits": (
        lambda f, m: (f, {0: torch.from_numpy(m).view(torch.float4_e2m1fn_x2)}),
        r"mask of frame 0: expected whole label values \[H, W\], got torch.float4_e2m1fn_x2",
    ),
    "rows of different lengths": (lambda f, m: (f, {0: [[0], [0, 1]]}), r"mask of frame 0: expected .*, got list"),
    "sparse mask": (
        lambda f, m: (f, {0: torch.from_numpy(m).to_sparse()}),
        "mask of frame 0: expected a dense tensor with values, got a sparse one",
    ),
    "nested mask": (
        lambda f, m: (f, {0: torch.nested.as_nested_tensor([torch.from_numpy(m)], layout=torch.jagged)}),
        "mask of frame 0: expected a dense tensor with values, got a nested one",
    ),
    "mask without values": (lambda f, m: (f, {0: torch.from_numpy(m).to("meta")}), "mask of frame 0: .* a meta one"),
    "sizes change": (
        lambda f, m: ([f[0], f[1][:50]], {0: m}),
        r"frame 1: expected \[H, W\] = \[70, 90\] .*, got \[50, 90\]",
    ),
    "mask of another size": (
        lambda f, m: (f, {0: m[:50]}),
        r"mask of frame 0: expected \[H, W\] = \[70, 90\] .*, got \[50, 90\]",
    ),
    "late mask of another size": (
        lambda f, m: (f, {0: m, 2: m[:, :50]}),
        r"mask of frame 2: expected \[H, W\] = \[70, 90\] .*, got \[70, 50\]",
    ),
    "no masks": (lambda f, m: (f, {}), "masks: expected at least one labelled object"),
    "empty mask": (lambda f, m: (f, {0: m * 0}), "masks: expected at least one labelled object"),
    "only void": (lambda f, m: (f, {0: m * 0 + 255}), "masks: expected at least one labelled object"),
    "NaN": (lambda f, m: (f, {0: np.where(m, np.nan, 0.0)}), "mask of frame 0: expected label values, got NaN"),
    "soft mask": (lambda f, m: (f, {0: m * 0.5}), "mask of frame 0: expected whole label values"),
    "label 256": (lambda f, m: (f, {0: m.astype(int) * 256}), r"mask of frame 0: expected labels 0…255, got 0…512"),
    "negative": (lambda f, m: (f, {0: -m.astype(int)}), "mask of frame 0: expected labels 0…255, got -2…0"),
    "colour mask": (lambda f, m: (f, {0: np.stack([m] * 3, -1)}), r"mask of frame 0: expected \[H, W\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(case, small_model, clip):
    make, message = WRONG[case]
    frames, masks = make(clip[0], clip[1][0])
    with pytest.raises(ValueError, match=message):
        track(small_model, frames, masks)


def test_frames_may_be_arrays_tensors_and_images(small_model, clip):
    frames, labels = clip[0][:4], clip[1][0]
    expected = track(small_model, frames, {0: labels})
    for given in (
        torch.from_numpy(frames),
        torch.from_numpy(frames.transpose(0, 3, 1, 2).copy()).permute(0, 2, 3, 1),
        [Image.fromarray(frame) for frame in frames],
    ):
        for mask in (labels, torch.from_numpy(labels), torch.from_numpy(labels).to(torch.bfloat16)):
            found = track(small_model, given, {0: mask})
            assert all(np.array_equal(one.labels, two.labels) for one, two in zip(expected, found, strict=True))


def test_a_run_on_tensors_goes_on(small_model, clip):
    frames, masks = torch.from_numpy(clip[0][:4]), {0: clip[1][0]}
    expected = track(small_model, frames, masks)
    tracker = Tracker(small_model)
    results = tracker.track(frames, masks)
    next(results), next(results)
    rest = list(Tracker(small_model).track(iter(frames), masks, resume=tracker.state()))
    assert [one.labels.tolist() for one in rest] == [one.labels.tolist() for one in expected[2:]]


def test_what_is_of_the_wrong_kind_is_named(small_model, clip):
    with pytest.raises(TypeError, match="model: expected an STM, as STM.load gives it, got NoneType"):
        Tracker(None)
    for size in ("a", 48.0, True):
        with pytest.raises(TypeError, match="size: expected a whole number of pixels, got "):
            Tracker(small_model, size=size)
    with pytest.raises(TypeError, match="masks: expected label maps by frame number, as {0: mask}, got ndarray"):
        track(small_model, clip[0], clip[1][0])


def test_a_size_too_small_is_named(small_model):
    with pytest.raises(ValueError, match="size: expected at least 16 pixels, got 8"):
        Tracker(small_model, size=8)


def test_the_read_is_bounded_as_asked(small_model, clip, monkeypatch):
    frames, labels = clip
    model = copy.deepcopy(small_model).double()

    def last_prediction(**options):
        # two blocks of the memory are read for the third frame, so that one can be left out
        return track(model, frames[:3], {0: labels[0]}, memory="every:1", **options)[-1].probabilities

    exact = last_prediction()
    torch.testing.assert_close(last_prediction(top_k=10**6), exact)
    assert not last_prediction(top_k=1).allclose(exact)
    # which positions are dropped is a matter of the read, see tests/kernels/test_skip.py
    asked, plain_read = [], PagedMemory.read
    monkeypatch.setattr(PagedMemory, "read", lambda *a, **k: asked.append(k["skip"]) or plain_read(*a, **k))
    last_prediction(skip=0.25)
    assert set(asked) == {0.25}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"skip": 1.0}, r"skip: expected a share of the softmax mass in \[0, 1\), got 1.0"),
        ({"top_k": 5, "skip": 0.1}, "skip: expected 0 beside top_k"),
        ({"implementation": "fast"}, "implementation: expected one of"),
    ],
)
def test_a_read_that_makes_no_sense_is_refused_at_once(options, message, small_model):
    with pytest.raises(ValueError, match=message):
        Tracker(small_model, **options)


def test_masks_after_the_end_are_said(small_model, clip):
    frames, labels = clip
    with pytest.warns(UserWarning, match=r"masks of frames \[30\] were not used: the video ended at frame 7"):
        track(small_model, iter(frames), {0: labels[0], 30: labels[1]})
    # where their number is known, at once
    for index in (30, 8, -1):
        with pytest.raises(ValueError, match=f"masks: expected frame numbers from 0 to 7, got {index}"):
            Tracker(small_model).track(frames, {0: labels[0], index: labels[1]})
    for index in ("1", 1.5, True):
        with pytest.raises(ValueError, match="masks: expected whole frame numbers as keys, got"):
            Tracker(small_model).track(frames, {0: labels[0], index: labels[1]})
