"""A memory sharded over processes, against the read of all of it in one."""

import datetime
import os
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from stm_kernels import DistributedMemory, PagedMemory, distributed_memory_read, memory_read
from stm_kernels.testing import make_problem

B, M, N, C, V = 2, 9, 60, 16, 24
TIMEOUT = 20


def run(ranks: int, function, folder, *arguments) -> list:
    """What `function(rank, ranks, *arguments)` returned or raised on each rank."""
    context = mp.start_processes(
        _rank, (ranks, function, str(folder), arguments), ranks, join=False, start_method="fork"
    )
    deadline = time.monotonic() + 3 * TIMEOUT
    while not context.join(timeout=1):
        assert time.monotonic() < deadline, "a rank hangs"
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def _rank(rank: int, ranks: int, function, folder: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    try:
        result = function(rank, ranks, *arguments)
    except RuntimeError as error:
        result = f"RuntimeError: {error}"
    torch.save(result, f"{folder}/{rank}.pt")
    # no goodbye: a rank that died would be waited for
    os._exit(0)


def read_shard(rank, ranks, dtype, cuts):
    problem = make_problem(B, M, N, C, V, dtype=dtype, peak=3.0)
    part = slice(cuts[rank], cuts[rank + 1])
    inputs = (problem.query_key, problem.memory_key[:, part], problem.memory_value[:, part])
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    out, lse = distributed_memory_read(*inputs, return_lse=True)
    grads = torch.autograd.grad([out, lse], inputs, [problem.grad_out, problem.grad_lse])
    return out.detach(), lse.detach(), *grads


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", [(0, 60), (0, 25, 60), (0, 10, 10, 45, 60)], ids=["one", "two", "four, one empty"])
def test_read_and_gradients_equal_those_of_one_process(tmp_path, dtype, cuts):
    found = run(len(cuts) - 1, read_shard, tmp_path, dtype, cuts)
    problem = make_problem(B, M, N, C, V, dtype=dtype, peak=3.0)
    inputs = [problem.query_key, problem.memory_key, problem.memory_value]
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    out, lse = memory_read(*inputs, return_lse=True, implementation="chunked")
    grads = torch.autograd.grad([out, lse], inputs, [problem.grad_out, problem.grad_lse])
    # a few more roundings than in one process
    slack = {"rtol": 0.0, "atol": 16 * torch.finfo(dtype).eps * max(g.abs().max().item() for g in (out, lse, *grads))}
    for rank, (rank_out, rank_lse, by_query, by_key, by_value) in enumerate(found):
        torch.testing.assert_close((rank_out, rank_lse, by_query), (out.detach(), lse.detach(), grads[0]), **slack)
        part = slice(cuts[rank], cuts[rank + 1])
        torch.testing.assert_close((by_key, by_value), (grads[1][:, part], grads[2][:, part]), **slack)
        # to the bit the same on every rank
        assert rank_out.equal(found[0][0]) and rank_lse.equal(found[0][1]) and by_query.equal(found[0][2])


def read_nothing(rank, ranks):
    problem = make_problem(B, M, N, C, V)
    query_key = problem.query_key.requires_grad_()
    out, lse = DistributedMemory(B, C, V).read(query_key, return_lse=True)
    (grad,) = torch.autograd.grad(out.sum(), query_key)
    return out.detach(), lse.detach(), grad


def test_an_empty_memory_reads_zeros(tmp_path):
    for out, lse, grad in run(2, read_nothing, tmp_path):
        assert out.equal(torch.zeros(B, M, V)) and lse.equal(torch.full((B, M), -torch.inf)) and not grad.any()


def append_and_read(rank, ranks):
    problem = make_problem(B, M, N, C, V, peak=3.0)
    memory = DistributedMemory(B, C, V, page_size=8)
    lengths = []
    # of as many positions as a multiple of the ranks: frames are dealt out, not positions
    for key, value in zip(problem.memory_key.split(6, 1), problem.memory_value.split(6, 1)):
        memory.append(key, value)
        lengths.append((len(memory), len(memory.shard)))
    return memory.read(problem.query_key, return_lse=True), lengths


def test_frames_are_dealt_out(tmp_path):
    found = run(3, append_and_read, tmp_path)
    problem = make_problem(B, M, N, C, V, peak=3.0)
    expected = memory_read(problem.query_key, problem.memory_key, problem.memory_value, return_lse=True)
    for result, lengths in found:
        torch.testing.assert_close(result, expected)
        assert [whole for whole, _ in lengths] == [*range(6, 61, 6)]
    assert [lengths[-1][1] for _, lengths in found] == [24, 18, 18]


def read_until_one_dies(rank, ranks):
    problem = make_problem(B, M, N, C, V)
    memory = DistributedMemory(B, C, V)
    memory.append(problem.memory_key, problem.memory_value)
    memory.read(problem.query_key)
    if rank == 1:
        torch.save("died", f"{os.environ['DIED']}/1.pt")
        os._exit(0)
    memory.read(problem.query_key)
    return "read on"


def test_a_rank_that_dies_ends_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv("DIED", str(tmp_path))
    first, second, third = run(3, read_until_one_dies, tmp_path)
    assert second == "died"
    assert first.startswith("RuntimeError") and third.startswith("RuntimeError")


def test_a_process_group_is_needed():
    with pytest.raises(RuntimeError, match="expected an initialised process group"):
        DistributedMemory(1, 4, 4)
    inputs = (torch.ones(1, 2, 3),) * 3
    with pytest.raises(RuntimeError, match="expected an initialised process group"):
        distributed_memory_read(*inputs)


def test_bad_frames_are_refused_by_every_rank(tmp_path):
    for message in run(2, append_a_bad_frame, tmp_path):
        assert message == f"key: expected [{B}, P, {C}], got [{B}, 3, {C + 1}]"


def append_a_bad_frame(rank, ranks):
    try:
        DistributedMemory(B, C, V).append(torch.ones(B, 3, C + 1), torch.ones(B, 3, V))
    except ValueError as error:
        return str(error)


def dtensors_are_refused(rank, ranks):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh, said = init_device_mesh("cpu", (ranks,)), []
    query_key, memory_key, memory_value = inputs = [torch.randn(1, 4, 8) for _ in range(3)]
    spread = distribute_tensor(memory_key, mesh, [Shard(1)])
    bias = distribute_tensor(torch.zeros(1, 4), mesh, [Shard(1)])
    for call in (
        lambda: memory_read(query_key, spread, memory_value),
        lambda: memory_read(*inputs, key_bias=bias),
        lambda: PagedMemory(1, 8, 8).append(spread, memory_value),
    ):
        try:
            said.append(call())
        except TypeError as error:
            said.append(str(error))
    assert memory_read(query_key, spread.to_local(), spread.to_local()).shape == (1, 4, 8)
    return said


def test_a_tensor_spread_over_processes_is_refused_by_name(tmp_path):
    rest = "expected a tensor of this process, got a DTensor; pass its .to_local()"
    for said in run(2, dtensors_are_refused, tmp_path):
        assert said == [f"{name}: {rest}" for name in ("memory_key", "key_bias", "key")]
