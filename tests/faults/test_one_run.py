"""One run at a time writes to a folder."""

import json
import os
import platform

import pytest
from answers import refused
from table import files

from stm_model import Tracker
from stm_model.commands.main import main
from stm_model.io.files import LOCK, locked

WRITES_THERE = f"another run writes there (process {os.getpid()} on {platform.node()} since 2"


def meanwhile(monkeypatch, work):
    """Do something while a run asks for its fourth frame."""
    original = Tracker.track

    def tracking(self, frames, *rest, **options):
        def interrupted():
            for index, frame in enumerate(frames):
                if index == 3:
                    monkeypatch.setattr(Tracker, "track", original)
                    work()
                yield frame

        return original(self, interrupted(), *rest, **options)

    monkeypatch.setattr(Tracker, "track", tracking)


def test_a_second_run_in_a_folder_is_refused(track, clip, out, monkeypatch, capsys):
    assert track("--memory", "first")[0] == 0
    expected = files(out / "masks")

    def second():
        capsys.readouterr()
        for option in ("--overwrite", "--resume"):
            assert refused(track(option, mask=clip / "true"), f"--out {out}: {WRITES_THERE}", "choose another folder")

    meanwhile(monkeypatch, second)
    assert track("--memory", "first", "--overwrite")[0] == 0
    assert files(out / "masks") == expected and not (out / LOCK).exists()


def test_a_list_and_a_single_run_keep_off_each_others_videos(track, clip, out, weights, tmp_path, monkeypatch, capsys):
    (tmp_path / "list.txt").write_text(f"{clip}/clip.mp4 {clip}/mask.png ant\n{clip}/frames {clip}/mask.png bee\n")
    arguments = ["--out", out, "--checkpoint", weights, "--device", "cpu", "--no-overlay"]
    command = ["track", *map(str, [tmp_path / "list.txt", *arguments])]
    answers = []

    def second():
        capsys.readouterr()
        answers.append((main(command), *capsys.readouterr()))

    meanwhile(monkeypatch, second)
    assert main(command) == 0 and refused(answers[0], f"--out {out}: {WRITES_THERE}")
    summary = json.loads((out / "summary.json").read_text())
    assert [record["state"] for record in summary["videos"].values()] == ["done", "done"]

    meanwhile(monkeypatch, second)
    assert track("--overwrite", out=out / "ant")[0] == 0
    code, _, err = answers[1]
    assert code == 2 and f"ant: --out {out / 'ant'}: {WRITES_THERE}" in err and "bee" not in err


@pytest.mark.parametrize("dataset", ["davis2017", "davis-interactive"])
def test_an_evaluation_keeps_off_a_folder_in_use(davis, out, dataset, capsys):
    with locked(out):
        code = main(["evaluate", "--dataset", dataset, "--data", str(davis), "--out", str(out), "--overwrite"])
        assert refused((code, *capsys.readouterr()), f"--out {out}: {WRITES_THERE}")
        assert [file.name for file in out.iterdir()] == [LOCK]
    assert not out.exists()


def test_the_lock_of_a_run_that_was_killed_keeps_nobody_out(track, out):
    out.mkdir()
    (out / LOCK).write_text("process 1 on another since 2026-01-01 00:00:00")
    assert track()[0] == 0
    assert not (out / LOCK).exists() and len(files(out / "masks")) == 10


def test_what_is_refused_leaves_no_folder_behind(track, out, tmp_path):
    assert refused(track("--memory", "sometimes", out=out / "of" / "mine"), "sometimes")
    assert not out.exists()
