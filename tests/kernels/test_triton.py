"""The Triton kernels beyond their exactness: chunks of the backward, repeatability, what they refuse."""

import subprocess
import sys

import pytest
import torch

import stm_kernels.gpu.backward as backward
import stm_kernels.gpu.forward as forward
from bench.gpu_readers import backward_tiles_of, chosen, tiles_of
from stm_kernels import memory_read
from stm_kernels.gpu.launch import architecture_of
from stm_kernels.gpu.merge import triton_merge
from stm_kernels.gpu.tuning import affinity_tiles, forward_tiles, keys_per_chunk, padded
from stm_kernels.testing import assert_exact, extra_memory, make_problem, read_by, results

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels run for real")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_backward_in_chunks(monkeypatch, device, dtype):
    monkeypatch.setattr(backward, "keys_per_chunk", lambda queries: 40)
    assert_exact(make_problem(2, 50, 90, 32, 48, dtype=dtype, device=device), read_by("triton"))


ADDITIONS = {"plain": {}, "biased and ragged": {"biased": True, "ragged": True}}
each_addition = pytest.mark.parametrize("additions", ADDITIONS.values(), ids=ADDITIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@each_addition
def test_parts_of_a_memory_are_merged(monkeypatch, device, dtype, additions):
    merged = []

    def merge(outs, *arguments):
        merged.append(len(outs))
        return triton_merge(outs, *arguments)

    monkeypatch.setattr(forward, "multiprocessors", lambda device: 64)
    monkeypatch.setattr(forward, "triton_merge", merge)
    assert_exact(make_problem(2, 50, 700, 32, 48, dtype=dtype, device=device, **additions), read_by("triton"))
    assert merged == [5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@each_addition
def test_the_affinity_is_written_out_for_many_values(monkeypatch, device, dtype, additions):
    calls = []

    def staged(*arguments):
        calls.append(arguments)
        return staged_read(*arguments)

    staged_read = forward._staged_read
    monkeypatch.setattr(forward, "_staged_read", staged)
    monkeypatch.setattr(forward, "keys_per_chunk", lambda queries: 40)
    assert_exact(make_problem(2, 40, 100, 20, 400, dtype=dtype, device=device, **additions), read_by("triton"))
    assert len(calls) == 1


@pytest.mark.parametrize("skip", [0.0, 1e-3])
@pytest.mark.parametrize("positions_per_split", [32, 64, 4096])
def test_tiles_worth_measuring_are_exact_with_any_split(device, skip, positions_per_split):
    problem = make_problem(1, 40, 70, 16, 24, dtype=torch.float16, device=device)
    for tiles in tiles_of(problem.query_key.device, torch.float16, 16, 24):
        if not skip or tiles.kind == "portable":
            with chosen(forward=tiles, positions_per_split=positions_per_split):
                assert_exact(problem, read_by("triton", skip=skip), gradients=False)


@pytest.mark.parametrize("skip", [0.0, 1e-3])
def test_tiles_of_the_backward_worth_measuring_are_exact(device, skip):
    problem = make_problem(1, 40, 70, 16, 24, dtype=torch.float16, device=device)
    for tiles in backward_tiles_of(problem.query_key.device, torch.float16, 16):
        with chosen(backward=tiles):
            assert_exact(problem, read_by("triton", skip=skip))


@pytest.mark.parametrize("options", [{}, {"skip": 1e-3}, {"top_k": 5}], ids=str)
def test_hidden_positions_cost_no_copy_of_the_memory(monkeypatch, device, options):
    monkeypatch.setattr(backward, "keys_per_chunk", lambda queries: 128)
    problem = make_problem(1, 16, 4096, 16, 256, biased=True, device=device)
    results(problem, read_by("triton", **options))  # what a first call keeps
    extra = extra_memory(lambda: results(problem, read_by("triton", **options), gradients=False), device)
    assert extra < (problem.memory_key.nbytes + problem.memory_value.nbytes) / 4


@pytest.mark.parametrize("channel_major", [False, True], ids=["token_major", "channel_major"])
def test_gradients_lie_in_memory_as_their_inputs_do(device, channel_major):
    problem = make_problem(2, 7, 30, 8, 12, channel_major=channel_major, device=device)
    found = results(problem, read_by("triton"))
    for name in ("query_key", "memory_key", "memory_value"):
        assert found[f"grad_{name}"].stride() == getattr(problem, name).stride()


def test_equal_bits_from_run_to_run(device):
    problem = make_problem(2, 50, 90, 32, 48, dtype=torch.float16, device=device)
    first, second = (results(problem, read_by("triton")) for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)


def test_scratch_of_the_backward_is_bounded():
    for queries in (1, 576, 1620, 8160, 10**6):
        keys = keys_per_chunk(queries)
        assert keys >= 1024
        assert keys * queries <= 2**25 or keys == 1024


def test_blocks_hold_their_channels():
    assert [padded(channels) for channels in (1, 16, 17, 128, 129)] == [16, 16, 32, 128, 256]


@pytest.mark.parametrize(
    "architecture", ["interpreter", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_architecture_has_tiles(architecture, dtype):
    for C, V in ((16, 16), (128, 512), (256, 1024)):
        tiles = forward_tiles(architecture, dtype, C, V)
        assert 16 <= tiles.block_v <= padded(V)
        assert min(tiles.block_m, tiles.block_n, affinity_tiles(architecture, dtype, C).block_k) >= 16


@without_gpu
def test_interpreter_is_named():
    assert architecture_of(torch.device("cpu")) == "interpreter"


@without_gpu
def test_bfloat16_is_refused_by_the_interpreter():
    problem = make_problem(1, 4, 6, 16, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="query_key: bfloat16 needs a GPU"):
        memory_read(problem.query_key, problem.memory_key, problem.memory_value, implementation="triton")


@needs_gpu
def test_auto_is_triton_on_a_gpu():
    problem = make_problem(2, 50, 90, 32, 48, dtype=torch.bfloat16, device="cuda")
    auto, triton = (results(problem, read_by(name)) for name in ("auto", "triton"))
    assert all(auto[name].equal(triton[name]) for name in auto)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("channel_major", [False, True], ids=["token_major", "channel_major"])
def test_real_sizes_on_a_gpu(dtype, channel_major):
    problem = make_problem(2, 1620, 8100, 128, 512, dtype=dtype, device="cuda", peak=2.0, channel_major=channel_major)
    assert_exact(problem, read_by("triton"))


@needs_gpu
def test_more_values_than_a_32_bit_offset_reaches():
    problem = make_problem(1, 16, 40_000, 16, 16, dtype=torch.float16, device="cuda")
    wide = torch.zeros(1, 40_000, 60_000, dtype=torch.float16, device="cuda")
    wide[:, :, -16:] = problem.memory_value
    inputs = (problem.query_key, problem.memory_key, wide[:, :, -16:])
    out = memory_read(*inputs, implementation="triton")
    expected = memory_read(problem.query_key, problem.memory_key, problem.memory_value, implementation="triton")
    assert out.equal(expected)


@without_gpu
def test_a_cpu_tensor_without_the_interpreter_is_refused():
    code = """
import torch, stm_kernels
try:
    stm_kernels.memory_read(*(torch.ones(1, 2, 3),) * 3, implementation="triton")
except ValueError as error:
    print(error)
"""
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout == 'implementation: "triton" needs tensors on a GPU, got cpu; use "chunked"\n'
