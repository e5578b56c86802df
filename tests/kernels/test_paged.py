"""A memory in pages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stm_kernels.cpu.skip as cpu_skip
import stm_kernels.gpu.forward as forward
from stm_kernels import PagedMemory, memory_read, memory_usage, merge_reads
from stm_kernels.testing import extra_memory, make_problem

B, C, V = 2, 16, 24


def filled(problem, page_size: int, frame: int = 7, **options) -> PagedMemory:
    memory = PagedMemory(B, C, V, page_size=page_size, dtype=problem.memory_key.dtype, **options)
    for key, value in zip(problem.memory_key.split(frame, 1), problem.memory_value.split(frame, 1)):
        memory.append(key, value)
    return memory


def held_by(memory: PagedMemory) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and all values, in their order."""
    keys, values = zip(*memory.state()["pages"])
    return torch.cat([key.cpu() for key in keys], 1), torch.cat([value.cpu() for value in values], 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page_size", [1, 5, 50, 64])
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_read_equals_the_read_of_everything(dtype, page_size, implementation):
    problem = make_problem(B, 9, 50, C, V, dtype=dtype, peak=3.0)
    memory = filled(problem, page_size)
    assert len(memory) == 50
    found = memory.read(problem.query_key, return_lse=True, implementation=implementation)
    truth = memory_read(
        *(getattr(problem.to(torch.float64), name) for name in ("query_key", "memory_key", "memory_value")),
        return_lse=True,
        implementation="reference",
    )
    whole = memory_read(
        problem.query_key, problem.memory_key, problem.memory_value, return_lse=True, implementation=implementation
    )
    for one, other, true in zip(found, whole, truth):
        # one more rounding of a page's read, and one of every merge
        merges = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * (50 // page_size)
        error = (other - true).abs().max() + (torch.finfo(one.dtype).eps + merges) * true.abs().max()
        assert one.dtype == other.dtype
        assert (one - true).abs().max() <= error


def test_pages_are_merged_in_float32():
    problem = make_problem(B, 9, 50, C, V, dtype=torch.float16, peak=3.0)
    found = filled(problem, 1).read(problem.query_key)
    # a page of one position reads its value exactly: what is left is one rounding of the merged read
    problem = problem.to(torch.float32)
    expected = filled(problem, 1).read(problem.query_key)
    rounding = torch.finfo(torch.float16).eps / 2
    merges = 50 * torch.finfo(torch.float32).eps * problem.memory_value.abs().max()
    assert ((found - expected).abs() <= rounding * expected.abs() + merges).all()


def test_interpreted_triton_reads_pages(device):
    problem = make_problem(B, 9, 50, C, V, device=device)
    found = filled(problem, 20, device=device).read(problem.query_key, implementation="triton")
    expected = memory_read(problem.query_key, problem.memory_key, problem.memory_value, implementation="reference")
    torch.testing.assert_close(found, expected, rtol=0, atol=50 * torch.finfo(torch.float32).eps)


def test_drop_last_forgets_the_newest():
    problem = make_problem(B, 9, 50, C, V, dtype=torch.float64)
    memory = filled(problem, 8)
    held = memory.nbytes
    memory.drop(19)
    assert len(memory) == 31 and memory.nbytes == held
    expected = memory_read(problem.query_key, problem.memory_key[:, :31], problem.memory_value[:, :31])
    torch.testing.assert_close(memory.read(problem.query_key), expected)
    memory.append(problem.memory_key[:, 31:], problem.memory_value[:, 31:])
    assert memory.nbytes == held
    expected = memory_read(problem.query_key, problem.memory_key, problem.memory_value)
    torch.testing.assert_close(memory.read(problem.query_key), expected)


def test_nothing_held():
    memory = PagedMemory(B, C, V)
    assert len(memory) == memory.nbytes == 0
    for implementation in ("auto", "reference"):
        out, lse = memory.read(torch.randn(B, 3, C), return_lse=True, implementation=implementation)
        assert out.equal(torch.zeros(B, 3, V)) and lse.equal(torch.full((B, 3), -torch.inf))
    memory.append(torch.zeros(B, 0, C), torch.zeros(B, 0, V))
    memory.drop(0)
    assert len(memory) == memory.nbytes == 0


def test_appending_copies_the_new_positions_alone():
    memory = PagedMemory(B, C, V, page_size=1000)
    key, value = torch.randn(B, 10, C), torch.randn(B, 10, V)
    memory.append(key, value)
    page = 4 * B * 1000 * (C + V)
    assert memory.nbytes == page
    pages = [tensor.data_ptr() for tensor in memory._pages.on_device[0]]
    assert extra_memory(lambda: [memory.append(key, value) for _ in range(99)]) == 0
    assert [tensor.data_ptr() for tensor in memory._pages.on_device[0]] == pages and memory.nbytes == page
    # the page is full: the next position opens one
    assert extra_memory(lambda: memory.append(key[:, :1], value[:, :1])) == page == memory.nbytes // 2


def test_extra_memory_of_a_read_does_not_grow_with_the_pages():
    def extra(N: int) -> int:
        problem = make_problem(B, 20, N, C, V)
        memory = filled(problem, 64, frame=N)
        return extra_memory(lambda: memory.read(problem.query_key))

    assert extra(64 * 20) == extra(64 * 3)


def test_strided_frames_are_appended():
    problem = make_problem(B, 9, 50, C, V, dtype=torch.float64, channel_major=True)
    expected = memory_read(problem.query_key, problem.memory_key, problem.memory_value)
    torch.testing.assert_close(filled(problem, 20).read(problem.query_key), expected)


def test_pages_made_in_inference_mode_are_filled_outside_it():
    key, value = torch.randn(B, 4, C), torch.randn(B, 4, V)
    memory = PagedMemory(B, C, V, page_size=6)
    with torch.inference_mode():
        memory.append(key, value)
    memory.append(key, value)
    with torch.inference_mode():
        memory.append(key, value)
        assert memory.read(torch.randn(B, 3, C)).shape == (B, 3, V)
    assert len(memory) == 12


def test_the_query_has_a_gradient():
    problem = make_problem(B, 3, 12, C, V, dtype=torch.float64)
    memory = filled(problem, 5)
    torch.autograd.gradcheck(memory.read, problem.query_key.requires_grad_())


def test_gradients_are_not_lost_silently():
    memory = PagedMemory(B, C, V)
    key, value = torch.randn(B, 4, C), torch.randn(B, 4, V, requires_grad=True)
    with pytest.raises(ValueError, match="value: expected no gradients, a memory holds none; got requires_grad=True"):
        memory.append(key, value)
    with torch.no_grad():
        memory.append(key, value)
    memory.append(key, value.detach())
    assert len(memory) == 8


@pytest.mark.parametrize(
    "key, value, message",
    [
        ((B, 4), (B, 4, V), r"key: expected \[2, P, 16\], got \[2, 4\]"),
        ((1, 4, C), (1, 4, V), r"key: expected \[2, P, 16\], got \[1, 4, 16\]"),
        ((B, 4, C), (B, 4, C), r"value: expected \[2, P, 24\], got \[2, 4, 16\]"),
        ((B, 4, C), (B, 5, V), "value: expected P = 4 as in key, got 5"),
    ],
)
def test_shapes_that_do_not_fit(key, value, message):
    memory = PagedMemory(B, C, V)
    with pytest.raises(ValueError, match=message):
        memory.append(torch.zeros(key), torch.zeros(value))
    assert len(memory) == 0


def test_other_dtypes_and_devices_are_refused():
    memory = PagedMemory(B, C, V)
    key, value = torch.zeros(B, 4, C), torch.zeros(B, 4, V)
    with pytest.raises(ValueError, match=r"value: expected dtype torch.float32 as in this memory, got torch.float16"):
        memory.append(key, value.half())
    with pytest.raises(ValueError, match=r"key: expected device cpu as in this memory, got meta"):
        memory.append(key.to("meta"), value)


@pytest.mark.parametrize("name", ["batch", "key_channels", "value_channels", "page_size"])
def test_sizes_are_positive(name):
    sizes = {"batch": B, "key_channels": C, "value_channels": V, "page_size": 8} | {name: 0}
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        PagedMemory(**sizes)


def test_memory_is_of_floating_point():
    with pytest.raises(TypeError, match="dtype: expected a floating-point type, got torch.int32"):
        PagedMemory(B, C, V, dtype=torch.int32)


@pytest.mark.parametrize("count", [-1, 5])
def test_only_what_is_held_can_be_dropped(count):
    memory = PagedMemory(B, C, V)
    memory.append(torch.zeros(B, 4, C), torch.zeros(B, 4, V))
    with pytest.raises(ValueError, match=f"count: expected 0 to 4 positions, got {count}"):
        memory.drop(count)


@pytest.mark.parametrize("skip", [0.0, 0.02])
@pytest.mark.parametrize("parts", [1, 3])
def test_one_launch_walks_over_the_pages(monkeypatch, device, skip, parts):
    launches = []
    launch = forward.forward_launch

    def counted(*arguments):
        launches.append(arguments[-1])
        return launch(*arguments)

    monkeypatch.setattr(forward, "forward_launch", counted)
    monkeypatch.setattr(forward, "forward_splits", lambda *arguments: (parts, {1: 320, 3: 192}[parts]))
    problem = make_problem(2, 40, 300, 32, 48, peak=5.0, device=device)
    # queries alike leave out the same blocks
    query_key = problem.query_key[:, :1].repeat(1, 40, 1)
    memory = PagedMemory(2, 32, 48, page_size=128, device=device)
    for start in range(0, 300, 75):
        memory.append(problem.memory_key[:, start : start + 75], problem.memory_value[:, start : start + 75])
    out, lse, skipped = memory.read(query_key, skip=skip, return_lse=True, return_skipped=True, implementation="triton")
    assert [pages.length for pages in launches] == [300]
    expected, expected_lse = memory_read(
        query_key, problem.memory_key, problem.memory_value, return_lse=True, implementation="reference"
    )
    torch.testing.assert_close(lse, expected_lse)
    assert skipped.amax() <= skip
    assert (skipped > 0).any() == (skip > 0)
    slack = 2 * skipped.amax() * problem.memory_value.abs().amax() + 1e-5
    assert (out - expected).abs().amax() <= slack


def test_the_dropped_mass_of_pages_is_a_share_of_all(monkeypatch, device):
    for name, value in {"MIN_MULTIPLICATIONS": 0, "GATHERED_CHANNELS": 1, "MAX_GATHERED": 2.0}.items():
        monkeypatch.setattr(cpu_skip, name, value)
    problem = make_problem(1, 40, 300, 32, 48, dtype=torch.float64, peak=5.0)
    query_key = problem.query_key[:, :1].repeat(1, 40, 1)
    memory = PagedMemory(1, 32, 48, page_size=100, dtype=torch.float64)
    memory.append(problem.memory_key, problem.memory_value)
    options = {"skip": 0.3, "return_lse": True, "return_skipped": True}
    _, lse, skipped = memory.read(query_key, **options)
    parts = zip(problem.memory_key.split(100, 1), problem.memory_value.split(100, 1))
    reads = [memory_read(query_key, key, value, **options) for key, value in parts]
    expected = sum((part_lse - lse).exp() * part for _, part_lse, part in reads)
    assert all(part.max() > 0 for *_, part in reads)
    torch.testing.assert_close(skipped.double(), expected, rtol=1e-6, atol=0)


def test_a_kernel_never_follows_the_addresses_of_freed_pages(device):
    problem = make_problem(1, 20, 384, 32, 48, device=device)
    memory = PagedMemory(1, 32, 48, page_size=128, device=device)

    def read_everything() -> None:
        out = memory.read(problem.query_key, implementation="triton")
        keys, values = held_by(memory)
        expected = memory_read(problem.query_key, keys.to(device), values.to(device), implementation="reference")
        torch.testing.assert_close(out, expected)

    memory.append(problem.memory_key, problem.memory_value)
    read_everything()
    # held on to, so that new pages get other addresses
    freed = list(memory._pages.on_device)
    memory.drop(383)
    memory.free_unused()
    for page in freed[1:]:
        for tensor in page:
            tensor.fill_(torch.nan)
    # as many pages as before
    memory.append(problem.memory_key[:, 1:].flip(1), problem.memory_value[:, 1:].flip(1))
    read_everything()


def test_gradients_by_the_query_are_read_page_by_page(device):
    problem = make_problem(1, 20, 300, 32, 48, device=device)
    memory = PagedMemory(1, 32, 48, page_size=128, device=device)
    memory.append(problem.memory_key, problem.memory_value)
    grads = []
    for read in (
        lambda q: memory.read(q, implementation="triton"),
        lambda q: memory.read(q, implementation="reference"),
    ):
        query_key = problem.query_key.clone().requires_grad_()
        grads += torch.autograd.grad((read(query_key) * problem.grad_out).sum(), query_key)
    torch.testing.assert_close(*grads)


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
