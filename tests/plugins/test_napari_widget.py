"""napari's widget, without a screen: layers in, a Labels layer out."""

import os
import time

import numpy as np
import pytest

from stm_model import STM, Tracker
from stm_model.data.aquarium import aquarium_clip

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
napari = pytest.importorskip("napari")
plugin = pytest.importorskip("stm_model.plugins.napari")


@pytest.fixture(scope="module")
def clip():
    return aquarium_clip(5, (64, 96))


@pytest.fixture(autouse=True, scope="module")
def application():
    from qtpy.QtWidgets import QApplication

    return QApplication.instance() or QApplication([])


@pytest.fixture
def viewer():
    # no canvas: drawing needs OpenGL, which a machine without a screen may not have
    return napari.components.ViewerModel()


def run(application, viewer, video, drawn):
    ended = []
    worker = plugin.track_layers(viewer, viewer.add_image(video), viewer.add_labels(drawn, name="fish"))
    worker.finished.connect(lambda: ended.append(True))
    started = time.monotonic()
    while not ended and time.monotonic() - started < 60:
        application.processEvents()
        time.sleep(0.01)
    assert ended
    return viewer.layers["fish tracked"].data


def test_the_widget_tracks_what_is_drawn_as_the_tracker_does(application, viewer, clip, monkeypatch):
    frames, labels = clip

    def own_side(size, checkpoint, frame_size, masks):
        assert frame_size == frames.shape[1:3] and np.array_equal(masks[1], labels[1])

    monkeypatch.setattr(plugin, "chosen_side", own_side)
    drawn = np.zeros_like(labels, dtype=np.int32)
    drawn[1] = labels[1]
    expected = [result.labels for result in Tracker(STM.load()).track(frames, {1: labels[1]})]
    assert np.array_equal(run(application, viewer, frames, drawn), expected)


def test_the_widget_asks_for_both_layers():
    widget = plugin.track_widget()
    assert [part.name for part in widget] == ["viewer", "video", "labels", "call_button"]


def test_the_manifest_offers_the_widget():
    from importlib.resources import files

    from npe2 import PluginManifest

    manifest = PluginManifest.from_file(str(files("stm_model.plugins") / "napari.yaml"))
    (widget,) = manifest.contributions.widgets
    (command,) = manifest.contributions.commands
    assert widget.command == command.id
    module, name = command.python_name.split(":")
    assert getattr(pytest.importorskip(module), name) is plugin.track_widget


def test_pictures_are_as_they_are_shown():
    gray = np.array([[0, 100], [200, 300]], np.uint16)
    assert plugin.as_picture(gray, (100, 200))[..., 0].tolist() == [[0, 0], [255, 255]]
    color = np.array([[[0.0, 0.5, 1.0, 0.2]]])
    assert plugin.as_picture(color, (0, 1)).tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize(
    "frames, drawn, said",
    [
        ((4, 8, 9, 3), np.zeros((4, 8, 9), int), "expected a drawn object"),
        ((4, 8, 9, 3), np.ones((4, 9, 8), int), r"labels: expected \[4, 8, 9\] like the video, got \[4, 9, 8\]"),
        ((4, 8, 9, 3), np.full((4, 8, 9), 300), "up to 254, got 300"),
        ((8, 9, 3), np.ones((8, 9), int), "video: expected frames"),
    ],
)
def test_layers_that_do_not_fit_are_named(frames, drawn, said):
    with pytest.raises(ValueError, match=said):
        plugin.drawn_masks(drawn, np.zeros(frames, np.uint8))
