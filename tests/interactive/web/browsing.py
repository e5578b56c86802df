"""For the page's tests: a user in a browser, and the server's workbench."""

import socket
import threading
import time

import numpy as np


class Current:
    """Stands for the workbench of the present test, so that all of them can share one server."""

    workbench = None

    def __getattr__(self, name):
        return getattr(self.workbench, name)


class Served:
    """The page of a workbench, served by a thread; it can be stopped and started again at the same address."""

    def __init__(self, workbench):
        self.workbench, self.port = workbench, 0

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        import uvicorn

        from stm_model.interactive.web.app import make_app

        listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(make_app(self.workbench), log_level="warning", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        self.thread.start()

    def stop(self):
        self.server.should_exit = True
        self.thread.join(60)


def wait(workbench):
    deadline = time.monotonic() + 120
    while workbench.job.running:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return workbench.job


def open_page(browser, address):
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector("#stm-picture[data-frame]")
    return page


def draw(page, *points, button="left"):
    """Draw through points of the picture, from 0 to 1."""
    left, top, width, height = page.evaluate(
        """() => {
            const { stage: shown } = window.stmPage, box = shown.box();
            const stage = shown.stage.getBoundingClientRect();
            return [stage.left + box.left, stage.top + box.top, box.width, box.height];
        }"""
    )
    places = [(left + x * width, top + y * height) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down(button=button)
    for place in places[1:]:
        page.mouse.move(*place, steps=5)
    page.mouse.up(button=button)


def status(page, condition):
    """Wait until what the page knows of the session is so."""
    page.wait_for_function(f"(() => {{ const s = window.stmPage.status; return s && ({condition}); }})()")


def colour(page, x, y):
    """What the page shows at a point of the picture, as RGB, once it shows the frame it should."""
    page.wait_for_function("document.querySelector('#stm-picture').getAttribute('src') === window.stmPage.stage.wanted")
    return np.array(
        page.evaluate(
            """async ([x, y]) => {
                const { stage } = window.stmPage, picture = stage.fetched(stage.wanted);
                await picture.decode();
                const canvas = new OffscreenCanvas(picture.naturalWidth, picture.naturalHeight);
                const context = canvas.getContext("2d");
                context.drawImage(picture, 0, 0);
                const place = [Math.round(x * (canvas.width - 1)), Math.round(y * (canvas.height - 1))];
                return [...context.getImageData(...place, 1, 1).data].slice(0, 3);
            }""",
            [x, y],
        )
    )


def spot(mask):
    """A point well inside an object, from 0 to 1."""
    rows, columns = np.nonzero(mask)
    return columns.mean() / (mask.shape[1] - 1), rows.mean() / (mask.shape[0] - 1)
