"""Pages on the host, replaced, dropped and saved; the usage of positions in pages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paging import B, C, V, filled, held_by

import stm_kernels.cpu.chunked as chunked
import stm_kernels.cpu.usage as cpu_usage
import stm_kernels.memory.page_reads as page_reads
import stm_kernels.memory.paged as paged
from stm_kernels import PagedMemory, memory_read, memory_usage, merge_reads
from stm_kernels.testing import extra_memory, make_problem


@pytest.mark.parametrize("device_pages", [0, 1, 3, None])
@pytest.mark.parametrize("top_k", [None, 6])
def test_pages_on_the_host_change_nothing(device, device_pages, top_k):
    problem = make_problem(B, 9, 50, C, V, peak=3.0, device=device)
    memory = filled(problem, 8, device=device, device_pages=device_pages)
    everywhere = filled(problem, 8, device=device)
    assert memory.nbytes == everywhere.nbytes == 7 * 8 * B * (C + V) * 4
    page = 8 * B * (C + V) * 4
    assert memory.device_nbytes == (7 if device_pages is None else device_pages) * page
    found, expected = (m.read(problem.query_key, top_k=top_k, return_lse=True) for m in (memory, everywhere))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_positions_are_replaced(device):
    problem = make_problem(B, 9, 50, C, V, peak=3.0, device=device)
    memory = filled(problem, 8, device=device)
    other = make_problem(B, 9, 50, C, V, seed=1, device=device)
    memory.replace(13, other.memory_key[:, :20], other.memory_value[:, :20])
    key, value = problem.memory_key.clone(), problem.memory_value.clone()
    key[:, 13:33], value[:, 13:33] = other.memory_key[:, :20], other.memory_value[:, :20]
    assert all(found.equal(expected.cpu()) for found, expected in zip(held_by(memory), (key, value)))
    wrong = {(-1, 3): "start: expected 0 to 50, got -1", (40, 11): "count: expected 0 to 10 positions, got 11"}
    for (start, count), message in wrong.items():
        with pytest.raises(ValueError, match=message):
            memory.replace(start, other.memory_key[:, :count], other.memory_value[:, :count])


@pytest.mark.parametrize("start, count", [(0, 7), (10, 20), (30, 20), (45, 5), (0, 50), (20, 29), (7, 0)])
def test_a_gap_is_filled_by_the_last_positions(start, count):
    problem = make_problem(B, 9, 50, C, V)
    memory = filled(problem, 8)
    memory.drop(count, start)
    left = [n for n in range(50) if not start <= n < start + count]
    assert len(memory) == 50 - count
    if not len(memory):
        assert memory.state()["pages"] == []
        return
    keys, values = held_by(memory)
    # in any order, but key and value of a position together
    places = [(problem.memory_key[0] == key).all(1).nonzero().item() for key in keys[0]]
    assert sorted(places) == left
    assert values.equal(problem.memory_value[:, places]) and keys.equal(problem.memory_key[:, places])
    # what stands before the gap stays where it is
    assert places[:start] == left[:start]


def test_dropping_copies_no_more_than_the_gap():
    problem = make_problem(1, 2, 4000, C, V)
    memory = PagedMemory(1, C, V, page_size=512)
    memory.append(problem.memory_key, problem.memory_value)
    assert extra_memory(lambda: memory.drop(100, 50)) <= memory.nbytes / 4
    assert memory.nbytes == 8 * 512 * (C + V) * 4
    memory.drop(3000)
    memory.free_unused()
    assert memory.nbytes == 2 * 512 * (C + V) * 4
    read = memory.read(problem.query_key)
    torch.testing.assert_close(read, memory_read(problem.query_key, *held_by(memory)))


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"similarity": "l2"}, {"similarity": "l2", "top_k": 7}], ids=str)
def test_usage_is_that_of_all_positions_at_once(device, options, implementation):
    problem = make_problem(B, 9, 50, C, V, peak=3.0, device=device)
    memory = filled(problem, 8, device=device, device_pages=2)
    out, usage = memory.read(problem.query_key, return_usage=True, implementation=implementation, **options)
    inputs = (problem.query_key.double(), problem.memory_key.double())
    expected = memory_usage(*inputs, implementation="reference", **options)
    torch.testing.assert_close(usage.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out, memory.read(problem.query_key, implementation=implementation, **options))
    empty = PagedMemory(B, C, V, device=device).read(problem.query_key, return_lse=True, return_usage=True, **options)
    assert [list(each.shape) for each in empty] == [[B, 9, V], [B, 9], [B, 0]]


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"similarity": "l2"}, {"skip": 1e-9}], ids=str)
@pytest.mark.parametrize("device_pages", [None, 2], ids=["device", "host"])
def test_queries_count_by_weight_in_the_usage(device, options, implementation, device_pages):
    problem = make_problem(B, 9, 50, C, V, peak=3.0, device=device)
    memory = filled(problem, 8, device=device, device_pages=device_pages)
    weight = torch.rand(B, 9, device=device) + 0.01
    inputs = (problem.query_key.double(), problem.memory_key.double())
    meaning = {name: value for name, value in options.items() if name != "skip"}
    # a query at a time
    each = [memory_usage(inputs[0][:, m : m + 1], inputs[1], implementation="reference", **meaning) for m in range(9)]
    expected = (torch.stack(each, 1) * weight.double()[:, :, None]).sum(1)
    options = {"implementation": implementation, "return_usage": True, **options}
    _, usage = memory.read(problem.query_key, usage_weight=weight, **options)
    torch.testing.assert_close(usage.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "weight, message",
    [
        (torch.ones(B, 8), r"usage_weight: expected \[B, M\]"),
        (torch.arange(9.0).expand(B, 9), "usage_weight: expected values above 0, got 0.0"),
    ],
    ids=["shape", "zero"],
)
def test_weights_of_queries_are_checked(weight, message):
    memory = filled(make_problem(B, 9, 50, C, V), 8)
    with pytest.raises(ValueError, match=message):
        memory.read(torch.randn(B, 9, C), return_usage=True, usage_weight=weight)


@pytest.mark.parametrize("similarity", ["dot", "l2"])
@pytest.mark.parametrize(
    "dtype, rtol", [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 2**-7)], ids=str
)
def test_usage_comes_out_of_the_read(monkeypatch, dtype, rtol, similarity):
    # blocks of 64 queries, chunks of 128 keys in pages of 256
    monkeypatch.setattr(cpu_usage, "HELD_WEIGHTS", 1)
    monkeypatch.setattr(chunked, "KEYS_PER_CHUNK", 128)
    problem = make_problem(B, 150, 700, C, V, dtype=dtype, peak=5.0)
    memory = filled(problem, 256)
    options = {"similarity": similarity, "return_lse": True}
    read = memory.read(problem.query_key, **options)
    monkeypatch.setattr(page_reads, "has_tiles", lambda: False)
    # there is no second pass
    monkeypatch.setattr(paged, "usage_of_pages", None)
    *found, usage = memory.read(problem.query_key, return_usage=True, **options)
    # of results as large as the values
    atol = rtol * problem.memory_value.double().abs().max().item()
    torch.testing.assert_close(tuple(found), read, rtol=rtol, atol=atol)
    inputs = (problem.query_key.double(), problem.memory_key.double())
    expected = memory_usage(*inputs, implementation="reference", similarity=similarity)
    # in bfloat16 weights are rounded to 8 bits, and so are their sums
    torch.testing.assert_close(usage.double(), expected, rtol=rtol, atol=1e-7)
    torch.testing.assert_close(usage.double().sum(1), torch.full((B,), 150.0).double(), rtol=rtol, atol=0)
    assert usage.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0, 1), st.integers(0, 99)), min_size=1, max_size=6),
    st.sampled_from([None, 0, 1, 3]),
    st.sampled_from([{}, {"top_k": 5}, {"similarity": "l2"}]),
    st.integers(1, 3),
)
def test_dropping_anywhere_leaves_the_read_of_the_rest(turns, device_pages, options, ranks):
    """Positions come and go in any order, on the device or the host, in the shards of several ranks."""
    source = make_problem(B, 4, 1000, C, V, dtype=torch.float64)
    shards = [PagedMemory(B, C, V, page_size=8, device_pages=device_pages, dtype=torch.float64) for _ in range(ranks)]
    held: list[list[int]] = [[] for _ in shards]
    start = 0
    for turn, (count, share, seed) in enumerate(turns):
        memory, mine = shards[turn % ranks], held[turn % ranks]
        new = slice(start, start := start + count)
        memory.append(source.memory_key[:, new], source.memory_value[:, new])
        mine += range(new.start, new.stop)
        places = torch.randperm(len(mine), generator=torch.Generator().manual_seed(seed))[: int(share * len(mine))]
        before, order = list(mine), memory.drop_at(places)
        mine[:] = [before[place] for place in order]
        assert sorted(mine) == sorted(set(before) - {before[place] for place in places})
        # those that stay do not move, but for the last ones
        assert all(mine[place] == before[place] for place in range(len(mine)) if place not in places)
    keys, values = (tensor[:, sum(held, [])] for tensor in (source.memory_key, source.memory_value))
    parts = [memory.read(source.query_key, return_lse=True, return_usage=True, **options) for memory in shards]
    if "top_k" not in options:
        merged, _ = merge_reads(*(torch.stack(each) for each in list(zip(*parts))[:2]))
        torch.testing.assert_close(merged, memory_read(source.query_key, keys, values, **options))
    for mine, (out, _, usage) in zip(held, parts):
        mine_keys, mine_values = source.memory_key[:, mine], source.memory_value[:, mine]
        torch.testing.assert_close(out, memory_read(source.query_key, mine_keys, mine_values, **options))
        expected = memory_usage(source.query_key, mine_keys, implementation="reference", **options)
        torch.testing.assert_close(usage, expected)


@pytest.mark.parametrize(
    "places, said", [([50], "expected 0 to 49, got 50 to 50"), ([-1, 3], "got -1 to 3"), ([3, 3], "got one twice")]
)
def test_places_to_drop(places, said):
    memory = filled(make_problem(B, 9, 50, C, V), 8)
    with pytest.raises(ValueError, match=f"places: .*{said}"):
        memory.drop_at(torch.tensor(places))
    assert len(memory) == 50


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_host_pages_stream_through_the_device():
    problem = make_problem(1, 64, 40_000, 64, 128, device="cuda", dtype=torch.float16)
    memory = PagedMemory(1, 64, 128, page_size=1024, device_pages=4, dtype=torch.float16, device="cuda")
    memory.append(problem.memory_key, problem.memory_value)
    expected = memory_read(problem.query_key, problem.memory_key, problem.memory_value, return_lse=True)
    for _ in range(5):
        found = memory.read(problem.query_key, return_lse=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    page = 1024 * (64 + 128) * 2
    assert extra_memory(lambda: memory.read(problem.query_key), "cuda") <= 4 * page


def test_pages_move_to_the_device_when_more_may_lie_there(device):
    problem = make_problem(B, 9, 50, C, V, device=device)
    memory, everywhere = (filled(problem, 8, device_pages=limit, device=device) for limit in (1, None))
    read = memory.read(problem.query_key)
    page = memory.page_nbytes
    for limit, expected in ((4, (4, 3)), (2, (4, 3)), (20, (7, 0))):
        memory.device_pages = limit
        assert (memory.device_nbytes, memory.host_nbytes) == (expected[0] * page, expected[1] * page)
        assert held_by(memory)[1].equal(held_by(everywhere)[1])
        torch.testing.assert_close(memory.read(problem.query_key), read)
    with torch.inference_mode():
        memory.drop(48)
        memory.free_unused()
    memory.append(problem.memory_key, problem.memory_value)
    assert len(memory) == 52 and memory.host_nbytes == 0


@pytest.mark.parametrize("device_pages", [None, 0, 3])
def test_a_state_is_loaded_to_the_bit_and_where_it_lay(tmp_path, device, device_pages):
    problem = make_problem(B, 9, 50, C, V, dtype=torch.float16, device=device)
    options = {"dtype": torch.float16, "device": device}
    memory, other = (PagedMemory(B, C, V, page_size=8, device_pages=limit, **options) for limit in (device_pages, 1))
    memory.append(problem.memory_key, problem.memory_value)
    memory.drop(9)
    memory.free_unused()
    file = tmp_path / "memory.pt"
    torch.save(memory.state(), file)
    # 41 positions of 5 full pages and one that is nearly empty
    assert file.stat().st_size < 41 * B * (C + V) * 2 + 8192
    other.append(problem.memory_key, problem.memory_value)
    other.load_state(torch.load(file, weights_only=True))
    assert len(other) == 41 and other.device_pages == 1
    assert (other.device_nbytes, other.host_nbytes) == (memory.device_nbytes, memory.host_nbytes)
    for held, loaded in zip(memory.state()["pages"], other.state()["pages"], strict=True):
        assert all(one.view(torch.uint8).equal(two.view(torch.uint8)) for one, two in zip(held, loaded, strict=True))
    for grown in (memory, other):
        grown.append(problem.memory_key[:, :9], problem.memory_value[:, :9])
    assert other.read(problem.query_key).equal(memory.read(problem.query_key))
    with pytest.raises(ValueError, match=r"state: expected keys and values of \(B, channels, dtype\)"):
        PagedMemory(B, C, V + 1, page_size=8, dtype=torch.float16).load_state(memory.state())
