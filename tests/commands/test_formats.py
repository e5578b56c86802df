"""Other tools' formats on the command line: `stm track --export`, their masks given to it, and `stm convert`."""

import json
import shutil

import av
import numpy as np
import pytest
from answers import refused
from pycocotools.coco import COCO

from stm_model.commands.main import main
from stm_model.io.formats.given import open_drawn
from stm_model.io.masks import read_mask


def masks_of(out):
    return [read_mask(file) for file in sorted((out / "masks").glob("*.png"))]


def exported(out):
    """The masks in out's coco.json."""
    return list(open_drawn(out / "coco.json").values())


@pytest.fixture
def convert(tmp_path, capsys):
    """Run `stm convert`; the exit code, stdout and stderr."""

    def run(*arguments, out=tmp_path / "converted"):
        return main(["convert", *map(str, arguments), "--out", str(out)]), *capsys.readouterr()

    return run


def test_tracking_writes_the_formats_beside_the_masks(track, tmp_path):
    out = tmp_path / "out"
    code, said, _ = track("--export", "coco", "mots", "alpha-mov", "--json")
    summary = json.loads(said)
    assert code == 0 and {"coco", "mots", "alpha-mov"} <= set(summary["files"])
    assert summary["settings"]["export"] == ["coco", "mots", "alpha-mov"]
    np.testing.assert_array_equal(exported(out), masks_of(out))
    assert len(COCO(str(out / "coco.json")).imgs) == 8 and len(list((out / "mots" / "instances").glob("*.png"))) == 8
    with av.open(str(out / "alpha.mov")) as film:
        assert film.streams.video[0].frames == 8
    # said to be finished with the same formats, refused with others
    assert track("--export", "coco", "mots", "alpha-mov", "--resume")[0] == 0
    code, _, said = track("--export", "coco", "--resume")
    assert code == 2 and "was tracked with --export ['coco', 'mots', 'alpha-mov'], now it is ['coco']" in said
    # an earlier run's do not stay beside other masks
    (out / "mots" / "mine.txt").touch()
    assert track("--export", "yolo", "--overwrite")[0] == 0
    assert sorted(file.name for file in out.iterdir()) == ["masks", "mots", "overlay.mp4", "summary.json", "yolo"]
    assert not list((out / "mots").rglob("*.png")) and (out / "mots" / "mine.txt").exists()


def test_a_run_that_goes_on_exports_what_was_tracked_before(track, tmp_path, monkeypatch):
    from stm_model.tracking.tracker import Tracker

    out, step, formats = tmp_path / "out", Tracker._track, ["coco", "cvat", "labelme", "matte"]
    assert track("--export", *formats, out=tmp_path / "whole")[0] == 0

    def stopping(self, *arguments):
        for result in step(self, *arguments):
            if result.index == 5:
                raise KeyboardInterrupt
            yield result

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "_track", stopping)
        assert track("--export", *formats, "--save-every", "1e-9")[0] == 130
    assert len(exported(out)) == 5  # what is done is kept
    assert track("--export", *formats, "--resume")[0] == 0
    for name in ("coco.json", "cvat.xml", *(f"labelme/{index:05d}.json" for index in range(8))):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_formats_that_cannot_be_written_are_refused_before_anything_is(track, tmp_path):
    for name in ("gif", "png"):
        code, _, said = track("--export", "coco", name)
        assert code == 2 and said.startswith(
            f"stm: error: --export {name}: no such format; expected some of coco, ytvis"
        )
    assert not (tmp_path / "out").exists()


def test_masks_of_other_tools_are_tracked_from(track, convert, clip, tmp_path):
    assert convert(clip / "mask.png", "--to", "coco", "cvat", "labelme")[0] == 0
    assert track()[0] == 0
    given = tmp_path / "converted"
    for number, mask in enumerate((given / "coco.json", given / "cvat.xml", given / "labelme")):
        code, _, said = track(mask=mask, out=tmp_path / str(number))
        assert (code, said) == (0, "")
        np.testing.assert_array_equal(masks_of(tmp_path / str(number)), masks_of(tmp_path / "out"))


def test_masks_of_another_video_are_refused(track, convert, clip, tmp_path):
    assert convert(clip / "mask.png", "--to", "coco")[0] == 0
    path = tmp_path / "converted" / "coco.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"images": [content["images"][0] | {"frame_index": 8}]}))
    code, _, said = track(mask=path)
    assert code == 2 and "a mask for frame 8, but" in said and "has the frames 0 to 7" in said and said.count("\n") == 1


@pytest.mark.parametrize("name", ["coco", "ytvis", "cvat", "labelme"])
def test_converting_there_and_back(name, convert, clip, tmp_path):
    code, said, warned = convert(clip / "true", "--to", name)
    assert (code, warned) == (0, "") and said.split()[0] == name
    assert convert(said.split()[1], "--to", "png", out=tmp_path / "back")[0] == 0
    np.testing.assert_array_equal(
        masks_of(tmp_path / "back"), [read_mask(file) for file in sorted((clip / "true").iterdir())]
    )


def test_converting_with_the_video(convert, clip, tmp_path):
    code, _, said = convert(clip / "true", "--to", "alpha")
    assert code == 2 and said == "stm: error: --to alpha: shows the video's own pixels; add --video VIDEO\n"
    assert convert(clip / "true", "--to", "alpha", "alpha-webm", "--video", clip / "clip.mp4")[0] == 0
    assert len(list((tmp_path / "converted" / "alpha").iterdir())) == 8


def test_a_conversion_that_fails_leaves_no_part_of_one(convert, clip, tmp_path):
    given = shutil.copytree(clip / "true", tmp_path / "given")
    (given / "00004.png").write_bytes(b"no picture")
    out = tmp_path / "converted"
    for kept in (None, "an earlier one"):
        if kept:
            out.mkdir()
            (out / "coco.json").write_text(kept)
        found = convert(given, "--to", "coco", "cvat", "matte", "--overwrite")
        assert refused(found, "00004.png: cannot be read as a picture")
        assert out.exists() == bool(kept)
    assert [file.name for file in out.iterdir()] == ["coco.json"] and (out / "coco.json").read_text() == kept


def test_conversions_that_are_refused(convert, clip, tmp_path):
    assert convert(clip / "true", "--to", "coco")[0] == 0
    code, _, said = convert(clip / "true", "--to", "coco", "cvat")
    assert code == 2 and "coco.json: is there already; choose another --out, or add --overwrite" in said
    assert not (tmp_path / "converted" / "cvat.xml").exists()
    assert convert(clip / "mask.png", "--to", "coco", "--overwrite")[0] == 0
    assert len(exported(tmp_path / "converted")) == 1
    assert convert(clip / "true", "--to", "png")[0] == 0
    masks = tmp_path / "converted" / "masks"
    code, _, said = convert(masks, "--to", "png", "--overwrite")
    assert code == 2 and "masks would replace the masks" in said and len(list(masks.iterdir())) == 8
    code, _, said = convert(tmp_path / "none.json", "--to", "coco", out=tmp_path / "other")
    assert code == 2 and "none.json: no such file" in said and not (tmp_path / "other").exists()
