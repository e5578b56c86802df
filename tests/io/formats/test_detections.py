"""A frame's result as supervision's Detections."""

import sys

import numpy as np
import pytest
import torch

from stm_model.tracking.result import FrameResult


def result(labels, objects=(7, 9, 3), certainty=(0.9, 0.5, 0.0)):
    return FrameResult(0, labels, torch.zeros(len(objects) + 1, *labels.shape), objects, certainty)


def test_objects_that_are_in_the_frame(labels):
    import supervision

    found = result(labels[1]).detections()
    assert isinstance(found, supervision.Detections) and len(found) == 2  # 3 is not in it
    assert found.class_id.tolist() == found.tracker_id.tolist() == [7, 9]
    np.testing.assert_allclose(found.confidence, [0.9, 0.5])
    assert found["class_name"].tolist() == ["object 7", "object 9"]
    for mask, (left, top, right, bottom), label in zip(found.mask, found.xyxy.astype(int), (7, 9)):
        np.testing.assert_array_equal(mask, labels[1] == label)
        rows, columns = np.nonzero(mask)
        assert (left, top, right, bottom) == (columns.min(), rows.min(), columns.max(), rows.max())


def test_no_object():
    assert len(result(np.zeros((4, 5), dtype=np.uint8)).detections()) == 0


def test_without_supervision_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match=r"pip install 'stm-kernels\[supervision\]'"):
        result(np.zeros((4, 5), dtype=np.uint8)).detections()
