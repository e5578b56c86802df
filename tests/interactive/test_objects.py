"""Objects of a session: given by masks, named, colored and deleted; how certain they are; what is written of them."""

import json
import zipfile

import numpy as np
import pytest
import torch
from drawing import everything, middle, same, stroke

from stm_model.interactive.footage import Footage
from stm_model.interactive.results import OVERLAY, check_results, write_results
from stm_model.interactive.session import ScribbleSession
from stm_model.interactive.state import FrameMasks, certainty
from stm_model.io.formats.given import read_given
from stm_model.io.images import OVERLAY_COLORS, write_image
from stm_model.io.masks import read_mask
from stm_model.io.video import open_video


@pytest.fixture
def session(scribble_model, clip):
    return ScribbleSession(scribble_model, clip[0])


def test_masks_are_given_in_one_step(session, clip):
    masks = {index: clip[1][index].copy() for index in (0, 5)}
    masks[5][0] = 255
    session.give(masks, names={2: "bee", 3: "nobody"})
    assert session.steps == (("opened", "masks of 2 frames"), 1)
    assert session.annotated_frames == (0, 5) and session.names == {1: "object 1", 2: "bee"}
    masks[5][0] = 0
    assert all(np.array_equal(session.labels(index), masks[index]) for index in masks)
    session.run()
    assert all(np.array_equal(session.labels(index), masks[index]) for index in masks)
    # an object that is there keeps its name
    session.give({1: clip[1][1]}, names={2: "wasp"})
    assert session.names[2] == "bee"


def test_an_object_is_deleted_from_all_frames_and_comes_back(two_rounds, scribble_model, clip, tmp_path):
    two_rounds.save(tmp_path / "a.stm")
    session = ScribbleSession(scribble_model, clip[0])
    session.restore(tmp_path / "a.stm")
    session.describe(2, "bee", "#0000ff")
    session.paint(3, clip[1][3] == 2, 2)
    before = everything(session)
    session.remove(2)
    assert session.objects == (1,) and session.annotated_frames == (1,) and not session.state.fresh
    for labels, soft, left in zip(before[0], before[1], session.masks()):
        # a probability is kept to 1/255
        first, second = soft.topk(2, 0).values.numpy()
        clear = first - second > 2 / 255
        assert np.array_equal((left == 1)[clear], (labels == 1)[clear])
    assert not (session.masks() == 2).any() and session.probabilities(6).shape[0] == 2
    session.run()
    session.save(tmp_path / "b.stm")
    session.undo()
    session.undo()
    assert same(before, everything(session)) and session.names[2] == "bee"
    # a new object of that label has a look of its own
    session.redo()
    session.add_scribbles(2, [middle(clip[1][2], 2)])
    assert session.names[2] == "object 2" and session.palette[2].tolist() == OVERLAY_COLORS[1].tolist()


def test_the_pixels_of_a_deleted_object_become_background():
    # the second object wins the first pixel, the first object the others, the last one closely
    given = torch.tensor([[[0.3, 0.8, 0.45]], [[0.6, 0.1, 0.15]]])
    left = FrameMasks.pack((4, 7), given).without(7)
    assert left.objects == (4,)
    assert left.unpack((1, 3))[1, 0].numpy() == pytest.approx([0.3, 0.8 / 0.9, 0.45 / 0.85], abs=1 / 255)


def test_names_and_colors_are_saved_and_undone(session, scribble_model, clip, tmp_path):
    session.add_scribbles(0, [stroke(1, (0.5, 0.5)), stroke(2, (0.1, 0.1))])
    session.describe(1, name="Größe", color="#102030")
    session.save(tmp_path / "a.stm")
    other = ScribbleSession(scribble_model, clip[0])
    other.restore(tmp_path / "a.stm")
    assert other.names == {1: "Größe", 2: "object 2"} and other.palette[1].tolist() == [16, 32, 48]
    other.undo()
    assert other.names[1] == "object 1" and other.palette[1].tolist() == OVERLAY_COLORS[0].tolist()


@pytest.mark.parametrize(
    "attempt, message",
    [
        (lambda session: session.remove(3), "object 3 is unknown; expected one of 1, 2"),
        (lambda session: session.describe(3, "x"), "object 3 is unknown"),
        (lambda session: session.describe(1, " "), "name: expected 1 to 40 printable characters, got ' '"),
        (lambda session: session.describe(1, "a\nb"), "printable"),
        (lambda session: session.describe(1, "a" * 41), "1 to 40"),
        (lambda session: session.describe(1, "object 2"), "name: object 2 is called 'object 2' already"),
        (lambda session: session.describe(1, color="red"), "color: expected #rrggbb in lower case, got 'red'"),
        (lambda session: session.give({}), "masks: expected an object in one of them, got none"),
        (lambda session: session.give({0: np.zeros((70, 90), np.uint8)}), "expected an object"),
        (lambda session: session.give({0: np.ones((9, 9), np.uint8)}), r"mask of frame 0: expected uint8 \[70, 90\]"),
        (lambda session: session.give({8: np.ones((70, 90), np.uint8)}), "expected 0 to 7, got 8"),
        (lambda session: session.give({0: np.full((70, 90), 200, np.uint8)}), "from 0 to 127, got 200"),
    ],
)
def test_objects_that_are_refused(session, attempt, message):
    session.add_scribbles(0, [stroke(1, (0.5, 0.5)), stroke(2, (0.1, 0.1))])
    with pytest.raises(ValueError, match=message):
        attempt(session)
    assert session.steps[1] == 1


def test_certainty_is_high_for_sure_masks_and_for_none_low_for_faint_ones(session, clip):
    sure, faint = np.zeros((2, 8, 8), np.float32)
    sure[2:5, 2:5] = 0.98
    faint[2:5, 2:5], faint[6] = 0.4, 0.05
    assert certainty(sure) == pytest.approx(0.98) and certainty(faint) == pytest.approx(0.4)
    assert certainty(np.full((8, 8), 0.05, np.float32)) == 1
    # in proportion to how much of it is there
    assert certainty(np.array([[0.9, 0.3]], np.float32)) == pytest.approx(0.9 / 1.2)
    assert session.certainty == [None] * 8
    session.give({3: clip[1][3]})
    found = session.certainty
    assert found[:3] + found[4:] == [None] * 7 and found[3] == pytest.approx(1)


def test_results_are_files_of_the_session(scribble_model, clip, tmp_path):
    for index, frame in enumerate(clip[0]):
        write_image(tmp_path / "walk" / f"frame_{index + 7}.png", frame) if index else (tmp_path / "walk").mkdir()
    write_image(tmp_path / "walk" / "frame_7.png", clip[0][0])
    footage = Footage(tmp_path / "walk", most_frames=8)
    session = ScribbleSession(scribble_model, footage.frames)
    session.give(dict(enumerate(clip[1])), names={1: "ant"})
    session.describe(1, color="#0000ff")
    (tmp_path / "out").mkdir()
    done = []
    paths = write_results(
        session, footage, [OVERLAY, "png", "labelme"], tmp_path / "out", lambda *counts: done.append(counts)
    )
    assert done == [(index + 1, 8) for index in range(8)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [path.name for path in paths]
    masks, labelme = (zipfile.ZipFile(tmp_path / "out" / f"{name}.zip") for name in ("masks", "labelme"))
    # as the pictures are called
    assert masks.namelist() == [f"masks/frame_{number}.png" for number in (10, 11, 12, 13, 14, 7, 8, 9)]
    masks.extractall(tmp_path)
    assert np.array_equal(read_mask(tmp_path / "masks" / "frame_9.png"), clip[1][2])
    drawn = json.loads(labelme.read("labelme/frame_9.json"))
    assert drawn["imagePath"] == "frame_9.png" and drawn["shapes"][0]["label"] == "ant"
    shown = next(iter(open_video(tmp_path / "out" / "overlay.mp4"))).astype(int)
    inside = clip[1][0] == 1
    assert np.abs(shown - (clip[0][0] + np.array([0, 0, 255.0])) / 2)[inside].mean() < 20
    with pytest.warns(UserWarning, match="1 is ant"):
        labelme.extractall(tmp_path)
        given = read_given(tmp_path / "labelme")
    assert set(given) == set(range(7, 15))


def test_results_that_are_refused():
    for formats, message in (([], "export: expected some of overlay, png"), (["gif"], "export gif: no such format")):
        with pytest.raises(ValueError, match=message):
            check_results(formats)
