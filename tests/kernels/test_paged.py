"""A memory in pages."""

import pytest
import torch
from paging import B, C, V, filled, held_by

import stm_kernels.cpu.skip as cpu_skip
import stm_kernels.gpu.forward as forward
from stm_kernels import PagedMemory, memory_read
from stm_kernels.testing import assert_exact, extra_memory, make_problem


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


@pytest.mark.parametrize("device_share", [None, 0.5, 0.0], ids=["device", "half on the host", "host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_frames_are_exact(device_share, dtype):
    """Appended one by one, by the yardstick of all reads."""
    frames, positions = 1000, 12
    problem = make_problem(1, positions, frames * positions, 16, 24, dtype=dtype, peak=3.0)
    on_device = None if device_share is None else round(device_share * frames / 10)
    memory = PagedMemory(1, 16, 24, page_size=10 * positions, device_pages=on_device, dtype=dtype)
    for key, value in zip(problem.memory_key.split(positions, 1), problem.memory_value.split(positions, 1)):
        memory.append(key, value)
    held = {"device": memory.device_nbytes // memory.page_nbytes, "host": memory.host_nbytes // memory.page_nbytes}
    assert held == {"device": (on_device := 100 if on_device is None else on_device), "host": 100 - on_device}

    def read(query_key, *_, scale):
        return memory.read(query_key, scale=scale, return_lse=True)

    assert_exact(problem, read, gradients=False)


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
@pytest.mark.parametrize("similarity", ["dot", "l2"])
def test_one_launch_walks_over_the_pages(monkeypatch, device, skip, parts, similarity):
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
    for tensor in memory._pages.on_device[-1]:
        tensor[:, 300 % 128 :] = torch.nan
    options = {"similarity": similarity, "return_lse": True}
    out, lse, skipped = memory.read(query_key, skip=skip, return_skipped=True, implementation="triton", **options)
    assert [pages.length for pages in launches] == [300]
    inputs = (query_key, problem.memory_key, problem.memory_value)
    expected, expected_lse = memory_read(*inputs, implementation="reference", **options)
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
