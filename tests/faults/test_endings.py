"""How commands end: by a signal, by what the machine lacks, by an address that is no good; one line, no traceback."""

import errno
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import av
import numpy as np
import pytest
from answers import STM, refused

from stm_model.commands import exits
from stm_model.commands import main as commands
from stm_model.commands.main import main
from stm_model.io.video import VideoFile, VideoWriter
from stm_model.runtime import is_out_of_memory, one_line
from stm_model.tracking.folder import FolderRun

ROOT = Path(__file__).parents[2]
posix = pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")


@pytest.fixture
def command(monkeypatch):
    """Replaces `stm info` by a function."""

    def replace(work):
        monkeypatch.setitem(commands.COMMANDS, "info", (lambda _: work, ""))

    return replace


def _environment(**extra):
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"} | extra


@posix
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_what_fails_under_a_signal_is_an_interruption(command, capsys, name, code):
    """A worker that the same signal ended, or half an import, is no error of its own."""

    def work():
        try:
            os.kill(os.getpid(), getattr(signal, name))
        except KeyboardInterrupt:
            raise RuntimeError("DataLoader worker is killed by signal") from None

    command(work)
    # what started the tests may ignore it
    ours = signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        before = signal.getsignal(signal.SIGTERM)
        assert main(["info"]) == code
        assert capsys.readouterr().err == "stm: error: interrupted\n"
        assert signal.getsignal(signal.SIGTERM) == before
    finally:
        signal.signal(getattr(signal, name), ours)
    command(lambda: exits.interrupted())
    assert main(["info"]) == 130, "the signal of an earlier command is forgotten"


@posix
def test_a_signal_that_is_ignored_stays_ignored(command):
    """nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        command(lambda: os.kill(os.getpid(), signal.SIGHUP) or 0)
        assert main(["info"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@posix
def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    # stands for torch, whose import takes seconds
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = _environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    done = subprocess.run([*STM, "info"], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stm: error: interrupted\n")


@pytest.mark.parametrize("saved", [False, True])
def test_a_training_that_is_interrupted_says_where_it_goes_on(monkeypatch, tmp_path, capsys, saved):
    import stm_model.training.train as training

    def interrupt(config):
        if saved:
            (tmp_path / "checkpoint.pt").write_bytes(b"")
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupt)
    assert main(["train", "--out", str(tmp_path)]) == 130
    where = f"from the last checkpoint in {tmp_path}" if saved else "anew"
    assert capsys.readouterr().err == f"stm: error: interrupted; the same command goes on {where}\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "99999"], "--port: expected 0 to 65535, got 99999"),
        (["--port", "-1"], "--port: expected 0 to 65535, got -1"),
        (["--host", "no such host"], "--host no such host: no such address"),
        (["--host", "0.0.0.0"], "everyone who reaches this machine could see the video and draw on it; --yes"),
        (["--host", ""], "everyone who reaches this machine"),
        (["--host", "::"], "everyone who reaches this machine"),
    ],
)
def test_an_address_that_is_no_good_is_refused_at_once(capsys, options, words):
    # the video is not even looked for
    assert refused((main(["interact", "no such video", "--port", "0", *options]), *capsys.readouterr()), words)


def test_a_port_that_is_taken_is_refused_at_once(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        result = main(["interact", "no such video", "--port", port])
    assert refused((result, *capsys.readouterr()), f"--port {port}: ", "or 0 for a free one")


@posix
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_the_page_ends_by_a_signal_and_leaves_nothing(clip, tmp_path, name, code):
    """While it warms up, in a thread under which a process that just ends aborts."""
    pytest.importorskip("fastapi")
    (tmp_path / "temporary").mkdir()
    server = subprocess.Popen(
        [*STM, "interact", str(clip / "clip.mp4"), "--port", "0", "--device", "cpu"],
        env=_environment(TMPDIR=str(tmp_path / "temporary")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout.readline().startswith("open http://127.0.0.1:")
        server.send_signal(getattr(signal, name))
        _, err = server.communicate(timeout=60)
    finally:
        server.kill()
    assert (server.returncode, err) == (code, "stm: error: interrupted\n")
    # torch keeps a folder of its own there
    assert not list((tmp_path / "temporary").glob("stm-interact-*"))


@pytest.mark.parametrize("name", ["video", "--mask", "--out", "--checkpoint"])
def test_a_loop_of_links_is_refused(clip, tmp_path, capsys, name):
    (tmp_path / "loop").symlink_to("loop")
    paths = {"video": clip / "clip.mp4", "--mask": clip / "mask.png", "--out": tmp_path / "out"}
    paths |= {name: tmp_path / "loop"}
    options = [word for option, path in paths.items() for word in (option, str(path)) if word != "video"]
    assert refused((main(["track", *options]), *capsys.readouterr()), "loop")


@posix
@pytest.mark.parametrize("name", ["video", "mask"])
def test_a_pipe_is_refused_and_not_waited_for(track, tmp_path, name):
    os.mkfifo(tmp_path / "pipe.png")
    assert refused(track(**{name: tmp_path / "pipe.png"}), "pipe.png: is a pipe")


def test_a_colon_in_a_relative_path_names_no_protocol(clip, track, tmp_path, monkeypatch):
    shutil.copy(clip / "clip.mp4", tmp_path / "http:clip.mp4")
    monkeypatch.chdir(tmp_path)
    assert track(video="http:clip.mp4")[0] == 0
    # whose overlay takes its sound from there
    assert track("--export", "matte", video="http:clip.mp4", out=Path("http:out"), overlay=True)[0] == 0
    assert {"matte.mp4", "overlay.mp4"} <= {file.name for file in Path("http:out").iterdir()}


def test_a_device_without_values_is_refused(clip, tmp_path, capsys):
    arguments = [str(clip / "clip.mp4"), "--mask", str(clip / "mask.png"), "--out", str(tmp_path / "out")]
    result = main(["track", *arguments, "--device", "meta"])
    assert refused((result, *capsys.readouterr()), "device: meta cannot be used here")
    assert not (tmp_path / "out").exists()


def test_what_a_terminal_cannot_show_ends_nothing(command, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    command(lambda: print("864×480", "\udce9.mp4") or 0)
    assert main(["info"]) == 0
    stream.flush()
    assert stream.buffer.getvalue() == b"864\\xd7480 \\udce9.mp4\n"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), "clip.mp4"),
        RuntimeError("can't start new thread"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        MemoryError(),
    ],
)
def test_what_is_out_of_memory_says_so(command, capsys, error):
    """`ulimit -v`."""

    def work():
        raise error

    assert is_out_of_memory(error) and one_line(error).startswith("out of memory (")
    command(work)
    assert refused((main(["info"]), *capsys.readouterr()), "out of memory (")


def test_a_thread_that_cannot_be_started_is_no_damaged_video(clip, track, monkeypatch):
    """A decoder starts threads, for whose stacks `ulimit -v` may leave nothing."""
    error = BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def lacking(*_):
        raise error
        yield

    monkeypatch.setattr(av, "open", lambda *_: next(lacking()))
    assert refused(track(), "out of memory (")
    monkeypatch.undo()
    opened = VideoFile(clip / "clip.mp4")
    monkeypatch.setattr("stm_model.io.video.Clock", Mock())
    monkeypatch.setattr(
        opened,
        "_opened",
        lambda: nullcontext((SimpleNamespace(demux=lacking, format=SimpleNamespace(name="mp4")), Mock())),
    )
    with pytest.raises(MemoryError):
        next(iter(opened))


@posix
def test_a_disk_that_is_full_of_the_overlay_names_it(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    random = np.random.default_rng(0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OSError) as found, VideoWriter(tmp_path / "overlay.mp4") as writer:
            for _ in range(200):
                writer.write(random.integers(0, 255, (64, 96, 3), dtype=np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert one_line(found.value) == f"{tmp_path / 'overlay.mp4'}: File too large" and not list(tmp_path.iterdir())


def test_a_disk_that_is_full_at_the_end_keeps_the_masks(track, out, monkeypatch):
    write = FolderRun.write_summary

    def until_full(run):
        if run.summary["stopped"] is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out / "summary.json"))
        write(run)

    monkeypatch.setattr(FolderRun, "write_summary", until_full)
    code, _, err = track()
    said = f"{out / 'summary.json'}: No space left on device; the masks of 10 frames are kept in {out}\n"
    assert (code, err) == (2, f"stm: error: {said}")
    assert len(list((out / "masks").iterdir())) == 10


@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_is_told_that_the_command_loads(command, monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    command(lambda: 0)
    assert main(["info"]) == 0
    assert capsys.readouterr() == ("", "loading…\n" if terminal else "")
    assert main(["track", "--help"]) == 0
    assert capsys.readouterr().err == ""


def test_a_terminal_is_told_so_before_torch_is_imported(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    said = []

    def read(_):
        # the settings of a training are checked by what needs torch
        said.append(capsys.readouterr().err)
        return lambda: 0

    monkeypatch.setitem(commands.COMMANDS, "train", (read, ""))
    assert main(["train"]) == 0 and said == ["loading…\n"]
