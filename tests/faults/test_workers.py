"""A signal to every process of a command, as a terminal, `timeout` and a scheduler send it; a parent that is killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from answers import STM

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the workers in /proc")

POOL = """
import signal, sys, time
from stm_model.commands.exits import interrupted, signals_interrupt
from stm_model.processes import worker_pool

if __name__ == "__main__":
    # what started the tests may ignore them
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with signals_interrupt():
        try:
            with worker_pool(2) as pool:
                print("started", flush=True)
                list(pool.map(time.sleep, [0.1] * 4 + [600] * 2))
        except KeyboardInterrupt:
            sys.exit(interrupted())
"""
"""Two workers, and a parent that waits for them as an evaluation does."""


def workers(parent: int) -> list[int]:
    """The processes that a process started, but for the one in which Python notes what is to be removed."""
    found = map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return [child for child in found if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait(done, what: str) -> None:
    """Until `done()` is true."""
    for _ in range(300):
        if done():
            return
        time.sleep(0.1)
    raise AssertionError(what)


def alive(process: int) -> bool:
    """Whether it has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture(params=["train", "pool"])
def command(request, tmp_path):
    """A command that has workers, and these; their names in the error's line."""
    if request.param == "train":
        arguments = ["--preset", "smoke", "--workers", "2", "--steps", "10000", "--device", "cpu", "--dtype", "float32"]
        called, said = [*STM, "train", *arguments, "--out", str(tmp_path / "run")], "the same command goes on"
    else:
        (tmp_path / "pool.py").write_text(POOL)
        called, said = [sys.executable, str(tmp_path / "pool.py")], "interrupted"
    process = subprocess.Popen(
        called,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait(lambda: process.poll() is not None or len(workers(process.pid)) == 2, "no workers")
        assert process.poll() is None, process.communicate()[1]
        yield process, workers(process.pid), said
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_workers_leave_a_signal_to_their_parent(command, name, code):
    process, found, said = command
    # the parent last: what their end would make of it is seen
    for worker in found:
        os.kill(worker, getattr(signal, name))
    time.sleep(1)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err, err
    assert err.splitlines()[-1].startswith("stm: error: ") and said in err.splitlines()[-1]
    assert not any(map(alive, found))


def test_a_worker_that_is_killed_ends_the_others_and_the_command(command):
    process, found, _ = command
    os.kill(found[0], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode not in (0, None) and not any(map(alive, found))


def test_workers_end_with_a_parent_that_is_killed(command):
    process, found, _ = command
    process.kill()
    process.wait()
    wait(lambda: not any(map(alive, found)), "a worker stays")
