"""The report of `stm evaluate`: it stands alone, and its pictures show what is wrong."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from stm_model.evaluation import figures
from stm_model.io import images
from stm_model.io.video import open_video


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.urls, self.images = [], 0

    def handle_starttag(self, tag, attrs):
        self.urls += [value for key, value in attrs if key in ("src", "href", "srcset", "data")]
        self.images += tag == "img"


def test_the_report_stands_alone(evaluate, tmp_path):
    assert evaluate("--overlay", dataset="davis2016")[0] == 0
    folder = tmp_path / "out"
    page = (folder / "report.html").read_text()
    links = _Links()
    links.feed(page)
    outside = [url for url in links.urls if not url.startswith("data:image/")]
    assert outside == ["overlays/ant.mp4", "overlays/bee.mp4", "overlays/cat.mp4"]
    for url in outside:
        assert open_video(folder / url).frame_count >= 6
    # bars, J over time, three views of the worst frame of each of three videos, the contact sheet
    assert links.images == 2 + 3 * 3 + 1 and "url(" not in page and "@import" not in page and "<script" not in page
    assert 'name="viewport"' in page
    for words in ("STM (0.16 s a frame), quoted [1]", "0.887", "[1] Oh et al., ICCV 2019", "first mask repeated"):
        assert words in page
    for name in ("videos", "over_time", "worst", "contact_sheet"):
        assert images.read_image(folder / "figures" / f"{name}.png").shape[1] > 240
    summary = json.loads((folder / "evaluation.json").read_text())
    worst = min((value, row["video"]) for row in summary["objects"] for value in row["J_by_frame"])
    first = re.search(r"<h2>Worst frames</h2>.*?<figcaption>(\w+), frame \d+: J ([\d.]+)<", page, re.DOTALL)
    assert first[1] == worst[1] and float(first[2]) == pytest.approx(worst[0], abs=6e-4)


def test_names_are_escaped_in_the_report(evaluate, davis, tmp_path):
    root = shutil.copytree(davis, tmp_path / "davis")
    for folder in ("JPEGImages", "Annotations"):
        (root / folder / "480p/bee").rename(root / folder / "480p/b&<i>e")
    (root / "ImageSets/2017/val.txt").write_text("b&<i>e\n")
    assert evaluate(data=root)[0] == 0
    assert "<i>" not in (tmp_path / "out" / "report.html").read_text()


def test_error_maps_show_what_is_wrong():
    frame = np.full((1, 5, 3), 100, dtype=np.uint8)
    prediction = np.array([[0, 1, 1, 0, 2]], dtype=np.uint8)
    truth = np.array([[0, 1, 0, 1, 1]], dtype=np.uint8)
    colours = figures.error_map(frame, prediction, truth)[0].astype(int)
    for index, colour in ((2, figures.FALSE_POSITIVE), (3, figures.FALSE_NEGATIVE), (4, figures.CONFUSED)):
        assert abs(colours[index] - (np.array(colour) * 0.8 + 20)).max() <= 1
    assert len(set(colours[0])) == len(set(colours[1])) == 1 and colours[1, 0] > colours[0, 0]
    void = figures.error_map(frame, prediction, np.full_like(truth, 255))[0]
    assert (void == void[0]).all()


def test_the_report_has_certainty_and_corrections(evaluate, tmp_path):
    assert evaluate("--corrections", 1)[0] == 0
    page = (tmp_path / "out" / "report.html").read_text()
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    lost, row = written["certainty"]["wrong"], written["corrections"][1]
    assert "What the trust tells" in page and f"<td>{lost['count']}</td><td>{lost['auc']:.3f}</td>" in page
    assert f"<td>{row['before']:.3f}</td><td>{row['after']:.3f}</td>" in page
