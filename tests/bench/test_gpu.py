"""The bench for a GPU, run dry: what it writes, what it does not report, and what survives a process that dies."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import bench.gpu as gpu
from bench.gpu import FRAMES, MEMORIES, MOST_IMPORTANT, WAYS, Size, check, sizes
from bench.gpu_readers import READERS
from bench.harness import attempt, run_tasks, write_json
from bench.read import naive_read

ROOT = Path(__file__).parents[2]
SIZE = Size(33, 2, 1, 16, 32)

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are not interpreted")


def doubled(*inputs, scale):
    return 2 * naive_read(*inputs, scale=scale)


def right_only_forward(*inputs, scale):
    out = naive_read(*inputs, scale=scale)
    return out.detach() + 2 * (out - out.detach())


def missing(*inputs, scale):
    import no_such_package  # noqa: F401


def raising(*inputs, scale):
    raise RuntimeError("no kernel for this width\nand much more")


@pytest.fixture
def small(monkeypatch):
    """Few tasks, with readers among them that are wrong, absent and broken."""
    every_check, every_choice = gpu.checks_of, gpu.choices
    readers = {"ours": READERS["ours"], "naive": naive_read, "doubled": doubled, "half right": right_only_forward}
    readers |= {"missing": missing, "raising": raising}

    def cells(device, measured, ways=WAYS, names=readers):
        return {
            f"{way}, {SIZE}, {reader}": functools.partial(gpu.cell, SIZE, way, reader, device)
            for way in ways
            for reader in names
        }

    kept = (f"forward, {SIZE}, peaked, exact", f"paged read, {SIZE}")
    monkeypatch.setattr(gpu, "READERS", readers)
    monkeypatch.setattr(gpu, "sizes", lambda *_: [SIZE])
    monkeypatch.setattr(gpu, "cells", cells)
    monkeypatch.setattr(gpu, "tile_cells", lambda *_: {})
    monkeypatch.setattr(gpu, "dtypes_of", lambda _: [torch.float16])
    monkeypatch.setattr(
        gpu, "checks_of", lambda *options: dict(list(every_check(*options).items())[:2]) | {"broken": raising_check}
    )
    monkeypatch.setattr(gpu, "choices", lambda *options: {name: every_choice(*options)[name] for name in kept})


def raising_check():
    raise TypeError("no such check")


@without_gpu
def test_a_dry_run_writes_figures_and_no_speed_for_what_is_wrong(small, tmp_path, capsys):
    path = tmp_path / "deep" / "gpu.json"
    assert gpu.main(["--device", "cpu", "--workers", "0", "--out", str(path)]) == 0
    report = json.loads(path.read_text())
    assert [file.name for file in path.parent.iterdir()] == ["gpu.json"]
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert bool(report["machine"]["revision"]) == (ROOT / ".git").exists()
    broken = report["checks"].pop("torch.float16: broken")
    assert len(report["checks"]) == 2 and all(result["error_over_allowed"] <= 1 for result in report["checks"].values())
    assert broken["failed"] == "TypeError: no such check"
    reads = {name.split(f"{SIZE}, ")[1] + name.split(",")[0]: cell for name, cell in report["reads"].items()}
    for way in WAYS:
        for reader in ("ours", "naive"):
            cell = reads[reader + way]
            assert cell["error_over_allowed"] <= 1 and cell["repeats"] >= 2 and cell["extra_bytes"] > 0
            assert cell["quartiles"][0] <= cell["seconds"] <= cell["quartiles"][1]
            assert cell["tflops"] == pytest.approx(SIZE.flops(way) / cell["seconds"] / 1e12)
            ceiling = report["ceilings"]["matmul torch.float16"]["tflops"]
            assert cell["share_of_matmul"] == pytest.approx(cell["tflops"] / ceiling)
        assert "error over allowed error: {'out'" in reads["doubled" + way]["failed"]
        assert reads["missing" + way]["skipped"] == "not installed: No module named 'no_such_package'"
        assert reads["raising" + way]["failed"] == "RuntimeError: no kernel for this width"
    assert "seconds" in reads["half rightforward"]
    assert "grad_memory_value" in reads["half rightforward + backward"]["failed"]
    for cell in report["reads"].values():
        assert ("seconds" in cell) == ("tflops" in cell) == (not {"failed", "skipped"} & set(cell))
    assert len(report["choices"]) == 2 and all(cell["error_over_allowed"] <= 1 for cell in report["choices"].values())
    said = capsys.readouterr().out
    assert "checks: 2 right, 1 wrong, 0 not run\n  wrong: torch.float16: broken" in said


@without_gpu
def test_every_check_and_every_measurement_has_its_place():
    sections = gpu.build_tasks(gpu.parse(["--device", "cpu", "--out", "x"]))
    assert list(sections) == ["checks", "ceilings", "reads", "choices", "more reads"]
    names = [name for tasks in sections.values() for name in tasks]
    assert len(names) == len(set(names))
    for word in ("skip", "top-k", "usage", "paged", "3 splits", "tile 1", "backward tile 1"):
        assert any(word in name for name in sections["checks"]), word


@without_gpu
def test_only_what_was_asked_for_is_done(capsys):
    sections = gpu.build_tasks(gpu.parse(["--device", "cpu", "--out", "x", "--only", "M=33 T=3 B=2, naive"]))
    assert {section: len(tasks) for section, tasks in sections.items() if tasks} == {"ceilings": 3, "reads": 2}
    assert gpu.main(["--device", "cpu", "--sanitize", "--only", "float32: odd sizes"]) == 0
    assert "checks: 1 right, 0 wrong, 0 not run" in capsys.readouterr().out


@without_gpu
def test_sanitizing_ends_with_an_error_where_a_kernel_is_wrong(monkeypatch):
    monkeypatch.setattr(gpu, "checks_of", lambda *_: {"broken": raising_check})
    assert gpu.main(["--device", "cpu", "--sanitize"]) == 1


@without_gpu
def test_a_wrong_kernel_is_seen_by_its_check(monkeypatch):
    import stm_kernels.gpu.forward as forward

    judge = functools.partial(check, "cpu", torch.float32, True)
    assert "error_over_allowed" in attempt(functools.partial(judge, "odd sizes"))
    merge = forward.triton_merge
    monkeypatch.setattr(forward, "triton_merge", lambda outs, lses, dtype: merge(outs, lses + 1e-3, dtype))
    assert "error over allowed" in attempt(functools.partial(judge, "3 splits"))["failed"]


def starved():
    raise torch.OutOfMemoryError("tried to allocate\nmuch")


def die():
    os._exit(7)


def break_the_device():
    """Make everything fail on the device that this process sees, from now on."""

    def synchronize():
        raise RuntimeError("an illegal access long ago")

    torch.cuda.is_available, torch.cuda.synchronize = lambda: True, synchronize
    return {"value": "breaks"}


TASKS = {name: functools.partial(dict, value=name) for name in ("first", "last")}
TASKS |= {"breaks": break_the_device, "starved": starved, "dies": die, "hangs": functools.partial(time.sleep, 600)}


@pytest.mark.parametrize("processes", [0, 1])
def test_out_of_time_and_out_of_memory_are_said(processes):
    told = {}
    run_tasks({"starved": starved}, told.__setitem__, processes=processes)
    run_tasks({"first": TASKS["first"]}, told.__setitem__, processes=processes, deadline=time.time() - 1)
    assert told == {"starved": {"skipped": "out of memory: tried to allocate"}, "first": {"skipped": "out of time"}}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_that_dies_or_hangs_takes_only_its_task_along(processes):
    told = {}
    names = ["first", "dies", "breaks", "hangs", "last"]
    run_tasks({name: TASKS[name] for name in names}, told.__setitem__, processes=processes, limit=8.0)
    assert sorted(told) == sorted(names) and all(told[name] == {"value": name} for name in ("first", "last"))
    # nothing works in its process any more; the tasks behind it are none the worse
    assert told["breaks"]["failed"] == "left a broken device behind: an illegal access long ago"
    assert told["dies"] == {"failed": "its process ended"}
    assert told["hangs"] == {"failed": "stopped after 8 s"}
    # told as it comes
    assert processes == 1 or list(told)[-1] == "hangs"


def test_nothing_runs_on_after_the_end():
    told = {}
    end = time.time() + 2
    run_tasks({name: TASKS[name] for name in ("hangs", "last")}, told.__setitem__, deadline=end, end=end)
    assert told == {"hangs": {"skipped": "out of time"}, "last": {"skipped": "out of time"}}
    assert time.time() < end + 60


@without_gpu
def test_the_first_minute_asks_for_every_kernel_and_then_times():
    sections = gpu.build_tasks(gpu.parse(["--first-minute", "--device", "cpu", "--out", "x"]))
    assert list(sections) == ["checks", "reads"] and len(sections["reads"]) == 2
    names = list(sections["checks"])
    # what is timed is compiled beside the checks, so it begins first
    assert [name.startswith("compile") for name in names] == [True] * 2 + [False] * (len(names) - 2)
    for dtype in ("float16", "float32"):
        for kind in ("read and backward", "squared distance", "top-k", "skip", "usage"):
            assert len({name for name in names if name.startswith(f"torch.{dtype}: {kind}, ")}) == 2
    assert sections["checks"]["torch.float32: usage, B=1 M=33 N=70 C=16 V=32"]()["error_over_allowed"] <= 1


@without_gpu
def test_the_first_minute_writes_what_it_had_time_for(small, monkeypatch, tmp_path):
    written, write = [], gpu.write_json
    monkeypatch.setattr(
        gpu, "write_json", lambda report, path: (written.append(len(report["checks"])), write(report, path))
    )
    for checks in ("first_checks", "checks_of"):
        monkeypatch.setattr(gpu, checks, lambda *_: {"right": lambda: {"out": 0.5}, "broken": raising_check})
    path = tmp_path / "first.json"
    words = ["--first-minute", "--device", "cpu", "--workers", "0", "--out", str(path)]
    assert gpu.main(words) == 0
    report = json.loads(path.read_text())
    assert report["checks"]["torch.float16: right"] == {"error_over_allowed": 0.5}
    assert report["checks"]["torch.float16: broken"] == {"failed": "TypeError: no such check"}
    assert report["reads"][f"forward, {SIZE}, ours"]["seconds"] > 0
    # after every step
    assert written[:4] == [0, 1, 2, 3]
    assert gpu.main([*words, "--minutes", "0"]) == 0
    report = json.loads(path.read_text())
    assert all(found == {"skipped": "out of time"} for found in (report["checks"] | report["reads"]).values())


@without_gpu
def test_no_gpu_is_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        gpu.main(["--first-minute"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "--device: expected a GPU, torch sees none; --device cpu is a dry run\n"


@without_gpu
def test_a_killed_run_leaves_what_it_had(tmp_path):
    path = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--device", "cpu", "--quick", "--out", str(path)]
    run = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while run.poll() is None and not (path.exists() and json.loads(path.read_text())["checks"]):
            time.sleep(0.2)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    report = json.loads(path.read_text())
    assert report["checks"] and report["reads"] == {}


def test_a_write_that_fails_leaves_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    write_json({"a": 1}, path)
    with pytest.raises(TypeError):
        write_json({"a": object()}, path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json({"a": 2}, path)
    assert json.loads(path.read_text()) == {"a": 1}


def test_sizes_are_those_of_real_frames_and_the_important_ones_come_first():
    every = sizes("cuda", False)
    assert tuple(every[:3]) == MOST_IMPORTANT == tuple(sizes("cuda", True))
    assert {(size.M, size.T, size.B) for size in every} == {(M, T, B) for M in FRAMES for T in MEMORIES for B in (1, 2)}
    size = Size(1620, 20)
    assert size.flops("forward") == 1280 * 1620 * 32400
    assert size.flops("forward + backward") == (1280 + 2 * 1408) * 1620 * 32400


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--device", "cpu"], "--out: expected a file"), (["--device", "tpu"], "invalid choice")],
)
def test_wrong_options_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        gpu.main(words)
    assert end.value.code == 2 and message in capsys.readouterr().err
