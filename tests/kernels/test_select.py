"""The choice of the k best by rounded keys first, whatever the processor: as the choice among exact products."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stm_kernels.cpu.select as cpu_select
from stm_kernels.affinity import Affinity

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def rounded(monkeypatch):
    """Small blocks and chunks, keys always rounded first; what each block found by them."""
    found = []
    by_rounded_keys = cpu_select._best_by_rounded_keys

    def noted(*arguments):
        found.append(by_rounded_keys(*arguments))
        return found[-1]

    monkeypatch.setattr(cpu_select, "QUERIES_PER_BLOCK", 16)
    monkeypatch.setattr(cpu_select, "KEYS_PER_CHUNK", 48)
    monkeypatch.setattr(cpu_select, "GROUP", 4)
    monkeypatch.setattr(cpu_select, "GATHERED", 2**10)
    monkeypatch.setattr(cpu_select, "_rounding_pays", lambda affinity: True)
    monkeypatch.setattr(cpu_select, "_best_by_rounded_keys", noted)
    return found


def problem(seed, B, M, N, C, dtype=torch.float32, spread=1.0, bias=None):
    """An affinity of keys that cluster, as a video's do: every query has its own few positions."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(B, 8, C, generator=generator) * spread

    def keys(count):
        of = torch.randint(8, (B, count), generator=generator)
        noise = torch.randn(B, count, C, generator=generator) * spread * 0.3
        return (centers.gather(1, of[:, :, None].expand(-1, -1, C)) + noise).to(dtype)

    if bias is not None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        bias = (torch.randn(B, N, generator=generator) * bias).to(wide)
    return Affinity(keys(M), keys(N), C**-0.5, bias)


def assert_chosen(affinity, k, exact=False):
    """Positions in the order of their logits, which are the k best of float64 up to the rounding of a product."""
    indices, logits = cpu_select.chunked_select(affinity, k)
    products = affinity.query_key.double() @ affinity.memory_key.double().mT * affinity.scale
    if affinity.key_bias is not None:
        products += affinity.key_bias.double()[:, None]
    expected = products.sort(dim=2, descending=True, stable=True)
    if exact:
        assert indices.long().equal(expected.indices[..., :k])
    epsilon = torch.finfo(logits.dtype).eps
    norms = affinity.query_key.double().norm(dim=2)[:, :, None] * affinity.memory_key.double().norm(dim=2).max()
    allowed = affinity.memory_key.shape[2] * epsilon * (norms * affinity.scale + expected.values.abs().amax())
    assert ((logits.double() - expected.values[..., :k]).abs() <= allowed).all()
    assert ((products.gather(2, indices.long()) - logits.double()).abs() <= allowed).all()
    assert all(len(row.unique()) == len(row) for row in indices.flatten(0, 1))


@each_dtype
@pytest.mark.parametrize("bias", [None, 0.1, 30.0])
@pytest.mark.parametrize("k", [1, 16])
def test_as_by_exact_products(rounded, dtype, bias, k):
    assert_chosen(problem(0, 2, 40, 500, 32, dtype, bias=bias), k)
    assert all(found is not None for found in rounded) and len(rounded) == 6


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    N=st.integers(1, 400),
    k=st.integers(1, 40),
    scale=st.sampled_from([1e-19, 1e-3, 1.0, 1e3, 1e17]),
    bias=st.sampled_from([None, 1.0, 1e4]),
)
def test_at_any_size(seed, N, k, scale, bias):
    assert_chosen(problem(seed, 1, 20, N, 16, spread=scale, bias=bias), min(k, N))


def test_keys_that_differ_by_less_than_they_are_rounded():
    affinity = problem(1, 1, 30, 400, 32)
    # every position thrice, so close that the rounded ones are equal
    keys = affinity.memory_key[:, :100].bfloat16().float()
    affinity.memory_key[:, :300] = torch.cat([keys * (1 - 2**-12), keys, keys * (1 + 2**-12)], 1)
    affinity.memory_key[:, 300:] *= 0.1
    assert_chosen(affinity, 3)
    assert_chosen(affinity, 16)


def test_where_rounding_misleads_most():
    # position 1 is better, its queries and keys are rounded down, and so is their product; those of 0 are rounded up
    down = [1 + 7 / 128 + 0.999 / 256, 1 + 9 / 128 + 0.999 / 256]
    up = [1 + 5 / 128 - 0.999 / 256, 1 + 13 / 128 - 0.999 / 256]
    assert down[0] * down[1] > up[0] * up[1]
    affinity = Affinity(torch.tensor([[[down[0], up[0]]]]), torch.tensor([[[0.0, up[1]], [down[1], 0.0]]]), 1.0)
    products = affinity.query_key.bfloat16() @ affinity.memory_key.bfloat16().mT
    assert products.argmax() == 0
    assert_chosen(affinity, 1, exact=True)


def test_a_bias_that_products_cancel():
    # products are -255 and -256, rounded biases 256 and 258: by those alone the worse half is better
    bias = torch.cat([torch.linspace(256.9, 256.99, 50), torch.linspace(257.1, 257.8, 50)])[None]
    keys = torch.tensor([-15.9375, -16.0], dtype=torch.bfloat16).repeat_interleave(50)[None, :, None]
    assert_chosen(Affinity(torch.full((1, 5, 1), 16.0, dtype=torch.bfloat16), keys, 1.0, bias), 4)


@each_dtype
def test_of_equal_logits_the_lower_index_wins(rounded, dtype):
    affinity = problem(2, 2, 20, 300, 8, dtype, spread=2.0)
    for key in (affinity.query_key, affinity.memory_key):
        key.clamp_(-2, 2).round_()
    for k in (1, 5, 40):
        assert_chosen(affinity, k, exact=True)
    assert any(found is not None for found in rounded)


def test_alike_positions_are_left_to_exact_products(rounded):
    affinity = problem(3, 1, 20, 900, 16)
    affinity.memory_key[:] = affinity.memory_key[:, :1]
    assert_chosen(affinity, 2, exact=True)
    assert rounded == [None] * 2


def test_hidden_positions_and_lengths():
    affinity = problem(4, 3, 20, 200, 16, bias=1.0)
    affinity.key_bias[:, ::2] = -math.inf
    affinity.key_bias[1] = -math.inf
    ended = replace(affinity, lengths=torch.tensor([200, 90, 0]))
    affinity.memory_key[0, ::2] = 0.0
    assert_chosen(affinity.of_queries(slice(1), slice(None)), 7)
    indices, logits = cpu_select.chunked_select(ended, 7)
    assert (indices[0] % 2 == 1).all() and logits[1:].isneginf().all()


def test_what_fills_up_a_chunk_is_no_position(rounded):
    # the first chunk has 46 positions, of which no group is a part; the one behind it is seen, as are two more
    affinity = problem(7, 1, 23, 69, 16, bias=1.0)
    seen = torch.tensor([10, 46, 60], dtype=torch.int32)
    affinity.key_bias[:, ~torch.isin(torch.arange(69), seen)] = -math.inf
    indices, logits = cpu_select.chunked_select(affinity, 5)
    assert None not in rounded
    assert indices[..., :3].sort(2).values.equal(seen.expand(1, 23, 3))
    assert logits[..., :3].isfinite().all() and logits[..., 3:].isneginf().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows(value):
    affinity = problem(5, 1, 20, 300, 16)
    affinity.memory_key[0, 150] = value
    indices, logits = cpu_select.chunked_select(affinity, 3)
    assert (indices == 150).any(2).all() or not math.isnan(value)
    assert not logits.isfinite().all()


@each_dtype
@pytest.mark.parametrize("bias", [None, 100.0])
def test_products_err_by_no_more_than_is_reckoned_with(dtype, bias):
    for seed, spread in enumerate((1e-3, 1.0, 50.0)):
        affinity = problem(seed, 1, 50, 200, 64, dtype, spread, bias)
        queries, keys = affinity.query_key[0], affinity.memory_key[0]
        rounded = queries.bfloat16()
        offset = None if bias is None else affinity.key_bias[0]
        allowed = cpu_select._errors(queries, rounded, dtype, *cpu_select._largest(keys, offset))
        found = (rounded.float() @ keys.bfloat16().float().mT).double()
        true = queries.double() @ keys.double().mT
        if offset is not None:
            high = offset.bfloat16().to(offset.dtype)
            found += (high + (offset - high).bfloat16().to(offset.dtype)).double()
            true += offset.double()
        errors = (found - true).abs()
        assert (errors <= allowed).all()
        # and not by a multiple that would let in everything
        assert dtype == torch.bfloat16 or errors.amax() > allowed.amin() / 100
