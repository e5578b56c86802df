"""What stands behind the page: one tab at a time, work in the background, and requests that are refused."""

import io
import re
import threading
import zipfile

import numpy as np
import pytest
from browsing import Current, wait
from drawing import middle

from stm_model.interactive.footage import Footage
from stm_model.interactive.results import OVERLAY
from stm_model.interactive.web.workbench import Refused, TakenElsewhere, safe_name
from stm_model.io.formats.table import FORMATS
from stm_model.io.images import MediaError, read_image
from stm_model.io.masks import read_mask

STROKE = [[0.4, 0.4], [0.5, 0.5]]


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("fastapi")
    from stm_model.interactive.web.app import make_app

    current = Current()
    return make_app(current, ["testserver"]), current


@pytest.fixture
def client(server, workbench):
    """Asks the page's server without a network, as tab `one`."""
    from fastapi.testclient import TestClient

    app, current = server
    current.workbench = workbench
    return TestClient(app, headers={"x-stm-tab": "one"}, raise_server_exceptions=False)


def test_footage_holds_the_frames_of_a_video(video, clip):
    footage = Footage(video, most_frames=8)
    assert footage.frames.shape == (8, 70, 90, 3) and footage.fps == 10 and footage.name == "walk"
    # H.264 changes pixels a little
    assert np.abs(footage.frames[5].astype(int) - clip[0][5]).mean() < 12
    assert footage.damage is None


def test_footage_that_is_refused(video, tmp_path):
    with pytest.raises(MediaError, match="walk: expected at most 7 frames, got 8"):
        Footage(video, most_frames=7)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(MediaError, match="does not open as a video"):
        Footage(tmp_path / "text.mp4", most_frames=7)


def test_a_round_in_the_background(workbench):
    workbench.scribble("one", 1, 1, STROKE)
    before = workbench.status("one")["version"]
    workbench.run("one")
    job = wait(workbench)
    status = workbench.status("one")
    assert (job.done, job.total, job.error) == (8, 8, None)
    assert status["rounds"] == 1 and status["version"] != before


def test_pictures_have_a_new_version_after_a_change_alone(workbench):
    versions = [workbench.status("one")["version"]]
    for change in (lambda: workbench.scribble("one", 1, 1, STROKE), lambda: workbench.undo("one")):
        change()
        versions.append(workbench.status("one")["version"])
    workbench.redo("one")
    assert len({*versions, workbench.status("one")["version"]}) == 4
    before = workbench.status("one")["version"]
    workbench.preview("one", 1)
    with pytest.raises(Refused):
        workbench.scribble("one", 1, 9, STROKE)
    assert workbench.status("one")["version"] == before


def test_work_can_be_stopped_and_nothing_else_is_done_meanwhile(workbench, monkeypatch):
    workbench.scribble("one", 1, 1, STROKE)
    started, go_on = threading.Event(), threading.Event()
    segment = workbench.session._segmenter.segment

    def slow(*arguments):
        for result in segment(*arguments):
            started.set()
            go_on.wait(60)
            yield result

    monkeypatch.setattr(workbench.session._segmenter, "segment", slow)
    workbench.run("one")
    started.wait(60)
    for attempt in (lambda: workbench.undo("one"), lambda: workbench.run("one"), lambda: workbench.preview("one", 0)):
        with pytest.raises(Refused, match="round 1 is running; wait, or stop it"):
            attempt()
    assert workbench.picture(3, masks=True)
    workbench.stop("one")
    go_on.set()
    assert wait(workbench).error == "round 1 was stopped"
    assert workbench.session.rounds == 0 and workbench.session.annotated_frames == (1,)


def test_work_that_fails_says_why(workbench, monkeypatch, capsys):
    workbench.scribble("one", 1, 1, STROKE)

    def fail(*_):
        raise MemoryError("no memory left\nat all")

    monkeypatch.setattr(workbench.session._segmenter, "remember", fail)
    workbench.run("one")
    assert wait(workbench).error == "round 1 failed: no memory left"
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(workbench.session._segmenter, "remember", lambda *_: [][0])
    workbench.run("one")
    assert wait(workbench).error == "round 1 failed: list index out of range"
    assert "IndexError" in capsys.readouterr().err, "a bug of ours leaves its trace in the terminal"
    workbench.undo("one")


def test_warming_up_shows_nowhere(workbench):
    before = workbench.status("one")
    workbench.warm_up()
    assert workbench.status("one") == before and workbench.session.encoded_frames == 0


def test_tracking_and_painting(workbench, clip):
    workbench.paint("one", 3, 1, [[0, 0], [0.5, 0], [0.5, 1], [0, 1]], 0)
    mask = workbench.session.labels(3) == 1
    assert mask[:, :44].all() and not mask[:, 46:].any()
    workbench.paint("one", 3, 1, [[0, 0], [1, 0], [1, 0.5], [0, 0.5]], 0, erase=True)
    assert not workbench.session.labels(3)[:34].any() and workbench.session.labels(3)[37:, :44].all()
    workbench.track("one", 3, "both")
    assert wait(workbench).error is None
    assert all(workbench.session.labels(index).any() for index in range(8))


def test_a_second_tab_is_told_and_may_take_over(workbench):
    def enter(tab, take=False):
        workbench.enter(tab, take)
        return workbench.status(tab)["yours"]

    workbench.scribble("one", 1, 1, STROKE)
    assert not enter("two")
    before = workbench.session.steps
    with pytest.raises(TakenElsewhere, match="open in another tab"):
        workbench.scribble("two", 1, 1, STROKE)
    with pytest.raises(TakenElsewhere):
        workbench.stop("two")
    assert workbench.session.steps == before
    assert enter("two", take=True) and not workbench.status("one")["yours"]
    with pytest.raises(TakenElsewhere):
        workbench.undo("one")
    workbench.undo("two")
    workbench.leave("one")
    assert not enter("three")
    workbench.leave("two")
    assert enter("three")


def test_pictures_show_masks(client, workbench, tmp_path):
    def picture(address):
        (tmp_path / "a.jpg").write_bytes(client.get(address).content)
        return read_image(tmp_path / "a.jpg").astype(int)

    workbench.paint("one", 2, 1, [[0, 0], [0.5, 0], [0.5, 1], [0, 1]], 0)
    bare, shown = picture("/stm/frame/2?masks=false"), picture("/stm/frame/2?masks=true")
    assert np.abs(bare - workbench.session.frames[2]).mean() < 8
    assert np.abs(bare - shown)[:, :40].mean() > 30 and np.abs(bare - shown)[:, 50:].mean() < 3
    preview = client.post("/stm/preview", json={"frame": 2})
    assert preview.headers["content-type"] == "image/jpeg" and preview.content[:2] == b"\xff\xd8"


def test_rounds_over_the_wire(client, workbench, clip):
    path = middle(clip[1][1], 1)["path"]
    status = client.post("/stm/do/scribble", json={"frame": 1, "object": 1, "path": path}).json()
    assert status["annotated"] == [1] and status["objects"] == [1] and status["yours"]
    assert client.post("/stm/do/run", json={}).status_code == 200
    wait(workbench)
    client.post("/stm/do/export", json={"formats": ["png", "overlay", "cvat"]})
    assert wait(workbench).error is None
    assert client.post("/stm/do/status").json()["files"] == ["cvat.xml", "masks.zip", "overlay.mp4"]
    answer = client.get("/stm/file/masks.zip")
    assert 'filename="walk-masks.zip"' in answer.headers["content-disposition"]
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.namelist() == [f"masks/{index:05d}.png" for index in range(8)]
        labels = read_mask(io.BytesIO(archive.read("masks/00003.png")))
    assert np.array_equal(labels, workbench.session.labels(3))
    assert b"ftyp" in client.get("/stm/file/overlay.mp4").content[:16]
    saved, masks = client.get("/stm/file/session.stm").content, workbench.session.masks()
    for _ in range(2):
        client.post("/stm/do/undo")
    assert client.post("/stm/do/undo").json()["error"] == "nothing to undo"
    assert client.post("/stm/upload/session?name=a.stm", content=saved).json()["rounds"] == 1
    assert np.array_equal(workbench.session.masks(), masks)


def test_pictures_are_served_while_a_request_waits_for_the_session(server, workbench, monkeypatch):
    import anyio
    from httpx2 import ASGITransport, AsyncClient

    app, current = server
    current.workbench = workbench
    tab = {"x-stm-tab": "one"}
    # an action that does not wait itself: the status after it does
    monkeypatch.setattr(workbench, "leave", lambda tab: None)
    held, go_on = threading.Event(), threading.Event()

    def hold():
        with workbench._editing("one", changes=False):
            held.set()
            go_on.wait(60)

    async def ask():
        async with AsyncClient(transport=ASGITransport(app), base_url="http://testserver") as client:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: client.post("/stm/do/leave", headers=tab))
                await anyio.sleep(0.2)
                answer = await client.get("/stm/frame/0")
                assert not go_on.is_set()
                go_on.set()
        return answer

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    # without an answer the session is let go in the end, and the assertion in `ask` fails
    timer = threading.Timer(10, go_on.set)
    timer.start()
    assert anyio.run(ask).status_code == 200
    timer.cancel()
    thread.join()


def test_another_video_can_be_opened(client, workbench, video):
    client.post("/stm/do/scribble", json={"frame": 1, "object": 1, "path": STROKE})
    name = "../../etc/my walk?.mp4"
    status = client.post("/stm/upload/video", params={"name": name}, content=video.read_bytes()).json()
    assert status["video"]["name"] == "my_walk_" and status["video"]["frames"] == 8 and status["annotated"] == []


STROKE_1 = {"frame": 1, "object": 1, "path": STROKE}
OUTLINE_1 = STROKE_1 | {"brush": 0}
REFUSED = {
    "a scribble outside": ("scribble", STROKE_1 | {"path": [[0.5, 1.5]]}, "the point [0.5, 1.5] is outside the frame"),
    "an outline outside": ("paint", OUTLINE_1 | {"path": [[0, 0], [2, 0], [0, 1]]}, "a point is outside the frame"),
    "an outline of two points": ("paint", OUTLINE_1, "path: expected at least 3 points"),
    "an unknown object": ("scribble", STROKE_1 | {"object": 7}, "object 7 is unknown; expected one of 0, or 1"),
    "painted background": ("paint", OUTLINE_1 | {"object": 0}, "object 0 is unknown; expected 1 for a new one"),
    "no such frame": ("scribble", STROKE_1 | {"frame": 8}, "frame_index: expected 0 to 7, got 8"),
    "a frame by name": ("scribble", STROKE_1 | {"frame": "x"}, "frame: expected int, got 'x'"),
    "a flag by name": ("paint", OUTLINE_1 | {"erase": "no"}, "erase: expected bool, got 'no'"),
    "a flag for a frame": ("scribble", STROKE_1 | {"frame": True}, "frame: expected int, got True"),
    "no path": ("scribble", {"frame": 1, "object": 1}, "path: expected list, got None"),
    "words for points": ("scribble", STROKE_1 | {"path": ["ab"]}, "path: expected a list of at least one point"),
    "a list": ("scribble", [1], "expected a JSON object, got list"),
    "nothing to run": ("run", {}, "draw a scribble on one first"),
    "nothing to track": ("track", {"frame": 0, "direction": "both"}, "frame 0 has no mask to track from"),
    "a brush of no width": ("paint", STROKE_1 | {"brush": -1}, "brush: expected 0 to 90 pixels, got -1"),
    "a look of no object": ("describe", {"object": 1, "name": "a", "color": "#000000"}, "object 1 is unknown"),
    "no object to delete": ("remove", {"object": 3}, "object 3 is unknown; expected one of none yet"),
    "no such format": ("export", {"formats": ["gif"]}, "export gif: no such format; expected some of png, coco"),
    "no format": ("export", {"formats": []}, "export: expected some of overlay, png, coco"),
    "no such action": ("format", {}, "unknown action 'format'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named_and_changes_nothing(client, workbench, case):
    action, content, message = REFUSED[case]
    answer = client.post(f"/stm/do/{action}", json=content)
    assert answer.status_code == 400 and message in answer.json()["error"]
    assert workbench.session.steps == (("opened",), 0)


@pytest.mark.parametrize("body", ["{", '{"frame": NaN}', "\xff", "[" * 100_000])
def test_broken_json_is_refused(client, workbench, body):
    answer = client.post("/stm/do/scribble", content=body.encode("latin-1"))
    assert answer.status_code == 400 and answer.json()["error"].startswith("broken JSON")
    assert workbench.session.steps == (("opened",), 0)


def test_uploads_that_are_refused_leave_the_session_as_it_was(client, workbench):
    client.post("/stm/do/scribble", json=STROKE_1)
    before = workbench.session.steps
    for kind, content, message in [
        ("video", b"no video", "walk.mp4: does not open as a video"),
        ("session", b"no session", "walk.mp4: not a session, or a damaged one"),
        ("video", b"0" * (2**20 + 1), "upload: expected at most 1 MiB"),
        ("masks", b"no mask", "walk.mp4: cannot be read as a picture"),
        ("pictures", b"", "upload: expected session, video, masks, got 'pictures'"),
    ]:
        answer = client.post(f"/stm/upload/{kind}?name=walk.mp4", content=content)
        assert answer.status_code == 400 and answer.json()["error"].startswith(message), answer.text
    assert workbench.session.steps == before
    assert not list(workbench.saved_session().parent.glob("upload-*"))


def test_another_tab_is_refused_over_the_wire(client, workbench):
    answer = client.post("/stm/do/scribble", json=STROKE_1, headers={"x-stm-tab": "two"})
    assert answer.status_code == 409 and "open in another tab" in answer.json()["error"]
    assert client.post("/stm/upload/session?name=a", content=b"", headers={"x-stm-tab": "two"}).status_code == 409
    assert workbench.session.steps == (("opened",), 0)


@pytest.mark.parametrize(
    "address",
    [
        "/stm/file/..%2f..%2fetc%2fpasswd",
        "/stm/file/%2fetc%2fpasswd",
        "/page/..%2fapp.py",
        "/page/../app.py",
        "/page/%2fetc%2fpasswd",
        "/page/page.css/..",
        "/page/__init__.py",
        "/../app.py",
        "/docs",
        "/openapi.json",
    ],
)
def test_no_other_file_is_read(client, address):
    answer = client.get(address)
    assert answer.status_code in (403, 404) and b"root:" not in answer.content and b"import" not in answer.content


def test_other_sites_are_kept_out(client, workbench):
    client.post("/stm/do/scribble", json=STROKE_1)
    # a page elsewhere can send a form, not a header of its own, and cannot ask under this host's name
    answer = client.post("/stm/do/undo", headers={"x-stm-tab": ""})
    assert answer.status_code == 400 and answer.json()["error"] == "expected the header x-stm-tab"
    assert workbench.session.steps[1] == 1
    assert client.get("/stm/frame/0", headers={"host": "evil.example"}).status_code == 400
    assert (
        "access-control-allow-origin" not in client.get("/stm/frame/0", headers={"origin": "http://e.example"}).headers
    )


def test_the_page_is_files_of_the_right_types(client):
    found, scripts = {}, [f"/page/{name}.js" for name in ("page", "server", "stage", "timeline")]
    for address, kind in [
        ("/", "text/html"),
        ("/page/page.css", "text/css"),
        *((name, "text/javascript") for name in scripts),
    ]:
        answer = client.get(address)
        assert answer.status_code == 200 and answer.headers["content-type"] == f"{kind}; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache"
        found[address] = answer.text
        # it asks nothing of other hosts
        assert "//" not in re.sub(r"(?m)^ *// .*$", "", answer.text)
    linked = re.findall(r'(?:href|src)="(/[^"]+)"', found["/"])
    assert sorted(linked) == ["/page/page.css", "/page/page.js", "/stm/file/session.stm"]


def test_the_page_offers_every_format(client):
    offered = re.findall(r'type="checkbox" value="([^"]+)"', client.get("/").text)
    assert sorted(offered) == sorted([*FORMATS, OVERLAY])


@pytest.mark.parametrize(
    "given, safe",
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\videos\\my dog.mp4", "my_dog.mp4"),
        ("..", "video"),
        ("a" * 300, "a" * 80),
        ("naïve\n<b>.mp4", "na_ve_b_.mp4"),
    ],
)
def test_names_are_made_harmless(given, safe):
    assert safe_name(given) == safe
