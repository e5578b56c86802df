"""Datasets on disk: YouTube-VOS, COCO, Pascal VOC, folders of images and masks; and what is wrong in them."""

import json

import numpy as np
import pytest
from PIL import Image

from stm_model.data.coco import CocoImage, coco_images
from stm_model.data.folders import open_folder
from stm_model.data.images import ImageClips, folder_images, voc_images
from stm_model.data.synthetic import procedural_clip
from stm_model.data.video import VideoClips
from stm_model.data.youtube_vos import youtube_vos_videos
from stm_model.io.formats.rle import decode_segmentation
from stm_model.io.images import MediaError
from stm_model.io.masks import write_mask

FRAMES, LABELS = procedural_clip(frames=6, size=(48, 64), objects=2, seed=5)


def save_image(path, index=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(FRAMES[index]).save(path)


def save_labels(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mask(path, labels)


@pytest.fixture
def youtube_folder(tmp_path):
    """Two videos of six frames with masks on every other one; in the second, object 2 enters at frame 2."""
    for name in ("aaa", "bbb"):
        for index in range(6):
            save_image(tmp_path / "JPEGImages" / name / f"{index:05d}.jpg", index)
            labels = np.where((LABELS[index] == 2) & (name == "bbb") & (index < 2), 0, LABELS[index])
            if index % 2 == 0:
                save_labels(tmp_path / "Annotations" / name / f"{index:05d}.png", labels)
    (tmp_path / "meta.json").write_text(json.dumps({"videos": {"bbb": {"objects": {}}, "aaa": {"objects": {}}}}))
    return tmp_path


def test_youtube_vos_layout(youtube_folder):
    first, second = youtube_vos_videos(youtube_folder)
    assert (first.name, second.name) == ("aaa", "bbb")
    assert first.annotated == [0, 2, 4] and len(first.frame_paths) == 6 and 1 not in first.annotations
    frames, labels = second.load()
    assert frames[3].shape == (48, 64, 3) and labels[3] is None
    assert 2 not in labels[0] and 2 in labels[2]


def test_clips_take_frames_with_a_mask_and_objects_of_the_first(youtube_folder):
    clips = VideoClips(youtube_vos_videos(youtube_folder), size=(48, 48), max_skip=(4, 4))
    objects = [clips[seed].objects for seed in range(30)]
    assert set(objects) >= {1, 2}
    for seed in range(30):
        clip = clips[seed]
        assert set(clip.labels.unique().tolist()) <= set(range(clip.objects + 1)), (
            "those that enter later are background"
        )


@pytest.mark.parametrize(
    "path, content, error, message",
    [
        ("meta.json", None, FileNotFoundError, "YouTube-VOS layout: no such file: .*meta.json"),
        ("meta.json", "[]", ValueError, r"meta.json: expected \{\"videos\""),
        (
            "meta.json",
            '{"videos": {"ccc": {"objects": {}}}}',
            FileNotFoundError,
            "YouTube-VOS video ccc: no pictures in .*JPEGImages/ccc",
        ),
        ("JPEGImages/aaa/00002.jpg", None, ValueError, "aaa/00002.png: there is no frame of this name"),
    ],
)
def test_youtube_vos_errors_name_the_place(youtube_folder, path, content, error, message):
    if content is None:
        (youtube_folder / path).unlink()
    else:
        (youtube_folder / path).write_text(content)
    with pytest.raises(error, match=message):
        youtube_vos_videos(youtube_folder)


def test_images_beside_their_masks(tmp_path):
    for name in ("a", "b"):
        save_image(tmp_path / "Imgs" / f"{name}.jpg")
        Image.fromarray((LABELS[0] == 1).astype(np.uint8) * 255).save(tmp_path / "Imgs" / f"{name}.png")
    images = folder_images(tmp_path)
    assert [image.image_path.name for image in images] == ["a.jpg", "b.jpg"]
    frame, labels = images[0].load()
    assert frame.shape == (48, 64, 3)
    np.testing.assert_array_equal(labels, LABELS[0] == 1)


@pytest.mark.parametrize("names", [("images", "ground_truth_mask"), ("DUTS-TR-Image", "DUTS-TR-Mask"), ("imgs", "gt")])
def test_a_folder_of_images_and_one_of_masks(tmp_path, names):
    save_image(tmp_path / "set" / names[0] / "0001.jpg")
    save_labels(tmp_path / "set" / names[1] / "0001.png", LABELS[0])
    (image,) = folder_images(tmp_path)
    np.testing.assert_array_equal(image.load()[1], LABELS[0])


def test_masks_with_soft_edges_are_one_object(tmp_path):
    save_image(tmp_path / "a.jpg")
    soft = Image.fromarray((LABELS[0] == 1).astype(np.uint8) * 255).resize((640, 480), Image.Resampling.BICUBIC)
    soft.resize((64, 48), Image.Resampling.BILINEAR).save(tmp_path / "a.png")
    (image,) = folder_images(tmp_path)
    assert (image.load()[1] == (LABELS[0] == 1)).mean() > 0.99


def test_images_and_masks_that_do_not_match_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="images: no such folder"):
        folder_images(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no images with masks; expected a.jpg beside a.png"):
        folder_images(tmp_path)
    for name in ("a", "b"):
        save_image(tmp_path / "images" / f"{name}.jpg")
    save_labels(tmp_path / "masks" / "a.png", LABELS[0])
    with pytest.raises(ValueError, match="2 images but 1 masks; no partner for b"):
        folder_images(tmp_path)


def test_voc_layout(tmp_path):
    labels = LABELS[0].copy()
    labels[0, 0] = 255
    for name in ("2007_1", "2007_2"):
        save_image(tmp_path / "JPEGImages" / f"{name}.jpg")
        save_labels(tmp_path / "SegmentationObject" / f"{name}.png", labels)
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("2007_2\n")
    assert len(voc_images(tmp_path)) == 2
    (image,) = voc_images(tmp_path, "train")
    np.testing.assert_array_equal(image.load()[1], labels)
    assert ImageClips([image], size=(48, 48))[0].objects <= 2, "void is no object"
    (tmp_path / "JPEGImages/2007_1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="VOC layout: no such file: .*2007_1.jpg"):
        voc_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="list of images: no such file: .*val.txt"):
        voc_images(tmp_path, "val")


def compressed(runs: list[int]) -> str:
    """Run lengths as COCO's string, written from its description."""
    text = ""
    for index, run in enumerate(runs):
        value, more = run - (runs[index - 2] if index > 2 else 0), True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr((bits | (32 if more else 0)) + 48)
    return text


def test_run_length_codes():
    mask = LABELS[0] == 1
    flat = mask.T.flatten()
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    runs = [0, *runs] if flat[0] else runs
    for counts in (runs, compressed(runs)):
        found = decode_segmentation({"size": list(mask.shape), "counts": counts}, mask.shape)
        assert found.dtype == bool
        np.testing.assert_array_equal(found, mask)


def test_polygons_are_drawn_as_coco_draws_them():
    """A pixel belongs to a polygon that covers its center."""
    mask = decode_segmentation([[2, 1, 6, 1, 6, 4, 2, 4], [7.6, 0, 9, 0, 9, 2, 7.6, 2]], (8, 10))
    expected = np.zeros((8, 10), bool)
    expected[1:4, 2:6] = True
    expected[0:2, 8] = True
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [3, 4], "counts": [2, 3]}, r"run lengths: expected a sum of 3·4 pixels, got 5"),
        ({"size": [3, 4], "counts": [-1, 13]}, r"run lengths: expected a sum of 3·4 pixels, got 12"),
        ({"size": [3, 4], "counts": compressed([2, 3])}, r"run lengths: expected COCO's string for 3·4 pixels"),
        ({"size": [3, 4], "counts": ""}, r"run lengths: expected COCO's string for 3·4 pixels"),
        ({"size": [3, 4], "counts": compressed([2, 30])}, r"Invalid RLE"),
        ({"size": [4, 3], "counts": [12]}, r"size: expected the image's \[3, 4\], got \[4, 3\]"),
        ([[0, 0, 2, 2]], r"polygon: expected x and y of at least 3 corners"),
        ([[0, 0, 2, 2, 1e9, 0]], r"polygon: expected corners in an image of 3·4 pixels"),
        ([[0, 0, 2, 2, float("nan"), 0]], r"polygon: expected corners in an image"),
    ],
)
def test_segmentations_that_are_none_are_refused(segmentation, message):
    with pytest.raises(ValueError, match=message):
        decode_segmentation(segmentation, (3, 4))


@pytest.fixture
def coco_folder(tmp_path):
    save_image(tmp_path / "train2017" / "1.jpg")
    save_image(tmp_path / "train2017" / "2.jpg")
    large, small = [0, 0, 40, 0, 40, 40, 0, 40], [10, 10, 20, 10, 20, 20, 10, 20]
    crowd = {"size": [48, 64], "counts": [48 * 63, 48]}
    content = {
        "images": [{"id": 7, "file_name": "1.jpg"}, {"id": 8, "file_name": "2.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 7, "segmentation": [small], "iscrowd": 0, "area": 100},
            {"id": 2, "image_id": 7, "segmentation": [large], "iscrowd": 0, "area": 1600},
            {"id": 3, "image_id": 7, "segmentation": crowd, "iscrowd": 1, "area": 48},
            {"id": 4, "image_id": 8, "segmentation": crowd, "iscrowd": 1, "area": 48},
        ],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(content))
    return tmp_path


def test_coco_layout(coco_folder):
    (image,) = coco_images(coco_folder / "annotations" / "instances_train2017.json")
    frame, labels = image.load()
    assert frame.shape == (48, 64, 3) and labels.shape == (48, 64)
    assert labels[15, 15] == 2 and labels[30, 30] == 1 and labels[45, 45] == 0 and labels[0, 63] == 255


def test_coco_errors_name_the_place(coco_folder):
    path = coco_folder / "annotations" / "instances_train2017.json"
    with pytest.raises(FileNotFoundError, match="COCO: no such file"):
        coco_images(coco_folder / "absent.json")
    broken = CocoImage(coco_folder / "train2017/1.jpg", [{"id": 9, "segmentation": {"size": [48, 64], "counts": [1]}}])
    with pytest.raises(MediaError, match=r"1\.jpg: annotation 9 is not COCO's: run lengths"):
        broken.load()
    (coco_folder / "train2017" / "1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"COCO: 1\.jpg of .* is in none of"):
        coco_images(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected images and annotations"):
        coco_images(path)


def test_the_layout_is_read_off_the_folder(coco_folder, tmp_path):
    """As released: YouTube-VOS' folder or that of its split, VOC with its Annotations of boxes."""
    with pytest.raises(FileNotFoundError, match="data: no such folder"):
        open_folder(tmp_path / "absent", "train")
    for path in (coco_folder, coco_folder / "annotations/instances_train2017.json"):
        data = open_folder(path, "train")
        assert not data.videos and isinstance(data.images[0], CocoImage)
    videos = tmp_path / "youtube" / "train"
    save_image(videos / "JPEGImages/aaa/00000.jpg")
    save_labels(videos / "Annotations/aaa/00000.png", LABELS[0])
    with pytest.raises(FileNotFoundError, match=r"DAVIS split train: no such file: .*2017/train\.txt"):
        open_folder(videos, "train")
    (videos / "meta.json").write_text(json.dumps({"videos": {"aaa": {"objects": {}}}}))
    for path, split in ((videos, "train"), (videos.parent, "train"), (videos.parent, "fit")):
        assert [video.name for video in open_folder(path, split).videos] == ["aaa"]
    voc = tmp_path / "voc"
    save_image(voc / "JPEGImages/2007_1.jpg")
    save_labels(voc / "SegmentationObject/2007_1.png", LABELS[0])
    (voc / "Annotations").mkdir()
    data = open_folder(voc, "train")
    assert not data.videos and len(data.images) == 1


def test_a_corrupt_file_is_passed_over_and_named(tmp_path):
    for name in ("a", "b"):
        save_image(tmp_path / f"{name}.jpg")
        save_labels(tmp_path / f"{name}.png", LABELS[0])
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:100])
    clips = ImageClips(folder_images(tmp_path), size=(48, 48))
    drawn = [clips[seed] for seed in range(20)]
    named = {problem for clip in drawn for problem in clip.unreadable}
    assert len(named) == 1 and "a.jpg" in named.pop()
    assert any(not clip.unreadable for clip in drawn) and all(clip.frames.shape == (3, 3, 48, 48) for clip in drawn)
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(ValueError, match="none of the 2 sources of clips can be read; the last: .*b.png"):
        clips[0]


def test_a_mask_of_another_size_is_named(youtube_folder):
    save_labels(youtube_folder / "Annotations/aaa/00002.png", LABELS[2][:40])
    (sequence, _) = youtube_vos_videos(youtube_folder)
    with pytest.raises(MediaError, match=r"00002.png: the mask is 64x40 pixels, its frame 64x48"):
        sequence.load_pair(2)
    clips = VideoClips([sequence], frames=2, size=(48, 48))
    clip = next(clip for seed in range(30) if (clip := clips[seed]).unreadable)
    assert "00002.png: the mask is 64x40" in clip.unreadable[0]


def test_frames_of_another_size_are_named(youtube_folder):
    (sequence, _) = youtube_vos_videos(youtube_folder)
    Image.fromarray(FRAMES[2][:40]).save(sequence.frame_paths[2])
    save_labels(sequence.annotations[2], LABELS[2][:40])
    problems = {problem for seed in range(30) for problem in _problems(VideoClips([sequence], size=(48, 48)), seed)}
    assert problems and all("video aaa: frames differ in size: 64x40 and 64x48 pixels" in one for one in problems)


def _problems(clips, seed) -> list[str]:
    try:
        return list(clips[seed].unreadable)
    except ValueError as error:
        return [str(error)]


def test_no_source_at_all_is_an_error():
    with pytest.raises(ValueError, match="ImageClips: expected at least one source of clips, got none"):
        ImageClips([])
