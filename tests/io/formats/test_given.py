"""Masks made by other tools are read: what is written here comes back, and files as those tools write them; what is
wrong in one is said in a line.
"""

import base64
import io
import json
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from stm_model.io.formats.given import open_drawn
from stm_model.io.images import MediaError

SQUARE = np.zeros((20, 30), dtype=bool)
SQUARE[4:9, 10:22] = True
SPOT = np.zeros((20, 30), dtype=bool)
SPOT[6, 12] = True


def runs(mask):
    found = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": found["counts"].decode()}


def read(path, content=None, video=None):
    """The masks in a file of this content, without a warning."""
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return dict(open_drawn(path, video))


def refused(path, content, said, video=None):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(MediaError, match=said) as caught:
        dict(open_drawn(path, video))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def video(frames=8, files=()):
    return SimpleNamespace(frame_count=frames, files=files, numbers=(), path="walk.mp4", name="walk", size=(20, 30))


@pytest.mark.parametrize("name", ["coco", "ytvis", "cvat", "labelme"])
def test_what_is_written_comes_back(name, export, labels):
    found = read(export(name))
    assert sorted(found) == list(range(5))
    for index, true in enumerate(labels):
        np.testing.assert_array_equal(found[index], true)


def test_the_masks_come_when_they_are_asked_for(export, labels):
    masks = open_drawn(export("coco"))
    masks._sources = {3: masks._sources[3]}
    np.testing.assert_array_equal(masks[3], labels[3])
    with pytest.raises(KeyError):
        masks[4]


def coco_file(annotations, images=("a_0007.jpg",), **more):
    return {
        "images": [{"id": 10 + n, "file_name": name, "height": 20, "width": 30} for n, name in enumerate(images)],
        "annotations": [{"id": n, "category_id": 2, "iscrowd": 0} | one for n, one in enumerate(annotations)],
        "categories": [{"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}],
    } | more


def test_coco_of_one_image_numbers_its_objects_and_paints_small_ones_last(tmp_path):
    spot = {"image_id": 10, "segmentation": runs(SPOT), "area": 1}
    square = {"image_id": 10, "segmentation": [[10, 4, 22, 4, 22, 9, 10, 9]], "area": 60}
    crowd = {"image_id": 10, "segmentation": runs(~SQUARE), "iscrowd": 1, "area": 500}
    (tmp_path / "a.json").write_text(json.dumps(coco_file([spot, square, crowd])))
    with pytest.warns(UserWarning, match="labels of its objects: 1 is cat 2, 2 is cat 1"):
        masks = open_drawn(tmp_path / "a.json")
    assert list(masks) == [7]
    expected = np.where(SPOT, 2, np.where(SQUARE, 1, 255))
    np.testing.assert_array_equal(masks[7], expected)


def test_coco_of_many_images_goes_by_tracks_or_categories(tmp_path):
    one = {"image_id": 10, "segmentation": runs(SPOT), "area": 1}
    other = {"image_id": 11, "segmentation": runs(SQUARE), "area": 60}
    names = ("f0.jpg", "f4.jpg")
    tracked = [one | {"attributes": {"track_id": 5}}, other | {"track_id": 3}]
    found = read(tmp_path / "a.json", coco_file(tracked, names))
    assert {index: set(np.unique(mask)) for index, mask in found.items()} == {0: {0, 5}, 4: {0, 3}}
    (tmp_path / "a.json").write_text(json.dumps(coco_file([one, other | {"category_id": 3}], names)))
    with pytest.warns(UserWarning, match="1 is cat, 2 is dog"):
        masks = open_drawn(tmp_path / "a.json")
    assert set(np.unique(masks[4])) == {0, 2}
    refused(tmp_path / "a.json", coco_file([one, one, other], names), "two of cat; expected a track_id")


def test_coco_of_another_video_is_refused(tmp_path):
    one = {"image_id": 10, "segmentation": runs(SPOT), "area": 1, "track_id": 1}
    path = tmp_path / "a.json"
    refused(path, coco_file([one], ("f9.jpg",)), "a mask for frame 9, but walk.mp4 has the frames 0 to 7", video())
    wrong = coco_file([one | {"segmentation": runs(SPOT[:10])}])
    refused(path, wrong, r"expected the image's \[20, 30\], got \[10, 30\]")
    refused(path, coco_file([]), "no mask of an object")
    refused(path, coco_file([one | {"image_id": 99}]), "lacks 99")
    refused(path, coco_file([one]) | {"images": "none"}, "not as its format says")
    two = coco_file([one, one | {"image_id": 11}], ("f1.jpg", "g1.jpg"))
    refused(path, two, "two pictures of frame 1: f1.jpg and g1.jpg")


def test_youtube_vis_with_more_than_one_video(tmp_path):
    def content(names):
        videos = [
            {"id": n, "height": 20, "width": 30, "file_names": [f"{name}/00000.jpg", f"{name}/00005.jpg"]}
            for n, name in enumerate(names)
        ]
        found = [
            {"id": 9 + n, "video_id": n, "category_id": 1, "segmentations": [None, runs(SQUARE)]}
            for n in range(len(names))
        ]
        return {"videos": videos, "annotations": found, "categories": [{"id": 1, "name": "object 4"}]}

    found = read(tmp_path / "a.json", content(["run", "walk"]), video())
    assert set(np.unique(found[5])) == {0, 4} and not found[0].any()
    refused(tmp_path / "a.json", content(["run", "jump"]), "2 videos, none called walk; expected one", video())


SHAPES = {
    "polygon": {"points": [[10, 4], [21, 4], [21, 8], [10, 8]]},
    "rectangle": {"points": [[10, 4], [21, 8]]},
    "circle": {"points": [[15, 10], [15, 13]]},
    "oriented_rectangle": {"points": [[10, 4], [21, 4], [21, 8], [10, 8]]},
}


def labelme_file(*shapes):
    return {"shapes": list(shapes), "imageHeight": 20, "imageWidth": 30, "imagePath": "x.jpg", "imageData": None}


@pytest.mark.parametrize("kind", SHAPES)
def test_labelme_shapes(kind, tmp_path):
    shape = {"label": "object 3", "shape_type": kind, "group_id": None} | SHAPES[kind]
    (mask,) = read(tmp_path / "x.json", labelme_file(shape)).values()
    circle = np.hypot(*(np.indices((20, 30)) - np.array([10, 15])[:, None, None])) <= 3
    np.testing.assert_array_equal(mask, 3 * (circle if kind == "circle" else SQUARE))


def test_labelme_masks_and_groups(tmp_path):
    stream = io.BytesIO()
    Image.fromarray(SQUARE[4:9, 10:22].astype(np.uint8) * 255).save(stream, "PNG")
    box = {
        "label": "cat",
        "shape_type": "mask",
        "points": [[10, 4], [21, 8]],
        "group_id": 1,
        "mask": base64.b64encode(stream.getvalue()).decode(),
    }
    spot = {"label": "cat", "shape_type": "rectangle", "points": [[12, 6], [12, 6]], "group_id": 2}
    refused(tmp_path / "f3.json", labelme_file(box | {"mask": "0000"}), "no PNG in base64")
    (tmp_path / "f3.json").write_text(json.dumps(labelme_file(box, spot)))
    (tmp_path / "f4.json").write_text(json.dumps(labelme_file()))
    with pytest.warns(UserWarning, match="1 is cat 1, 2 is cat 2"):
        masks = open_drawn(tmp_path)
    np.testing.assert_array_equal(masks[3], np.where(SPOT, 2, SQUARE))
    assert sorted(masks) == [3, 4] and not masks[4].any()


def test_labelme_beside_its_pictures_is_preferred_to_them(tmp_path):
    shape = {"label": "1", "shape_type": "polygon"} | SHAPES["polygon"]
    (tmp_path / "f0.json").write_text(json.dumps(labelme_file(shape)))
    Image.new("RGB", (30, 20)).save(tmp_path / "f0.jpg")
    assert read(tmp_path)[0].max() == 1
    (tmp_path / "f0.jpg").rename(tmp_path / "g0.jpg")  # pictures that the file is not of
    assert open_drawn(tmp_path) is None


def test_labelme_files_that_are_wrong(tmp_path):
    path = tmp_path / "x.json"
    line = {"label": "a", "shape_type": "line", "points": [[0, 0], [5, 5]]}
    refused(path, labelme_file(line | {"label": "1"}), "a line of 2 points; expected a polygon")
    refused(path, labelme_file({"label": "1"}), "lacks 'points'")
    refused(path, {"shapes": [{"label": "1"}]}, "lacks 'imageHeight'")
    refused(path, "{", "can't be read as JSON")
    refused(path, "[1, 2]", "not as its format says")
    refused(path, "3", "not as its format says")


CVAT_IMAGES = """<annotations><version>1.1</version>
<image id="0" name="a.jpg" width="30" height="20"></image>
<image id="2" name="c.jpg" width="30" height="20">
  <mask label="cat" rle="0, 60" left="10" top="4" width="12" height="5" z_order="0"></mask>
  <polygon label="dog" points="12.0,6.0;13.0,6.0;13.0,7.0;12.0,7.0" z_order="1"></polygon>
  <box label="cat" xtl="1" ytl="1" xbr="3" ybr="3"></box>
</image></annotations>"""


def test_cvat_for_images_in_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        archive.writestr("annotations.xml", CVAT_IMAGES)
    with pytest.warns(UserWarning) as told:
        masks = open_drawn(tmp_path / "export.zip")
    said = [str(each.message) for each in told]
    assert any("left out: box" in line for line in said) and any("1 is cat, 2 is dog" in line for line in said)
    assert list(masks) == [2]
    np.testing.assert_array_equal(masks[2], np.where(SPOT, 2, SQUARE))


def test_cvat_files_that_are_wrong(tmp_path):
    path = tmp_path / "a.xml"
    refused(path, "<annotations><meta/></annotations>", "expected CVAT's XML")
    refused(path, "<annotations>", "not well-formed XML")
    start = '<annotations><original_size><width>30</width><height>20</height></original_size><track id="0" label="1">'
    end = "</track></annotations>"
    mask = '<mask frame="{}" outside="0" rle="{}" left="10" top="4" width="12" height="5"/>'
    refused(path, start + mask.format(1, "0, 61") + end, "61 pixels in its runs")
    refused(path, start + mask.format(8, "0, 60") + end, "a mask for frame 8, but walk.mp4 has", video())
    refused(path, start + end, "no mask of an object")
    refused(tmp_path / "b.zip", "no zip", "can't be read as CVAT's export")


def test_sam_2(tmp_path):
    path = tmp_path / "a.json"
    generated = [{"segmentation": runs(SPOT), "area": 1}, {"segmentation": runs(SQUARE), "area": 60}]
    expected = np.where(SPOT, 1, 2 * SQUARE)
    np.testing.assert_array_equal(read(path, generated)[0], expected)
    np.testing.assert_array_equal(read(path, {"image": {}, "annotations": generated})[0], expected)
    masklets = {"masklet": [[runs(SPOT)], [], [runs(SQUARE)]], "masklet_id": [4], "video_frame_count": 11.0}
    found = read(path, masklets)
    assert {index: set(np.unique(mask)) for index, mask in found.items()} == {0: {0, 5}, 8: {0, 5}}
    found = read(path, {"0": {"3": runs(SPOT)}, "6": {"3": runs(SQUARE), "200": runs(SPOT)}})
    np.testing.assert_array_equal(found[6], np.where(SPOT, 200, 3 * SQUARE))
    refused(path, {"something": 1}, "expected LabelMe's, COCO's, YouTube-VIS' or SAM 2's JSON")
    refused(path, [{"segmentation": {"size": [20, 30], "counts": "1"}}], "run lengths")


def test_too_many_objects(tmp_path):
    refused(tmp_path / "a.json", [{"segmentation": runs(SPOT)}] * 255, "255 objects; expected at most 254")


def test_pictures_are_left_to_others(tmp_path):
    assert open_drawn(tmp_path / "mask.png") is None and open_drawn(tmp_path) is None
