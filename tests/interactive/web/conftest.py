import shutil

import pytest
from browsing import Served

from stm_model.interactive.footage import Footage
from stm_model.interactive.session import ScribbleSession
from stm_model.interactive.web.workbench import Workbench
from stm_model.io.video import VideoWriter

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# nothing that it would fetch on its own account, and no sandbox, which needs rights that a container lacks
CHROMIUM_OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
SECONDS = 30_000  # milliseconds; generous, for machines with other work


@pytest.fixture(scope="module")
def video(clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "walk.mp4"
    with VideoWriter(path, 10) as writer:
        for frame in clip[0]:
            writer.write(frame)
    return path


@pytest.fixture
def workbench(video, scribble_model, tracking_model):
    workbench = Workbench(
        Footage(video, most_frames=20),
        lambda footage: ScribbleSession(scribble_model, footage.frames),
        lambda: tracking_model,
        most_frames=20,
        upload_bytes=2**20,
    )
    workbench.enter("one")
    yield workbench
    workbench.close()


@pytest.fixture
def served(workbench):
    """The page of `workbench`, served by a thread of this process."""
    pytest.importorskip("fastapi")
    workbench.leave("one")
    served = Served(workbench)
    served.start()
    yield served
    served.stop()


@pytest.fixture
def address(served):
    """Where the page is."""
    return served.address


@pytest.fixture(scope="module")
def chromium():
    """A browser without pages."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def browser(chromium, address):
    """A browser that holds what its pages asked of other hosts in `elsewhere`."""
    context = chromium.new_context(viewport={"width": 1100, "height": 800}, accept_downloads=True)
    context.set_default_timeout(SECONDS)
    context.elsewhere, context.errors = [], []
    here = lambda url: url.startswith((address, "blob:", "data:"))  # noqa: E731
    context.on("request", lambda request: here(request.url) or context.elsewhere.append(request.url))
    context.on("weberror", lambda error: context.errors.append(str(error.error)))
    yield context
    context.close()
