"""The read of the k best positions: its choice, its weights, its gradients, whatever selects."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stm_kernels.topk as topk
from stm_kernels import memory_read, memory_usage
from stm_kernels.affinity import Affinity
from stm_kernels.operator import backward_operator, read_operator
from stm_kernels.testing import assert_exact, extra_memory, make_problem, make_tie_problem, read_by, results

CHUNKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton's interpreter multiplies bfloat16 wrongly: there it is tested on a GPU only
TRITON_DTYPES = CHUNKED_DTYPES if torch.cuda.is_available() else (torch.float32, torch.float16)
CASES = [("chunked", dtype) for dtype in CHUNKED_DTYPES] + [("triton", dtype) for dtype in TRITON_DTYPES]
each_case = pytest.mark.parametrize("implementation, dtype", CASES, ids=lambda value: str(value).removeprefix("torch."))
each_implementation = pytest.mark.parametrize("implementation", ["chunked", "triton"])
quick = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(topk, "QUERIES_PER_BLOCK", 16)
    monkeypatch.setattr(topk, "KEYS_PER_CHUNK", 48)
    monkeypatch.setattr(topk, "GATHERED", 2**10)
    monkeypatch.setattr(topk, "COPIED", 2**11)


def device_of(implementation: str) -> str:
    return "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"


def whole_numbered(problem, top_k):
    """The problem with keys in -2…2: many logits are equal, and all are exact in every dtype."""
    keys = {name: getattr(problem, name).clamp(-2, 2).round() for name in ("query_key", "memory_key")}
    return replace(problem, **keys, scale=0.5, top_k=top_k)


def separated(problem, top_k, least=1e-2):
    """The problem, whose choice is certain in half precision too: the k-th and the next logit differ."""
    problem = replace(problem, top_k=top_k)
    logits = problem.query_key.double() @ problem.memory_key.double().mT * problem.scale
    if top_k < logits.shape[2]:
        best = logits.topk(top_k + 1).values
        clear = best[..., top_k - 1] - best[..., top_k] > least
        # a query for which it is not certain asks like the first one for which it is
        for item in range(len(clear)):
            certain = clear[item].nonzero()[0]
            problem.query_key[item, ~clear[item]] = problem.query_key[item, certain]
    return problem


@each_case
@pytest.mark.parametrize("channel_major", [False, True], ids=["token_major", "channel_major"])
@pytest.mark.parametrize("k", [1, 7, 30])
def test_read_and_gradients(implementation, dtype, channel_major, k):
    problem = make_problem(
        2, 40, 150, 32, 48, dtype=dtype, peak=2.0, channel_major=channel_major, device=device_of(implementation)
    )
    assert_exact(separated(problem, k, 0.03), read_by(implementation))
