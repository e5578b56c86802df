"""The other commands, and what all have in common."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import tyro
from answers import refused

from stm_model.commands.main import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trakc"], "unknown command 'trakc'; expected demo, track, train, evaluate, interact, convert, info"),
        (["track"], "PATH --out PATH (see stm track --help)"),
        (["track", "v", "--mask", "m", "--out", "o", "--size", "big"], "--size"),
        (["track", "v", "--mask", "m", "--out", "o", "--dtype", "int4"], "invalid choice 'int4'"),
        (["track", "v", "--mask", "m", "--out", "o", "--colour", "red"], "--colour"),
        (["demo", "--frames", "2"], "--frames: expected at least 3, got 2"),
        (["demo", "--objects", "0"], "--objects: expected 1 to 20, got 0"),
    ],
)
@pytest.mark.parametrize("drawn", [False, True])
def test_wrong_arguments_are_one_line(capsys, monkeypatch, arguments, words, drawn):
    monkeypatch.setattr(tyro._fmtlib, "_FORCE_UTF8_BOXES", drawn)  # tyro frames its complaints, or does not
    assert refused((main(arguments), *capsys.readouterr()), words)


def test_help_comes_without_importing_anything_heavy(capsys):
    assert main([]) == main(["--help"]) == 0
    assert "track    track the objects" in capsys.readouterr().out
    assert main(["track", "--help"]) == 0
    assert "--resize-mask" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("stm-kernels 0.")
    code = "import sys, stm_model.commands.main as cli; cli.main(['track', '--help']); print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
    assert "--resize-mask" in done.stdout and not {"torch", "av", "numpy"} & set(done.stdout.split())


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--version"], ["track", "--help"]])
def test_output_that_nobody_reads_to_its_end_is_no_error(arguments, unbuffered):
    """What is short is written when the command ends, the rest before."""
    left, written = os.pipe()
    os.close(left)
    done = subprocess.run(
        [sys.executable, "-m", "stm_model", *arguments],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        stdout=written,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(written)
    assert (done.returncode, done.stderr) == (141, "")


def test_info_says_what_would_run(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["devices"]["cpu"]["implementation"] == "chunked"
    assert facts["devices"]["cpu"]["dtype"] in ("bfloat16", "float32")
    assert main(["info"]) == 0
    assert f"torch        {torch.__version__}" in capsys.readouterr().out


def test_info_finds_triton_whatever_its_distribution_is_called(capsys, monkeypatch):
    """It is triton-windows on Windows, pytorch-triton-rocm beside some builds of PyTorch."""
    triton = pytest.importorskip("triton")

    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["triton"] == triton.__version__
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["triton"] is None


def test_demo_scores_itself_and_overwrites_only_itself(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("stm_model.network.stm.DEFAULT_WEIGHTS", weights)
    out = tmp_path / "stm-demo"
    for _ in range(2):
        assert main(["demo", "--out", str(out), "--frames", "4", "--device", "cpu", "--json"]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert 0 <= summary["scores"]["J&F"] <= 1 and summary["frames"] == 4
    made = ["clip.mp4", "contact_sheet.png", "mask.png", "masks", "overlay.mp4", "summary.json"]
    assert sorted(file.name for file in out.iterdir()) == made
    assert main(["demo", "--out", str(out), "--frames", "4", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "J&F" in shown
    # the command that it prints gives the same masks
    stm, *command = shlex.split(shown.splitlines()[-1].partition("the same by   ")[2])
    assert stm == "stm" and main([*command, "--checkpoint", str(weights), "--device", "cpu"]) == 0
    for file in (out / "masks").iterdir():
        assert file.read_bytes() == (tmp_path / "stm-demo-again" / "masks" / file.name).read_bytes()
    capsys.readouterr()
    (out / "summary.json").write_text('{"command": "track"}')
    result = main(["demo", "--out", str(out)])
    assert refused((result, *capsys.readouterr()), "holds something other than an earlier demo", "--out")


def test_train_hands_its_settings_on(monkeypatch, tmp_path, capsys):
    import stm_model.training.train as training

    seen = []
    monkeypatch.setattr(training, "train", lambda config: seen.append(config) or tmp_path / "weights.safetensors")
    assert main(["train", "--out", str(tmp_path), "--steps", "3"]) == 0
    assert (seen[0].out, seen[0].steps) == (tmp_path, 3)
    assert "weights.safetensors" in capsys.readouterr().out
    data = ["--data", "one", "two", "--weights", "3", "1"]
    assert main(["train", "--preset", "paper", "--out", str(tmp_path), *data]) == 0
    assert (seen[1].crop, seen[1].data, seen[1].weights) == (384, (Path("one"), Path("two")), (3.0, 1.0))
    assert main(["train", "--out", str(tmp_path), "--preset=smoke", "--crop", "64"]) == 0
    assert (seen[2].distinct, seen[2].crop) == (1, 64)
    capsys.readouterr()
    for wrong, words in (
        (["--preset", "big"], "invalid choice 'big' for argument '--preset'"),
        (["--preset"], "'--preset'"),
    ):
        result = main(["train", "--out", str(tmp_path), *wrong])
        assert refused((result, *capsys.readouterr()), words)


@pytest.mark.parametrize(
    "command", ["demo", "track", "train", "evaluate", "evaluate --dataset davis-interactive", "interact"]
)
def test_help_describes_options_in_whole_lines(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "100")
    assert main([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert "None}" not in shown and "(default: None)" not in shown and "(default: False)" not in shown
    lines = [line.strip("│ \n") for line in shown.splitlines()]
    wide = 100 - len("│ │") - len("│")
    for before, line in zip(lines, lines[1:]):
        # a line ends where the next word has no room, or where its paragraph does
        if before and line and before[-1].isalpha() and line[0].islower() and not before.startswith("-"):
            indent = next(len(text) - len(text.lstrip("│ ")) for text in shown.splitlines() if before in text)
            assert indent + len(before) + len(line.split()[0]) >= wide - 4, (before, line)


def test_help_of_track_fits_two_screens(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["track", "--help"]) == 0
    assert len(capsys.readouterr().out.splitlines()) <= 2 * 50


def test_help_says_what_is_switched_off_and_what_there_is(capsys):
    assert main(["track", "--help"]) == 0
    assert re.search(r"--no-overlay\s+Don't write overlay.mp4, the video", capsys.readouterr().out)
    assert main(["evaluate", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "davis-interactive}" in shown and re.search(r"--no-report\s+Don't write report.html", shown)
    assert main(["train", "--help"]) == 0
    assert "Presets: small, shared, lite, paper, interactive, smoke." in capsys.readouterr().out


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(given):
    program = "import os, sys, stm_model.commands.main as m; sys.argv[1:] = ['info', '--json']; m.run()"
    told = f"import atexit, os; atexit.register(lambda: print(os.environ['OMP_WAIT_POLICY'])); {program}"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    ran = subprocess.run([sys.executable, "-c", told], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == (given or "PASSIVE")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other rules")
def test_what_a_frame_frees_is_kept_for_the_next():
    """Else the system fills fresh pages with zeros for every frame: 4096 of them for 16 MiB."""
    program = """
import resource, numpy as np
from stm_model.runtime import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (16, 24, 20, 16):
        np.ones(size * 2**20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
keep_freed_memory()
print(faults(), faults())
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, second = map(int, ran.stdout.split())
    assert second < 100 < first
