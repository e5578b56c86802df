"""The page in a browser, over a workbench of this process: objects, formats, time line, zoom, keys, small screens."""

import json
import threading
import zipfile

import numpy as np
import pytest
from browsing import colour, draw, open_page, spot, status

from stm_model.io.formats.given import read_given
from stm_model.io.masks import write_mask

SHOWN = "button:visible, summary:visible, input:visible, a:visible"


@pytest.fixture
def page(browser, address):
    page = open_page(browser, address)
    yield page
    assert browser.elsewhere == [] and browser.errors == []


def box(page):
    return page.evaluate("window.stmPage.stage.box()")


def answer_certainty(page, frames):
    """Say this of the frames whenever the page asks from now on."""

    def answer(route):
        version = route.request.url.partition("version=")[2]
        route.fulfill(json={"version": version, "frames": frames, "below": 0.8})

    page.route("**/stm/certainty*", answer)


def exported(page, name, file):
    """Where the browser has put the session in a format."""
    page.keyboard.press("x")
    for box in page.query_selector_all("#stm-formats :checked"):
        box.uncheck()
    page.check(f"[value={name}]")
    page.click("#stm-write")
    with page.expect_download() as download:
        page.click(f"#stm-files a >> text={file}")
    page.click("#stm-export >> text=Close")
    return download.value.path()


def test_a_mask_is_loaded_its_objects_named_and_colored_tracked_and_exported(page, workbench, clip, tmp_path):
    write_mask(tmp_path / "first.png", clip[1][0])
    page.set_input_files("#stm-given", tmp_path / "first.png")
    status(page, "s.objects.length === 2 && s.annotated[0] === 0")
    assert np.array_equal(workbench.session.labels(0), clip[1][0])
    page.click("[data-label='2']")
    page.fill("#stm-called", 'tom & "jerry"')
    page.keyboard.press("Enter")
    status(page, "s.names[2].startsWith('tom')")
    page.fill("#stm-color", "#10e020")
    page.dispatch_event("#stm-color", "change")
    status(page, "s.colors[2] === '#10e020'")
    bare = clip[0][0].astype(int)
    x, y = spot(clip[1][0] == 2)
    middle = bare[round(y * 69), round(x * 89)]
    assert np.abs(colour(page, x, y) - (middle + (16, 224, 32)) / 2).max() < 24
    page.keyboard.press("t")
    status(page, "s.position === 4 && !s.job?.running")
    content = json.loads(exported(page, "coco", "coco.json").read_text())
    assert {each["id"]: each["name"] for each in content["categories"]} == {1: "object 1", 2: 'tom & "jerry"'}
    path = exported(page, "cvat", "cvat.xml").rename(tmp_path / "cvat.xml")
    with pytest.warns(UserWarning, match='2 is tom & "jerry"'):
        masks = read_given(path)
    assert all(np.array_equal(masks[index], workbench.session.labels(index)) for index in range(8))
    with zipfile.ZipFile(exported(page, "yolo", "yolo.zip")) as archive:
        assert b'names: ["object 1", "tom & \\"jerry\\""]' in archive.read("yolo/data.yaml")


def test_a_mask_of_one_object_comes_in_mid_video(page, workbench, clip, tmp_path):
    x, y = spot(clip[1][0] == 1)
    draw(page, (x - 0.03, y), (x + 0.03, y))
    status(page, "s.objects.length === 1")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("n")
    write_mask(tmp_path / "two.png", np.where(clip[1][4] == 2, 255, 0))
    page.set_input_files("#stm-given", tmp_path / "two.png")
    page.wait_for_selector("#stm-message >> text=two.png: its only label is 255, which is void; for a black-and-white")
    page.set_input_files("#stm-one", tmp_path / "two.png")
    status(page, "s.objects.length === 2 && s.annotated.length === 2")
    assert np.array_equal(workbench.session.labels(4) == 2, clip[1][4] == 2)


def test_an_object_is_drawn_in_mid_video_deleted_and_brought_back(page, workbench, clip):
    for frame, label in ((0, 1), (5, 2)):
        page.keyboard.press("Home")
        for _ in range(frame):
            page.keyboard.press("ArrowRight")
        page.keyboard.press("n")
        x, y = spot(clip[1][frame] == label)
        page.keyboard.press("s" if label == 1 else "d")
        draw(page, (x - 0.03, y), (x + 0.03, y + 0.02))
        status(page, f"s.objects.length === {label}")
        page.click("#stm-run")
        status(page, f"s.rounds === {label} && !s.job.running")
    before = workbench.session.masks()
    assert (before[5] == 2).any() and workbench.session.annotated_frames == (0, 5)
    page.click("[data-label='2']")
    page.keyboard.press("Delete")
    status(page, "s.objects.length === 1 && s.annotated.length === 1")
    assert not (workbench.session.masks() == 2).any()
    page.keyboard.press("z")
    status(page, "s.objects.length === 2")
    assert np.array_equal(workbench.session.masks(), before)


def test_uncertain_frames_stand_on_the_time_line_and_are_jumped_to(page):
    assert page.is_hidden("#stm-doubt")
    answer_certainty(page, [None, 0.9, 0.7, 0.4, 0.6, 0.95, 0.5, 0.9])
    page.reload()
    page.wait_for_selector("#stm-doubt >> text=4 uncertain")
    shown = []
    for press in (lambda: page.keyboard.press("u"), lambda: page.click("#stm-doubt"), lambda: page.keyboard.press("u")):
        press()
        shown.append(page.evaluate("window.stmPage.frame"))
    # the worst of each run of them, around
    assert shown == [3, 6, 3]
    assert page.get_attribute("#stm-frame", "aria-valuetext") == "frame 3, uncertain"
    columns = page.evaluate(
        """() => {
            const { marks } = window.stmPage.timeline, context = marks.getContext("2d");
            const step = (marks.clientWidth - 16) / 7;
            const at = (frame) => context.getImageData(8 + frame * step, marks.clientHeight - 9, 1, 1);
            return [0, 1, 3].map((frame) => [...at(frame).data]);
        }"""
    )
    assert columns[0][3] == columns[1][3] == 0 and columns[2][0] > columns[2][2] + 100
    slider = page.locator("#stm-frame").bounding_box()
    page.mouse.click(slider["x"] + slider["width"] - 9, slider["y"] + slider["height"] / 2)
    page.wait_for_selector("#stm-picture[data-frame='7']")


def test_work_shows_the_time_left_and_can_be_cancelled(page, workbench, clip, monkeypatch):
    x, y = spot(clip[1][0] == 1)
    draw(page, (x - 0.03, y), (x + 0.03, y))
    status(page, "s.objects.length === 1")
    page.wait_for_function("document.querySelector('#stm-badge').textContent.startsWith('preview:')")
    segment, go_on = workbench.session._segmenter.segment, threading.Event()

    def slow(memory, asked):
        for number, result in enumerate(segment(memory, asked)):
            if number == 3:
                go_on.wait(60)
            yield result

    monkeypatch.setattr(workbench.session._segmenter, "segment", slow)
    page.click("#stm-run")
    page.wait_for_selector("#stm-left >> text=/round 1: 3 of 8 frames, \\d+ s left/")
    assert page.evaluate("document.querySelector('#stm-progress').value") == pytest.approx(3 / 8)
    assert page.is_hidden("#stm-run")
    page.click("#stm-stop")
    status(page, "s.job.stopping")
    go_on.set()
    page.wait_for_selector("#stm-message >> text=round 1 was stopped")
    assert workbench.session.rounds == 0 and page.is_visible("#stm-run")


def test_playing_goes_on_until_it_is_paused_or_at_the_end(page):
    # so slow that there is time to pause before the end
    page.evaluate("() => { window.stmPage.timeline.fps = 2; }")
    page.keyboard.press(" ")
    page.wait_for_selector("#stm-picture[data-frame='3']")
    assert page.inner_text("#stm-play") == "Pause"
    page.click("#stm-play")
    assert page.inner_text("#stm-play") == "Play"
    frame = page.evaluate("window.stmPage.frame")
    page.wait_for_timeout(800)
    assert page.evaluate("window.stmPage.frame") == frame >= 3
    page.evaluate("() => { window.stmPage.timeline.fps = 30; }")
    page.keyboard.press(" ")
    page.wait_for_selector("#stm-picture[data-frame='7']")
    page.wait_for_selector("#stm-play >> text=Play")


def test_zooming_keeps_the_point_and_strokes_land_where_they_are_drawn(page):
    whole = box(page)
    stage = page.locator("#stm-stage").bounding_box()
    x, y = 0.7, 0.6
    page.mouse.move(stage["x"] + whole["left"] + x * whole["width"], stage["y"] + whole["top"] + y * whole["height"])
    page.mouse.wheel(0, -600)
    page.wait_for_function(f"window.stmPage.stage.box().scale > {3 * whole['scale']}")
    zoomed = box(page)
    for side, length, at in (("left", "width", x), ("top", "height", y)):
        assert zoomed[side] + at * zoomed[length] == pytest.approx(whole[side] + at * whole[length], abs=1)
    draw(page, (0.68, 0.6), (0.72, 0.6))
    status(page, "s.annotated.length === 1")
    path = page.evaluate("window.stmPage.status.scribbles[0][0].path")
    assert path[0] == pytest.approx([0.68, 0.6], abs=0.003) and path[-1] == pytest.approx([0.72, 0.6], abs=0.003)
    page.keyboard.press("l")
    assert box(page)["left"] == pytest.approx(zoomed["left"] - 60, abs=1)
    page.keyboard.press("0")
    assert box(page) == pytest.approx(whole)


def test_the_brush_paints_and_erases_in_its_width(page, workbench):
    page.keyboard.press("d")
    for _ in range(20):
        page.keyboard.press("]" if page.evaluate("window.stmPage.brush") < 20 else "[")
    brush = page.evaluate("window.stmPage.brush")
    draw(page, (0.2, 0.5), (0.8, 0.5))
    status(page, "s.annotated.length === 1")
    column = (workbench.session.labels(0) == 1)[:, 45]
    assert abs(column.sum() - brush) <= 1 and column[35]
    draw(page, (0.5, 0.1), (0.5, 0.9), button="right")
    status(page, "s.position === 2")
    labels = workbench.session.labels(0)
    assert not labels[:, 45].any() and labels[35, 22] == 1
    page.keyboard.press("e")
    draw(page, (0.25, 0.5), (0.3, 0.5))
    status(page, "s.position === 3")
    assert not workbench.session.labels(0)[35, 25].any()


def test_the_first_use_is_explained_once(page):
    assert "Draw a line on an object" in page.inner_text("#stm-hint")
    page.click("#stm-understood")
    page.reload()
    page.wait_for_selector("#stm-picture[data-frame]")
    assert page.is_hidden("#stm-hint")


def test_a_server_that_is_gone_is_told_and_noticed_when_it_is_back(page, served):
    served.stop()
    page.keyboard.press("r")
    page.wait_for_selector("#stm-message.stm-bad >> text=/^the server is gone: this page goes on when it is back/")
    served.start()
    page.wait_for_selector("#stm-message >> text=the server is back")
    draw(page, (0.4, 0.4), (0.5, 0.5))
    status(page, "s.annotated.length === 1")


def test_a_screen_of_390_pixels_shows_everything(browser, address, clip):
    page = browser.new_page()
    page.set_viewport_size({"width": 390, "height": 844})
    answer_certainty(page, [0.5] * 8)
    page.goto(address)
    page.wait_for_selector("#stm-picture[data-frame]")
    x, y = spot(clip[1][0] == 1)
    page.click("#stm-understood")
    draw(page, (x - 0.03, y), (x + 0.03, y))
    status(page, "s.objects.length === 1")
    page.wait_for_selector("#stm-doubt:visible")
    page.click("#stm-brush")
    for opened in (None, "#stm-results", "#stm-help", "#stm-file summary"):
        if opened:
            page.click(opened)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        places = [element.bounding_box() for element in page.query_selector_all(SHOWN)]
        inside = [place for place in places if place["x"] >= 0 and place["x"] + place["width"] <= 390]
        assert len(places) > 20 and inside == places
        page.keyboard.press("Escape")
    assert page.locator("#stm-stage").bounding_box()["height"] > 250
    page.click("#stm-run")
    status(page, "s.rounds === 1 && !s.job.running")
    assert browser.errors == []


def test_every_control_is_reached_by_tab_and_typing_a_name_presses_no_key(page, workbench, clip):
    x, y = spot(clip[1][0] == 1)
    draw(page, (x - 0.03, y), (x + 0.03, y))
    status(page, "s.objects.length === 1")
    page.focus("#stm-file summary")
    page.keyboard.press("Enter")
    page.keyboard.press("d")
    wanted = set(
        page.evaluate(
            """(shown) => [...document.querySelectorAll("button, summary, input, a")]
            .filter((each) => each.checkVisibility() && !each.disabled).map((each) => each.id || each.textContent)""",
            SHOWN,
        )
    )
    reached = set()
    for _ in range(2 * len(wanted)):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert len(wanted) > 25 and wanted <= reached | {page.evaluate("document.querySelector('summary').textContent")}
    page.fill("#stm-called", "")
    page.focus("#stm-called")
    page.keyboard.type("zebra nt 12")
    page.keyboard.press("Enter")
    status(page, "s.names[1] === 'zebra nt 12'")
    assert workbench.session.steps[1] == 2 and page.evaluate("window.stmPage.tool") == "brush"
