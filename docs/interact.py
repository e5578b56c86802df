"""The pictures of the page in docs/interactive.md, by headless Chromium.

python docs/interact.py VIDEO     # SAM 2's demo video: a person, a dog
"""

import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Literal

from playwright.sync_api import Page, sync_playwright

from stm_model.io.images import resize_frame
from stm_model.io.video import VideoWriter, open_video

FRAMES, EVERY, HEIGHT = 90, 2, 480
OBJECTS = {
    "person": [[(0.33, 0.33), (0.26, 0.47), (0.31, 0.53), (0.36, 0.6)], [(0.24, 0.55), (0.28, 0.65), (0.24, 0.74)]],
    "dog": [[(0.39, 0.57), (0.46, 0.58), (0.53, 0.62), (0.515, 0.72)], [(0.432, 0.64), (0.435, 0.72)]],
}
"""Scribbles through points of the first frame, from 0 to 1."""
NEITHER = [[(0.46, 0.71), (0.5, 0.72)], [(0.47, 0.78), (0.56, 0.82)], [(0.33, 0.6), (0.3, 0.8), (0.7, 0.9)]]
"""Scribbles by the right mouse button."""
FOLDER = Path(__file__).parent


def draw(page: Page, points: list[tuple[float, float]], button: Literal["left", "right"] = "left") -> None:
    """A stroke through points of the picture."""
    box = page.evaluate("window.stmPage.stage.box()")
    stage = page.locator("#stm-stage").bounding_box() or {}
    places = [
        (stage["x"] + box["left"] + x * box["width"], stage["y"] + box["top"] + y * box["height"]) for x, y in points
    ]
    page.mouse.move(*places[0])
    page.mouse.down(button=button)
    for place in places[1:]:
        page.mouse.move(*place, steps=8)
    page.mouse.up(button=button)


def use(page: Page) -> None:
    """Scribble, name, run, go to an uncertain frame; a picture of the preview, and one of the brush."""
    page.wait_for_selector("#stm-picture[data-frame]")
    for label, (name, strokes) in enumerate(OBJECTS.items(), 1):
        page.keyboard.press("n")
        for points in strokes:
            draw(page, points)
        page.wait_for_function(f"window.stmPage.status.objects.length === {label}")
        page.fill("#stm-called", name)
        page.keyboard.press("Enter")
        page.wait_for_function(f"window.stmPage.status.names[{label}] === '{name}'")
    for points in NEITHER:
        draw(page, points, "right")
    page.wait_for_function("document.querySelector('#stm-badge').textContent.startsWith('preview:')")
    page.wait_for_timeout(3000)
    page.screenshot(path=FOLDER / "interact_scribble.png")
    page.keyboard.press("r")
    page.wait_for_function("window.stmPage.status.rounds === 1 && !window.stmPage.status.job.running")
    page.wait_for_timeout(1000)
    page.keyboard.press("d")
    page.keyboard.press("u")
    page.wait_for_timeout(1000)
    stage = page.locator("#stm-stage").bounding_box() or {}
    page.mouse.move(stage["x"] + 0.45 * stage["width"], stage["y"] + 0.5 * stage["height"])
    page.mouse.wheel(0, -200)
    page.wait_for_timeout(300)
    page.screenshot(path=FOLDER / "interact_correct.png")


def main(video: Path) -> None:
    """Serve a part of the video, and use the page as a user does."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        source = open_video(video)
        size = HEIGHT, round(source.size[1] * HEIGHT / source.size[0])
        with VideoWriter(f"{folder}/dog.mp4", source.fps / EVERY) as writer:
            for frame in islice(source, 0, FRAMES * EVERY, EVERY):
                writer.write(resize_frame(frame, size))
        command = [sys.executable, "-m", "stm_model", "interact", f"{folder}/dog.mp4", "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            address = server.stdout.readline().split()[-1]
            browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.set_default_timeout(300_000)
            page.goto(address)
            use(page)
            browser.close()
            server.terminate()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
