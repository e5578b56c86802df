"""How far a command is, in a log or a pipe and on a terminal."""

import io
import re
import sys

import pytest

from stm_model import progress
from stm_model.commands.main import main
from stm_model.progress import Progress, say

LINE = r"{}: \d+ of \d+ {}s in \d\d:\d\d, [\d:?]+ left.*"


class Clock:
    """Counts the seconds that it is told."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(progress, "SECONDS", 10.0)


def test_a_log_gets_a_line_every_ten_seconds(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with Progress(desc="track", unit="frame", total=100, mininterval=0) as bar:
        for second in range(35):
            clock.now = float(second)
            bar.set_postfix_str("clip", refresh=False)
            bar.update()
            if second == 15:
                say("stm: warning: dark")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" of 100")[0] for line in lines] == ["track: 11", "stm: warning: dark", "track: 21", "track: 31"]
    assert all(re.fullmatch(LINE.format("track", "frame"), line) for line in lines if ":" not in line[:4])
    assert lines[0].endswith(", clip")


def test_of_an_endless_input_no_time_left_is_made_up(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with Progress(desc="track", unit="frame", total=None, mininterval=0) as bar:
        for second in range(13):
            clock.now = float(second)
            bar.update()
    assert re.fullmatch(r"track: 11 frames in \d\d:\d\d, +[\d.?]+(frame/s|s/frame)\n", capsys.readouterr().err)


def test_a_short_command_and_a_silent_one_say_nothing(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    for shown, seconds in ((True, 9.9), (False, 1000.0)):
        clock.now = 0.0
        for _ in Progress(range(5), desc="track", unit="frame", shown=shown, mininterval=0):
            clock.now = seconds
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(desc="track", unit="frame", total=4, mininterval=0) as bar:
        bar.delay = 0
        bar.update(2)
        say("stm: warning: dark")
    assert "track:  50%|" in terminal.getvalue() and "stm: warning: dark\n" in terminal.getvalue()


@pytest.mark.parametrize("command", ["track", "evaluate", "train"])
def test_commands_tell_alike(command, clip, davis, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    monkeypatch.setattr(progress.tqdm, "monitor_interval", 0)
    small = ["--checkpoint", str(weights), "--device", "cpu"]
    arguments, unit = {
        "track": ([str(clip / "clip.mp4"), "--mask", str(clip / "mask.png"), *small], "frame"),
        "evaluate": (["--data", str(davis), *small, "--no-report", "--workers", "1"], "frame"),
        "train": (["--preset", "smoke", "--steps", "3", "--crop", "32", "--workers", "0", "--device", "cpu"], "step"),
    }[command]
    assert main([command, *arguments, "--out", str(tmp_path / "out")]) == 0
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith(command.replace("evaluate", "track"))
    ]
    assert lines and all(re.fullmatch(LINE.format("(track|train)", unit), line) for line in lines)
