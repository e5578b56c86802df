"""The examples: old = new, forward and backward, by few changed lines, and each runs alone."""

import importlib
import os
import runpy
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from stm_kernels import memory_read

ROOT = Path(__file__).parents[1]
MOST_CHANGED_LINES = 15
NAMES = sorted(file.stem for file in (ROOT / "examples").glob("*.py") if file.stem != "compare")


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    """Import an example as it imports its neighbour: from its own folder."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    yield importlib.import_module
    for name in (*NAMES, "compare"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", NAMES)
def test_few_lines_change(examples, name):
    example = examples(name)
    count = examples("compare").changed_lines(example.Before, example.After)
    assert 1 < count <= MOST_CHANGED_LINES
    (row,) = [line for line in (ROOT / "docs/read.md").read_text().splitlines() if line.startswith(f"| `{name}.py` |")]
    assert row.endswith(f"| {count} |")


def test_a_changed_line_is_counted_once_and_the_import_too(examples):
    from released_stm import After, Before

    compare = examples("compare")
    assert compare.changed_lines(Before, Before) == 1
    assert compare.changed_lines(Before, After) == 2


@pytest.mark.parametrize(
    ("name", "arguments"), [("released_stm", ()), ("stcn", ()), ("xmem", ()), ("sam2", (1,)), ("sam2", (4,))]
)
def test_old_equals_new(examples, name, arguments):
    example = examples(name)
    found = examples("compare").compare(example.Before(*arguments), example.After(*arguments), example.inputs)
    assert sum(result.startswith("gradient of ") for result in found) >= len(example.inputs(0))
    wrong = {result: share for result, (_, share) in found.items() if not share <= 1}
    assert not wrong


@pytest.mark.parametrize("wrong", [{"scale": 1 / 17}, {"top_k": 100}])
def test_another_read_is_noticed(examples, wrong):
    from sam2 import After, Before, inputs

    class Wrong(After):
        def read(self, query, key, value):
            read = memory_read(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), **wrong)
            return read.unflatten(0, query.shape[:2])

    found = examples("compare").compare(Before(), Wrong(), inputs)
    assert max(share for _, share in found.values()) > 1


@pytest.fixture
def alone(tmp_path):
    """The only process of a group."""
    rendezvous = f"file://{tmp_path}/group"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")
def test_a_training_loop_takes_the_same_steps(examples, alone):
    from training_loop import STEPS, After, Before, train

    from stm_kernels.testing import allowed_error_shares

    torch.compiler.reset()
    options = {"autocast": True, "compiled_by": "aot_eager"}
    (_, truth), (_, plain) = (train(Before, steps=1, autocast=autocast, compiled_by=None) for autocast in (False, True))
    losses, found = train(After, **options)
    assert max(allowed_error_shares(truth, plain, found).values()) <= 1
    before, _ = train(Before, **options)
    assert len(losses) == STEPS
    # the loss is near ln 2: five steps of bfloat16's rounding of it
    assert max(abs(new - old) for new, old in zip(losses, before)) < STEPS * torch.finfo(torch.bfloat16).eps


def _train_on(rank, ranks, folder):
    from training_loop import After, train

    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/of {ranks}"
    torch.distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    torch.save(train(After, autocast=False, compiled_by=None), f"{folder}/{rank} of {ranks}.pt")
    # no goodbye: a rank that died would be waited for
    os._exit(0)


def test_two_processes_take_the_steps_of_one(examples, tmp_path):
    examples("training_loop")
    for ranks in (1, 2):
        torch.multiprocessing.start_processes(_train_on, (ranks, tmp_path), ranks, start_method="fork")
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("0 of 1", "0 of 2", "1 of 2"))
    for losses, grads in two:
        torch.testing.assert_close((losses, grads), one)


def test_an_exported_step_reads_memories_of_any_length(examples):
    from export_frame import After, Before, export, inputs

    from stm_model import STM

    before, after = (
        step(STM.load(device="cpu", dtype=torch.float32)).requires_grad_(False) for step in (Before, After)
    )
    program = export(after)
    assert "stm_kernels.memory_read.default" in program.graph_module.code
    for frames in (1, 7):
        truth, plain = (before.to(dtype)(**_in(dtype, inputs(1, frames))) for dtype in (torch.float64, torch.float32))
        found = program.module()(**inputs(1, frames))
        shares = examples("compare").allowed_error_shares(*(dict(enumerate(part)) for part in (truth, plain, found)))
        assert max(shares.values()) <= 1


def _in(dtype, tensors):
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def test_an_example_runs_by_its_command():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "examples/stcn.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("changed lines: 9\n") and "gradient of query_key" in done.stdout


# the training loop compiles for the machine, which takes as long as all other tests here
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("stcn", "training_loop")])
def test_an_example_says_how_it_compares(examples, name, capsys):
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "changed lines: " in said and "max |new - old|" in said


@pytest.mark.parametrize("name", NAMES)
def test_the_command_in_its_first_lines_is_its_own(name):
    assert f"\npython examples/{name}.py" in (ROOT / "examples" / f"{name}.py").read_text().split('"""')[1]
