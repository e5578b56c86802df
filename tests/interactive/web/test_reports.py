"""Reports on the screen of a phone."""

from pathlib import Path

import numpy as np
import pytest

import stm_model.evaluation
import stm_model.interactive
from stm_model.evaluation.report import png_url, write_page
from stm_model.io.images import write_image

COLUMNS = ["J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean"]
VALUES = dict.fromkeys(COLUMNS, 0.5)
TEMPLATES = {
    "evaluation": Path(stm_model.evaluation.__file__).with_name("templates") / "evaluation.html",
    "interactive": Path(stm_model.interactive.__file__).with_name("report.html"),
}


TOLD = ("auc", "precision", "recall")


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_report_fits_and_its_numbers_and_letters_are_seen(chromium, kind, tmp_path):
    write_image(tmp_path / "chart.png", np.full((300, 832, 3), 200, np.uint8))
    chart = png_url(tmp_path / "chart.png")
    content = {
        "scores": [("ours", "tracked", VALUES), ("quoted", "STM (0.16 s a frame), quoted [1]", VALUES)],
        "rows": [("schoolgirls-of-davis", VALUES), ("mean", VALUES)],
        "charts": [("Over time", chart, "J by frame")],
        "worst": [("a, frame 1", [chart] * 3)],
        "facts": ["6 videos"],
        "sources": ["Oh et al., ICCV 2019"],
        "samples": [1],
        "versions": {"torch": "2"},
        "error_colors": [],
        "sheet_caption": "predictions",
        "overlays": {},
        "corrections": [{"corrections": 0, "J-Mean": 0.5, "F-Mean": 0.5}],
        "certainty": {"masks": 9} | dict.fromkeys(("wrong", "fallen"), {"count": 2, **dict.fromkeys(TOLD, 0.5)}),
        "timed": True,
        "interactions": 8,
        "where": "cpu",
        "threshold": "60",
    }
    command = "stm evaluate --data " + "a-long-name/" * 12
    write_page(
        tmp_path / "report.html",
        TEMPLATES[kind],
        **content,
        title="davis2017, split val",
        command=command,
        columns=COLUMNS,
        sheet=chart,
        curve=chart,
    )
    context = chromium.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    # matplotlib's letters of 10 points on charts of 832 pixels
    assert page.locator("figure img:only-child").first.bounding_box()["width"] / 832 > 0.75
    assert page.locator("td", has_text="0.500").first.bounding_box()["x"] < 330 - 60
    page.evaluate("document.querySelector('.wide').scrollLeft = 999")
    name = page.locator("tr:nth-child(2) td:first-child").first.bounding_box()
    assert name["x"] == pytest.approx(16, abs=1) and name["width"] < 160
    assert page.locator("tr:nth-child(2) td:last-child").first.bounding_box()["x"] < 390
    context.close()
