"""CVAT's tracking function, called by the agent's own code; its server is left out."""

import itertools

import numpy as np
import pytest
from PIL import Image

from stm_model.data.aquarium import aquarium_clip
from stm_model.evaluation.metrics import region_similarity
from stm_model.io.formats.rle import decode_segmentation
from stm_model.tracking.session import TrackingSession

masks = pytest.importorskip("cvat_sdk.masks")
TrackableShape = pytest.importorskip("cvat_sdk.auto_annotation").TrackableShape
agent = pytest.importorskip("cvat_cli._internal.agent_driver_tracking")
driver = pytest.importorskip("cvat_cli._internal.agent_driver")
loader = pytest.importorskip("cvat_cli._internal.common").FunctionLoader

TASK = 7


@pytest.fixture(scope="module")
def clip():
    frames, labels = aquarium_clip(8, (120, 216))
    return [Image.fromarray(frame) for frame in frames], labels


@pytest.fixture
def function():
    loaded = loader("stm_model.plugins.cvat", None, {"size": 120, "device": "cpu"}).load()
    driver.set_worker_current_function(loaded)
    agent.AgentTrackingFunctionDriver.init_worker(map(str, itertools.count()).__next__)
    return loaded


def start(picture, shapes):
    return agent._worker_job_init_tracking(TASK, picture, shapes)


def follow(picture, states):
    return agent._worker_job_track(TASK, picture, states)


def mask_shape(mask):
    return TrackableShape(type="mask", points=masks.encode_mask(mask))


def mask_of(shape, size):
    if shape.type == "mask":
        return masks.decode_mask(shape.points, image_height=size[0], image_width=size[1])
    return decode_segmentation([shape.points], size)


def polygon_shape(mask):
    rows, columns = mask.nonzero()
    left, top, right, bottom = columns.min(), rows.min(), columns.max(), rows.max()
    corners = [left, top, right, top, right, bottom, left, bottom]
    return TrackableShape(type="polygon", points=[float(value) for value in corners])


def test_masks_are_followed_as_by_the_tracker(function, clip):
    pictures, labels = clip
    states = start(pictures[0], [mask_shape(labels[0] == label) for label in (1, 2)])
    expected = list(function.tracker.track([np.array(picture) for picture in pictures], {0: labels[0]}))
    for picture, result in zip(pictures[1:], expected[1:]):
        for label, shape in zip((1, 2), follow(picture, states)):
            assert np.array_equal(mask_of(shape, labels[0].shape), result.labels == label)


def test_a_picture_is_encoded_once_for_all_shapes_of_a_request(function, clip, monkeypatch):
    pictures, labels = clip
    steps = []
    step = TrackingSession.step
    monkeypatch.setattr(TrackingSession, "step", lambda self, frame: steps.append(1) or step(self, frame))
    states = start(pictures[0], [mask_shape(labels[0] == label) for label in (1, 2)])
    follow(pictures[1], states)
    assert len(steps) == 2
    # shapes of another request are followed for themselves
    follow(pictures[2], [*states, *start(pictures[1], [mask_shape(labels[1] == 1)])])
    assert len(steps) == 5


def test_a_polygon_comes_back_as_one(function, clip):
    pictures, labels = clip
    drawn = polygon_shape(labels[0] == 1)
    (state,) = start(pictures[0], [drawn])
    (shape,) = follow(pictures[0], [state])
    assert shape.type == "polygon" and len(shape.points) >= 6
    drawn_mask = mask_of(drawn, labels[0].shape)
    assert region_similarity(mask_of(shape, labels[0].shape), drawn_mask) > 0.5


@pytest.mark.parametrize("small, side", [(0.0, 480), (1.0, 600)])
def test_small_objects_are_seen_larger(function, clip, monkeypatch, small, side):
    monkeypatch.setattr("stm_model.runtime.SMALL", small)
    function.size = None
    pictures, labels = clip
    start(pictures[0], [mask_shape(labels[0] == 1)])
    assert function.tracker.size == side


def test_what_is_not_to_be_seen_is_none(function, clip):
    pictures, labels = clip
    (state,) = start(pictures[0], [mask_shape(labels[0] == 1)])
    assert follow(Image.new("RGB", pictures[0].size, "white"), [state]) == [None]


@pytest.mark.parametrize(
    "shape, said",
    [
        (TrackableShape(type="mask", points=[0.0, 1.0, 500.0, 0.0, 500.0, 0.0]), "bounding box"),
        (TrackableShape(type="mask", points=[1.0, 0.0, 0.0, 0.0, 0.0]), "empty"),
    ],
)
def test_a_shape_outside_or_empty_is_refused(function, clip, shape, said):
    with pytest.raises(ValueError, match=said):
        start(clip[0][0], [shape])
