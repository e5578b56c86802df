"""The kernels with the tiles a GPU takes, in Triton's interpreter: what the first run on that GPU would find."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from stm_kernels.gpu import backward, forward, top_k, tuning, usage
from stm_kernels.gpu import merge as merging
from stm_kernels.testing import allowed_error_shares, make_problem, read_by, results

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels run for real")

FORMS = {
    "plain": {},
    "a bias": {"similarity": "l2"},
    "hidden positions": {"biased": True, "ragged": True},
    "channel-major": {"channel_major": True},
    "channel-major, a bias": {"channel_major": True, "similarity": "l2"},
}
# of half precision all, of float32 what has tiles of its own
CASES = [
    *((torch.float16, form) for form in FORMS),
    *((torch.float32, form) for form in ("plain", "hidden positions", "channel-major")),
]


def product_in_order(builder, left, right, total, *_):
    """A product of tiles whose terms are added one after the other, as a GPU does it whatever the tile. A BLAS's order
    depends on the sizes, and float32 gradients on logits that are those of the forward pass to the last bit.
    """
    found = total.data.astype(np.float32)
    for a, b in zip(left.data.astype(np.float64).T, right.data.astype(np.float64)):
        # multiplied and added in one instruction, which rounds once
        found = (found + a[:, None] * b).astype(np.float32)
    return interpreter.TensorHandle(found, total.dtype.scalar)


@pytest.fixture(params=["sm_80", "sm_90"])
def architecture(request, monkeypatch):
    # the interpreter has no TMA
    monkeypatch.setattr(forward, "has_descriptors", lambda *tensors: False)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", product_in_order)
    return request.param


@contextmanager
def tiles_of(architecture):
    with ExitStack() as patches:
        for module in (forward, backward, top_k, usage, merging):
            patches.enter_context(mock.patch.object(module, "architecture_of", lambda device: architecture))
        yield


def assert_as_exact(architecture, problem, read):
    """With a GPU's tiles a read errs no more than the yardstick allows beside plain PyTorch, or in float32, which a
    BLAS adds up in a better order than a GPU's, beside the same read with the interpreter's tiles.
    """
    in_float32 = problem.query_key.dtype == torch.float32
    truth, other = results(problem.to(torch.float64)), results(problem, read if in_float32 else None)
    with tiles_of(architecture):
        found = results(problem, read)
    ratios = allowed_error_shares(truth, other, found)
    assert max(ratios.values()) <= 1, ratios


@pytest.mark.parametrize("dtype, form", CASES)
def test_reads_and_gradients_are_exact(architecture, dtype, form):
    problem = make_problem(2, 66, 130, 24, 272, dtype=dtype, peak=3.0, **FORMS[form])
    assert_as_exact(architecture, problem, read_by("triton"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channel_major", [False, True], ids=["token_major", "channel_major"])
def test_a_skip_that_drops_nothing_changes_nothing(architecture, dtype, channel_major):
    problem = make_problem(1, 66, 130, 24, 272, dtype=dtype, channel_major=channel_major)
    assert_as_exact(architecture, problem, read_by("triton", skip=1e-30))


def test_parts_are_merged(architecture, monkeypatch):
    monkeypatch.setattr(forward, "multiprocessors", lambda device: 64)
    problem = make_problem(1, 66, 700, 24, 272, dtype=torch.float16, biased=True)
    assert_as_exact(architecture, problem, read_by("triton"))


def test_the_best_positions_are_those_of_a_cpu(architecture):
    problem = make_problem(1, 40, 300, 40, 24, peak=3.0)
    truth = results(problem, read_by("chunked", top_k=5), gradients=False)
    with tiles_of(architecture):
        found = results(problem, read_by("triton", top_k=5), gradients=False)
    torch.testing.assert_close(found["out"], truth["out"])


@pytest.mark.parametrize("channel_major", [False, True])
def test_tiles_of_channel_major_inputs_are_their_own(architecture, channel_major):
    asked = []

    def forward_tiles(*arguments, **form):
        asked.append(form["channel_major"])
        return tuning.forward_tiles(*arguments, **form)

    problem = make_problem(1, 16, 20, 16, 16, channel_major=channel_major)
    with mock.patch.object(forward, "forward_tiles", forward_tiles):
        results(problem, read_by("triton"), gradients=False)
    assert asked == [channel_major]
