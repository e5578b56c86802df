"""Every format that is written, read back by the library that its users read it with."""

import json
from contextlib import nullcontext
from pathlib import Path
from xml.etree import ElementTree

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw

from stm_model.io.formats.export import Clip
from stm_model.io.formats.pictures import RIM, with_alpha
from stm_model.io.formats.polygons import one_polygon, one_polygon_of_all, parts_of
from stm_model.io.formats.table import FORMATS, Exports, check_formats
from stm_model.io.masks import read_mask

OBJECTS = (7, 9, 250)


def overlap(found, true):
    """J of two bool arrays; 1 where both are empty."""
    union = (found | true).sum()
    return (found & true).sum() / union if union else 1.0


def test_coco(export, labels):
    from pycocotools.coco import COCO

    data = COCO(str(export("coco")))
    assert [data.imgs[key]["file_name"] for key in data.getImgIds()] == [f"{index:05d}.jpg" for index in range(5)]
    assert {one["name"] for one in data.cats.values()} == {f"object {label}" for label in OBJECTS}
    found = np.zeros_like(labels)
    for annotation in data.anns.values():
        mask = data.annToMask(annotation).astype(bool)
        assert annotation["area"] == mask.sum()
        left, top, width, height = annotation["bbox"]
        assert (
            mask[top : top + height, left : left + width].sum() == mask.sum()
            and mask[top].any()
            and mask[:, left].any()
        )
        found[data.imgs[annotation["image_id"]]["frame_index"]][mask] = annotation["track_id"]
    np.testing.assert_array_equal(found, labels)


def test_youtube_vis(export, labels):
    from pycocotools import mask as coco

    data = json.loads(export("ytvis").read_text())
    (video,) = data["videos"]
    assert (video["length"], video["height"], video["width"], len(video["file_names"])) == (5, *labels.shape[1:], 5)
    found = np.zeros_like(labels)
    for annotation in data["annotations"]:
        lists = [annotation[name] for name in ("segmentations", "bboxes", "areas")]
        assert annotation["video_id"] == video["id"] and [len(each) for each in lists] == [5, 5, 5]
        for one, runs, box, area in zip(found, *lists):
            assert (runs is None) == (box is None) == (area is None)
            if runs:
                one[coco.decode(runs).astype(bool)] = annotation["category_id"]
                assert area == coco.area(runs) and box == coco.toBbox(runs).tolist()
    np.testing.assert_array_equal(found, labels)


def test_mots(export, labels):
    folder = export("mots") / "instances"
    assert (folder / "labels.txt").read_text().split() == ["object"]
    for index, true in enumerate(labels):
        with Image.open(folder / f"{index:05d}.png") as image:
            assert image.mode == "I;16"
            values = np.array(image)
        assert set(np.unique(values // 1000)) <= {0, 1}
        np.testing.assert_array_equal(values % 1000, true)


def test_mots_is_what_datumaro_reads(export, labels):
    datumaro = pytest.importorskip("datumaro")
    found = np.zeros_like(labels)
    for item in datumaro.Dataset.import_from(str(export("mots")), "mots"):
        for mask in item.annotations:
            found[int(item.id)][mask.image.astype(bool)] = mask.attributes["track_id"]
    np.testing.assert_array_equal(found, labels)


def test_void_is_ignored_in_mots_and_left_out_elsewhere(tmp_path):
    void = np.array([[0, 3], [255, 3]], dtype=np.uint8)
    with Exports(["mots", "coco", "matte"], tmp_path, Clip("x")) as exports:
        exports.write(0, void, None)
    with Image.open(tmp_path / "mots" / "instances" / "00000.png") as image:
        assert np.array(image).tolist() == [[0, 1003], [10000, 1003]]
    assert len(json.loads((tmp_path / "coco.json").read_text())["annotations"]) == 1


def test_cvat(export, labels):
    from cvat_sdk.masks import decode_mask

    root = ElementTree.parse(export("cvat")).getroot()
    height, width = labels.shape[1:]
    size = root.find("meta/task/original_size")
    assert (int(size.findtext("height")), int(size.findtext("width"))) == (height, width)
    assert root.findtext("version") == "1.1" and root.findtext("meta/task/size") == "5"
    assert {name.text for name in root.iter("name")} == {f"object {label}" for label in OBJECTS}
    found, outside = np.zeros_like(labels), []
    for track in root.iter("track"):
        label = int(track.get("label").split()[1])
        for mask in track.iter("mask"):
            left, top, wide, high = (int(mask.get(name)) for name in ("left", "top", "width", "height"))
            runs = [int(run) for run in mask.get("rle").split(",")]
            drawn = decode_mask(
                [*runs, left, top, left + wide - 1, top + high - 1], image_width=width, image_height=height
            )
            if mask.get("outside") == "1":
                outside.append((label, int(mask.get("frame"))))
            else:
                found[int(mask.get("frame"))][drawn] = label
    np.testing.assert_array_equal(found, labels)
    assert outside == [(9, 2), (9, 4)]  # else CVAT would go on showing the last mask


def test_labelme(export, labels):
    folder = export("labelme")
    for index, true in enumerate(labels):
        content = json.loads((folder / f"{index:05d}.json").read_text())
        assert set(content) == {"version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth"}
        assert (content["imageHeight"], content["imageWidth"], content["imagePath"]) == (
            *true.shape,
            f"{index:05d}.jpg",
        )
        found = np.zeros_like(true)
        for shape in content["shapes"]:
            assert shape["shape_type"] == "polygon" and shape["label"] == f"object {shape['group_id']}"
            assert len(shape["points"]) >= 3 and all(
                isinstance(value, float) for point in shape["points"] for value in point
            )
            # as labelme.utils.shape_to_mask draws it
            canvas = Image.new("L", true.shape[::-1])
            ImageDraw.Draw(canvas).polygon([tuple(point) for point in shape["points"]], fill=1, outline=1)
            found[np.array(canvas) > 0] = shape["group_id"]
        for label in OBJECTS:
            assert overlap(found == label, true == label) >= 0.98


def test_labelme_opens_it(export, labels, frames):
    # brings Qt: not among the development packages
    labelme = pytest.importorskip("labelme")
    folder = export("labelme")
    for index, (true, frame) in enumerate(zip(labels, frames)):
        Image.fromarray(frame).save(folder / f"{index:05d}.jpg")
        shapes = labelme.LabelFile(str(folder / f"{index:05d}.json")).shapes
        found = np.zeros_like(true)
        for shape in shapes:
            drawn = labelme.utils.shape_to_mask(true.shape, shape["points"], shape["shape_type"])
            found[drawn] = shape["group_id"]
        for label in OBJECTS:
            assert overlap(found == label, true == label) >= 0.98


def test_labelme_names_the_pictures_of_a_folder(tmp_path, export):
    from stm_model.io.images import write_image
    from stm_model.io.video import open_video

    for index in range(5):
        (tmp_path / "video").mkdir(exist_ok=True)
        write_image(tmp_path / "video" / f"walk{index}.png", np.zeros((4, 4, 3), dtype=np.uint8))
    folder = export("labelme", Clip("walk", open_video(tmp_path / "video")))
    content = json.loads((folder / "walk3.json").read_text())
    assert (folder / content["imagePath"]).samefile(tmp_path / "video" / "walk3.png")


def test_yolo(export, labels, frames):
    import supervision

    folder = export("yolo")
    (folder / "images").mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / "images" / f"{index:05d}.jpg")
    data = supervision.DetectionDataset.from_yolo(
        str(folder / "images"), str(folder / "labels"), str(folder / "data.yaml"), force_masks=True
    )
    assert data.classes == ["object 7", "object 250", "object 9"]  # as they came
    for name, _, found in data:
        true = labels[int(name[-9:-4])]
        assert len(found) == len(set(np.unique(true)) - {0})
        for mask, number in zip(found.mask, found.class_id):
            assert overlap(mask, true == int(data.classes[number].split()[1])) >= 0.98
    # readers that cut off what is behind the point, come to the same pixels
    height, width = labels.shape[1:]
    for line in (folder / "labels" / "00001.txt").read_text().splitlines():
        number, *values = line.split()
        corners = (np.array(values, dtype=np.float32).reshape(-1, 2) * (width, height)).astype(int)
        canvas = Image.new("L", (width, height))
        ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in corners.tolist()], fill=1, outline=1)
        true = labels[1] == int(data.classes[int(number)].split()[1])
        assert overlap(np.array(canvas) > 0, true) >= 0.98


@pytest.mark.parametrize("seed", range(20))
def test_polygons_draw_the_mask_again(seed):
    generator = np.random.default_rng(seed)
    coarse = generator.random((generator.integers(1, 16), generator.integers(1, 16))) < generator.uniform(0.2, 0.95)
    mask = np.kron(coarse, np.ones((generator.integers(1, 6), generator.integers(1, 6)))).astype(bool)
    mask ^= generator.random(mask.shape) < generator.choice([0, 0.02])
    canvas = Image.new("L", mask.shape[::-1])
    for part in parts_of(mask):
        ImageDraw.Draw(canvas).polygon([tuple(point) for point in one_polygon(part).tolist()], fill=1, outline=1)
    np.testing.assert_array_equal(np.array(canvas) > 0, mask)


def test_one_polygon_leaves_out_parts_that_cost_more_than_they_give():
    mask = np.zeros((50, 200), dtype=bool)
    mask[10:40, 5:45] = mask[10:40, 60:100] = mask[20, 199] = True
    canvas = Image.new("L", mask.shape[::-1])
    corners = one_polygon_of_all(parts_of(mask))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in corners.tolist()], fill=1, outline=1)
    drawn = np.array(canvas) > 0
    assert drawn[10:40, 60:100].all() and not drawn[20, 199] and drawn.sum() - 2 * 30 * 40 <= 15


def test_alpha_pictures(export, labels, frames):
    folder = export("alpha")
    for index, (true, frame) in enumerate(zip(labels, frames)):
        with Image.open(folder / f"{index:05d}.png") as image:
            assert image.mode == "RGBA"
            pixels = np.array(image)
        np.testing.assert_array_equal(pixels[..., 3], np.where(true > 0, 255, 0))
        np.testing.assert_array_equal(pixels[true > 0, :3], frame[true > 0])


@pytest.mark.parametrize("name", ["alpha-mov", "alpha-webm"])
def test_films_with_alpha(name, export, labels, frames):
    with av.open(str(export(name))) as container:
        stream = container.streams.video[0]
        if name == "alpha-webm":
            # FFmpeg's own decoder of VP9 knows no alpha
            decoder = av.CodecContext.create("libvpx-vp9", "r")
            shown = [frame for packet in container.demux(stream) for frame in decoder.decode(packet)]
        else:
            assert stream.codec_context.codec_tag == "ap4h"  # ProRes 4444
            shown = list(container.decode(stream))
        found = [frame.to_ndarray(format="rgba") for frame in shown]
    assert len(found) == 5 and stream.average_rate == 24
    for pixels, true, frame in zip(found, labels, frames):
        pixels = pixels[: true.shape[0], : true.shape[1]]
        np.testing.assert_array_equal(pixels[..., 3] > 127, true > 0)
        assert np.abs(pixels[true == 7, :3].astype(int) - frame[true == 7]).mean() < 8


@pytest.mark.parametrize("name", ["matte", "matte-webm"])
def test_mattes(name, export, labels):
    with av.open(str(export(name))) as container:
        found = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    assert len(found) == 5
    for pixels, true in zip(found, labels):
        np.testing.assert_array_equal(pixels[: true.shape[0], : true.shape[1]] > 127, true > 0)


def test_exr(export, labels):
    OpenEXR = pytest.importorskip("OpenEXR")
    folder = export("exr")
    for index, true in enumerate(labels):
        with OpenEXR.File(str(folder / f"{index:05d}.exr"), separate_channels=True) as file:
            channels = {name: channel.pixels for name, channel in file.channels().items()}
        assert set(channels) == {f"object_{label}.A" for label in np.unique(true) if label}
        for name, pixels in channels.items():
            np.testing.assert_array_equal(pixels, true == int(name[7:-2]))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file that is always full")
def test_a_full_disk_is_said_by_exr_too(export, monkeypatch):
    monkeypatch.setattr("stm_model.io.formats.pictures.whole", lambda path: nullcontext(Path("/dev/full")))
    with pytest.raises(OSError, match="No space left"):
        export("exr")


def test_png(export, labels):
    folder = export("png")
    for index, true in enumerate(labels):
        np.testing.assert_array_equal(read_mask(folder / f"{index:05d}.png"), true)


@pytest.mark.parametrize("name", FORMATS)
def test_what_came_before_an_error_is_whole_and_earlier_files_go(name, tmp_path, labels, frames):
    def run(count, error=None):
        with Exports([name], tmp_path, Clip("walk")) as exports:
            for index in range(count):
                exports.write(index, labels[index], frames[index])
            if error:
                raise error

    def content():
        return {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    run(3)
    alone = content()
    run(5)
    with pytest.raises(KeyboardInterrupt):
        run(3, KeyboardInterrupt())
    assert set(content()) == set(alone) and not any("partial" in str(file) for file in alone)
    if FORMATS[name].target.endswith((".json", ".xml")):
        assert content() == alone


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_written_without_a_frame(name, tmp_path):
    with Exports([name], tmp_path / "out", Clip("walk")):
        pass
    assert not (tmp_path / "out").exists()


def test_a_discarded_export_leaves_the_one_before(tmp_path, labels, frames):
    names = ["coco", "cvat", "matte"]
    with Exports(names, tmp_path, Clip("walk")) as exports:
        exports.write(0, labels[0], frames[0])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with Exports(names, tmp_path, Clip("walk")) as exports:
        exports.write(0, labels[1], frames[1])
        exports.discard()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_cannot_be_written_is_said(monkeypatch):
    with pytest.raises(ValueError, match=r"--export gif: no such format; expected some of png, coco, .*, exr"):
        check_formats(["coco", "gif"], "--export", FORMATS)
    with pytest.raises(ValueError, match="--to alpha-mov: shows the video's own pixels; add --video"):
        check_formats(["alpha-mov"], "--to", FORMATS, frames=False)
    monkeypatch.setattr("stm_model.io.formats.table.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--export exr: needs OpenEXR, .*: pip install 'stm-kernels\[exr\]'"):
        check_formats(["exr"], "--export", FORMATS)


def test_colors_stay_beside_objects_and_nowhere_else():
    frame = np.random.default_rng(0).integers(1, 256, (61, 93, 3), dtype=np.uint8)
    rows, columns = np.mgrid[:61, :93]
    for row, column in ((60, 92), (0, 0), (30, 40)):
        labels = np.zeros((61, 93), dtype=np.uint8)
        labels[row, column] = 3
        picture = with_alpha(frame, labels)
        assert np.argwhere(picture[..., 3]).tolist() == [[row, column]]
        distance = np.maximum(abs(rows - row), abs(columns - column))
        assert np.array_equal(picture[distance <= RIM, :3], frame[distance <= RIM])
        assert not picture[distance > 3 * RIM].any()
    assert not with_alpha(frame, np.zeros_like(labels)).any()
