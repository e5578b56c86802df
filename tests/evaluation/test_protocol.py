"""Which frames a benchmark gives, asks for and scores, and what its folders must hold."""

import json
import shutil

import numpy as np
import pytest

from stm_model.evaluation.protocol import open_dataset
from stm_model.io.masks import read_mask, write_mask


def test_davis_gives_the_first_mask_and_scores_all_but_the_ends(davis, clips):
    dataset = open_dataset("davis2017", davis)
    assert [video.name for video in dataset.videos] == ["ant", "bee", "cat"]
    for video in dataset.videos:
        count = len(clips[video.name][0])
        assert video.objects == (1, 2) and video.entries == {0: (1, 2)}
        assert video.asked == tuple(range(count))
        assert video.scored == dict.fromkeys(range(1, count - 1), (1, 2))
        np.testing.assert_array_equal(video.given_masks()[0], clips[video.name][1][0])


def test_davis_2016_has_one_object(davis, clips, tmp_path):
    video = open_dataset("davis2016", davis, videos=["bee"]).videos[0]
    assert video.objects == (1,)
    np.testing.assert_array_equal(video.read_annotation(2), (clips["bee"][1][2] > 0).astype(np.uint8))
    # as released its annotations are black and white
    root = shutil.copytree(davis, tmp_path / "davis")
    for path in (root / "Annotations/480p/bee").iterdir():
        write_mask(path, np.where(read_mask(path) > 0, 255, 0))
    white = open_dataset("davis2016", root, videos=["bee"]).videos[0]
    assert white.objects == (1,)
    np.testing.assert_array_equal(white.read_annotation(2), video.read_annotation(2))


@pytest.mark.parametrize(("name", "objects"), [("davis2016", {0, 1}), ("davis2017", {0, 1, 2})])
def test_void_pixels_stay_void(davis, tmp_path, name, objects):
    root = shutil.copytree(davis, tmp_path / "davis")
    path = root / "Annotations/480p/bee/00000.png"
    labels = read_mask(path)
    labels[:4] = 255
    write_mask(path, labels)
    (video,) = open_dataset(name, root, videos=["bee"]).videos
    for mask in (video.read_annotation(0), video.given_masks()[0]):
        assert (mask[:4] == 255).all() and set(np.unique(mask[4:])) == objects


def test_davis_without_public_ground_truth_is_not_scored(davis, tmp_path):
    root = shutil.copytree(davis, tmp_path / "davis")
    for path in (root / "Annotations/480p/ant").iterdir():
        if path.stem != "00000":
            path.unlink()
    assert open_dataset("davis2017", root, videos=["ant"]).videos[0].scored == {}


def test_each_year_has_its_own_list(davis, tmp_path):
    root = shutil.copytree(davis, tmp_path / "davis")
    (root / "ImageSets/2017/val.txt").write_text("cat\n")
    assert [video.name for video in open_dataset("davis2017", root).videos] == ["cat"]
    assert len(open_dataset("davis2016", root).videos) == 3


def test_youtube_vos_gives_each_object_where_it_enters(youtube_vos, clips):
    dataset = open_dataset("youtube_vos", youtube_vos)
    ant, bee = dataset.videos
    assert len(ant.frame_paths) == 9 and ant.asked == (0, 2, 4, 6, 8) and bee.asked == (2, 4)
    assert ant.entries == {0: (1,), 4: (2,)} and bee.entries == {2: (1,)}
    assert ant.scored == {2: (1,), 4: (1,), 6: (1, 2), 8: (1, 2)} and bee.scored == {4: (1,)}
    assert ant.groups == {1: "seen", 2: "unseen"} and bee.groups == {1: "seen"}
    given = ant.given_masks()
    assert set(np.unique(given[0])) == {0, 1} and set(np.unique(given[4])) == {0, 2}
    np.testing.assert_array_equal(given[4] == 2, clips["ant"][1][4] == 2)


def test_youtube_vos_with_the_public_masks_alone_is_not_scored(youtube_vos, tmp_path):
    root = shutil.copytree(youtube_vos, tmp_path / "youtube_vos")
    (root / "valid/Annotations/ant/00006.png").unlink()
    ant, bee = open_dataset("youtube_vos", root).videos
    assert ant.scored == {} and bee.scored == {4: (1,)}


def test_youtube_vos_without_the_training_categories_has_no_groups(youtube_vos, tmp_path):
    root = shutil.copytree(youtube_vos, tmp_path / "youtube_vos")
    (root / "train/meta.json").unlink()
    assert open_dataset("youtube_vos", root).videos[0].groups == {}


def test_lvos_finds_where_objects_appear(lvos):
    video = open_dataset("lvos", lvos).videos[0]
    assert video.entries == {0: (1,), 30: (2,)} and len(video.frame_paths) == 54
    assert video.scored == {6: (1,), 12: (1,), 18: (1,), 24: (1,), 30: (1,), 36: (1, 2), 42: (1, 2), 48: (1, 2)}
    assert video.asked == tuple(range(54)) and video.mask_name(48) == "00000048.png"


def test_lvos_with_the_given_masks_alone_is_not_scored(lvos, tmp_path):
    root = shutil.copytree(lvos, tmp_path / "lvos")
    for path in (root / "valid/Annotations/long").iterdir():
        if int(path.stem) not in (0, 30):
            path.unlink()
    video = open_dataset("lvos", root).videos[0]
    assert video.entries == {0: (1,), 30: (2,)} and video.scored == {}


def _remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("davis2017", lambda root: _remove(root / "ImageSets/2017/val.txt"), "2017/val.txt"),
        ("davis2017", lambda root: _remove(root / "JPEGImages/480p/bee"), "JPEGImages/480p/bee"),
        ("davis2017", lambda root: _remove(root / "Annotations/480p/bee"), "Annotations/480p/bee"),
        ("davis2017", lambda root: _remove(root / "Annotations/480p/bee/00000.png"), "frame 00000 has no annotation"),
        ("davis2017", lambda root: _remove(root / "Annotations/480p/bee/00003.png"), "frame 00003 has no annotation"),
        ("davis2017", lambda root: _remove(root / "JPEGImages/480p/bee/00003.jpg"), "bee/00003.png: there is no frame"),
        ("davis2017", lambda root: _remove(root / "JPEGImages"), "no resolution folder"),
        ("davis2016", lambda root: (root / "ImageSets/2016/val.txt").write_text(""), "names no video"),
        (
            "davis2017",
            lambda root: write_mask(root / "Annotations/480p/ant/00000.png", np.zeros((48, 80))),
            "ant/00000.png: expected an object in the first frame",
        ),
    ],
)
def test_a_broken_davis_folder_is_named(davis, tmp_path, name, change, words):
    root = shutil.copytree(davis, tmp_path / "davis")
    change(root)
    with pytest.raises((FileNotFoundError, ValueError), match=words):
        open_dataset(name, root)


def test_what_is_not_there_is_named(davis, youtube_vos, lvos, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        open_dataset("davis2017", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="videos: zebra not in the split val"):
        open_dataset("davis2017", davis, videos=["ant", "zebra"])
    with pytest.raises(FileNotFoundError, match="valid/meta.json"):
        open_dataset("youtube_vos", davis)
    with pytest.raises(FileNotFoundError, match="valid/JPEGImages"):
        open_dataset("lvos", davis)
    with pytest.raises(ValueError, match="only DAVIS has resolution folders"):
        open_dataset("lvos", lvos, resolution="480p")
    with pytest.raises(ValueError, match="expected davis2016, davis2017"):
        open_dataset("coco", davis)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda meta: meta.pop("videos"), "meta.json: expected .*KeyError"),
        (lambda meta: meta["videos"]["ant"]["objects"]["1"].pop("frames"), "meta.json: expected"),
        (lambda meta: meta["videos"]["ant"]["objects"]["1"]["frames"].append("00099"), "names frame 00099"),
        (lambda meta: meta["videos"]["ant"]["objects"]["2"].update(frames=["00003"]), "object 2 enters .frame 00003"),
        (lambda meta: meta["videos"]["ant"]["objects"]["2"].update(frames=[]), "object 2 enters"),
    ],
)
def test_a_broken_meta_json_is_named(youtube_vos, tmp_path, change, words):
    root = shutil.copytree(youtube_vos, tmp_path / "youtube_vos")
    meta = json.loads((root / "valid/meta.json").read_text())
    change(meta)
    (root / "valid/meta.json").write_text(json.dumps(meta))
    with pytest.raises((FileNotFoundError, ValueError), match=words):
        open_dataset("youtube_vos", root)
