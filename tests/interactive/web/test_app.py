"""The page in a browser: `stm interact`, headless Chromium, and what a user does."""

import os
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from browsing import colour, draw, open_page, spot, status

from stm_model.commands.main import main
from stm_model.data.synthetic import procedural_clip
from stm_model.io.masks import read_mask
from stm_model.io.video import VideoWriter
from stm_model.network.weights import write_tensors


@pytest.fixture(scope="module")
def clip():
    return procedural_clip(frames=12, size=(120, 160), objects=1, seed=9)


@pytest.fixture(scope="module")
def files(clip, scribble_model, tmp_path_factory):
    """A folder with a video and weights."""
    folder = tmp_path_factory.mktemp("page")
    with VideoWriter(folder / "walk.mp4", 10) as writer:
        for frame in clip[0]:
            writer.write(frame)
    write_tensors(scribble_model.state_dict(), folder / "weights.safetensors")
    (folder / "text.mp4").write_text("no video")
    return folder


@pytest.fixture
def address(files):
    """Where a running `stm interact` is."""
    pytest.importorskip("fastapi")
    command = [sys.executable, "-m", "stm_model", "interact", str(files / "walk.mp4"), "--port", "0"]
    command += ["--checkpoint", str(files / "weights.safetensors"), "--device", "cpu", "--dtype", "float32"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        line = server.stdout.readline()
        assert (found := re.fullmatch(r"open (http://127\.0\.0\.1:\d+)\n", line)), line
        yield found[1]
    finally:
        server.terminate()
        server.wait(30)


def test_scribbling_correcting_exporting_and_going_on(browser, address, clip, tmp_path):
    frames, truths = clip
    x, y = spot(truths[0])
    page = open_page(browser, address)
    bare = colour(page, x, y)

    draw(page, (x - 0.03, y), (x + 0.03, y))
    status(page, "s.annotated.length === 1 && s.objects.length === 1")
    page.wait_for_function("document.querySelector('#stm-badge').textContent.startsWith('preview:')")
    assert np.abs(colour(page, x, y) - bare).max() > 40
    draw(page, (0.03, 0.03), (0.3, 0.03), button="right")
    status(page, "s.scribbles[0].length === 2 && s.scribbles[0][1].object_id === 0")

    page.click("#stm-run")
    status(page, "s.rounds === 1 && !s.job.running")
    # half its own colour, half the object's
    assert np.abs(colour(page, x, y) - (bare + (213, 94, 0)) / 2).max() < 16
    page.keyboard.press("o")
    assert np.abs(colour(page, x, y) - bare).max() < 16
    page.keyboard.press("o")

    page.keyboard.press("End")
    page.wait_for_selector("#stm-picture[data-frame='11']")
    draw(page, (0.9, 0.9), (0.95, 0.6), button="right")
    status(page, "s.annotated.length === 2")
    page.keyboard.press("r")
    status(page, "s.rounds === 2 && !s.job.running")

    page.click("#stm-results")
    page.click("#stm-write")
    page.wait_for_selector("#stm-files a >> text=overlay.mp4")
    with page.expect_download() as download:
        page.click("text=masks.zip")
    assert download.value.suggested_filename == "walk-masks.zip"
    with zipfile.ZipFile(download.value.path()) as archive:
        assert len(archive.namelist()) == 12
        archive.extract("masks/00000.png", tmp_path)
    page.keyboard.press("Escape")
    labels = read_mask(tmp_path / "masks" / "00000.png")
    assert labels.shape == (120, 160) and labels[round(y * 119), round(x * 159)] == 1

    page.click("#stm-file summary")
    with page.expect_download() as download:
        page.click("#stm-save")
    download.value.save_as(tmp_path / "walk.stm")
    page.reload()
    page.wait_for_selector("#stm-picture[data-frame]")
    status(page, "s.yours && s.rounds === 2")
    for position in (4, 3, 2, 1, 0):
        page.keyboard.press("z")
        status(page, f"s.position === {position}")
    assert np.abs(colour(page, x, y) - bare).max() < 16
    page.set_input_files("#stm-load", tmp_path / "walk.stm")
    status(page, "s.rounds === 2 && s.position === 5")
    assert np.abs(colour(page, x, y) - (bare + (213, 94, 0)) / 2).max() < 16
    assert browser.elsewhere == [] and browser.errors == []


def test_a_second_tab_and_input_that_is_refused(browser, address, clip, files):
    first = open_page(browser, address)
    x, y = spot(clip[1][0])
    draw(first, (x, y), (x + 0.02, y))
    status(first, "s.annotated.length === 1")

    second = open_page(browser, address)
    assert second.locator("#stm-taken").inner_text().startswith("This session is open in another tab.")
    status(second, "!s.yours && s.annotated.length === 1")
    second.click("#stm-take")
    status(second, "s.yours")
    first.keyboard.press("z")
    first.wait_for_selector("#stm-taken[open]")
    status(second, "s.annotated.length === 1")

    second.set_input_files("#stm-open", files / "text.mp4")
    second.wait_for_selector("#stm-message.stm-bad >> text=text.mp4: does not open as a video")
    second.set_input_files("#stm-load", files / "text.mp4")
    second.wait_for_selector("#stm-message.stm-bad >> text=not a session, or a damaged one")
    second.keyboard.press("t")
    second.wait_for_selector("#stm-message.stm-bad >> text=frame 0 has no mask to track from")
    status(second, "s.yours && s.annotated.length === 1 && s.position === 1")
    assert browser.elsewhere == [] and browser.errors == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{folder}/text.mp4"], "text.mp4: does not open as a video"),
        (["{folder}/nothing.mp4"], "nothing.mp4: no such video file or folder of frames"),
        (["{folder}/walk.mp4", "--most-frames", "5"], "walk: expected at most 5 frames, got 12"),
        (["{folder}/walk.mp4", "--memory-limit", "much"], "--memory-limit: "),
        (["{folder}/walk.mp4", "--session", "{folder}/text.mp4"], "text.mp4: not a session, or a damaged one"),
        (["{folder}/walk.mp4", "--host", "203.0.113.1"], "203.0.113.1"),
        (["{folder}/walk.mp4", "--size", "8"], "size: expected at least 16 pixels, got 8"),
        ([], "Missing from stm interact: PATH"),
    ],
)
def test_bad_input_ends_with_one_line(files, capsys, arguments, message):
    pytest.importorskip("fastapi")
    given = [argument.format(folder=files) for argument in arguments]
    weights = ["--checkpoint", str(files / "weights.safetensors"), "--device", "cpu"] if given else []
    assert main(["interact", *given, *weights]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("stm: error: ") and message in error


def test_tracking_weights_are_refused(files, capsys):
    from stm_model.runtime import DEFAULT_WEIGHTS

    pytest.importorskip("fastapi")
    assert main(["interact", str(files / "walk.mp4"), "--checkpoint", str(DEFAULT_WEIGHTS), "--device", "cpu"]) == 2
    assert "expected a network guided by scribbles, got one guided by masks" in capsys.readouterr().err
