"""What the tests of top-k reads share: who selects, in small chunks, and problems with many equal logits."""

from dataclasses import replace

import pytest
import torch

import stm_kernels.cpu.select as cpu_select
import stm_kernels.cpu.top_k as cpu_top_k

CHUNKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton's interpreter multiplies bfloat16 wrongly: there it is tested on a GPU only
TRITON_DTYPES = CHUNKED_DTYPES if torch.cuda.is_available() else (torch.float32, torch.float16)
CASES = [("chunked", dtype) for dtype in CHUNKED_DTYPES] + [("triton", dtype) for dtype in TRITON_DTYPES]
each_case = pytest.mark.parametrize("implementation, dtype", CASES, ids=lambda value: str(value).removeprefix("torch."))
each_implementation = pytest.mark.parametrize("implementation", ["chunked", "triton"])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(cpu_select, "QUERIES_PER_BLOCK", 16)
    monkeypatch.setattr(cpu_select, "KEYS_PER_CHUNK", 48)
    monkeypatch.setattr(cpu_select, "GROUP", 4)
    monkeypatch.setattr(cpu_select, "GATHERED", 2**10)
    monkeypatch.setattr(cpu_top_k, "GATHERED", 2**10)
    monkeypatch.setattr(cpu_top_k, "COPIED", 2**11)


def device_of(implementation: str) -> str:
    return "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"


def whole_numbered(problem, top_k):
    """The problem with keys in -2…2: many logits are equal, and all are exact in every dtype."""
    keys = {name: getattr(problem, name).clamp(-2, 2).round() for name in ("query_key", "memory_key")}
    return replace(problem, **keys, scale=0.5, top_k=top_k)
