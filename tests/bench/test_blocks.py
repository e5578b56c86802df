"""What is counted of a GPU's reads is what the kernels do: held against Triton's interpreter."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

if torch.cuda.is_available():
    pytest.skip("watches the interpreter", allow_module_level=True)

from triton.runtime import interpreter

import stm_kernels.gpu.forward as forward
from bench.blocks import affinity_of, gathered_positions, tiled_order, visited_blocks
from stm_kernels.affinity import SKIP_POSITIONS, SKIP_QUERIES
from stm_kernels.gpu.forward import triton_read
from stm_kernels.gpu.launch import Launch
from stm_kernels.gpu.top_k import triton_select
from stm_kernels.gpu.tuning import ForwardTiles
from stm_kernels.testing import make_problem

V, SKIP = 40, 1e-2
NARROW, TALL, LARGE = (ForwardTiles(*block, 32, 4, 1) for block in ((32, 32), (64, 32), (64, 64)))


def local(similarity: str, M: int = 100, N: int = 270):
    """Neighbouring queries, and neighbouring positions, are alike."""
    problem, places = make_problem(1, M, N, 16, V), make_problem(1, 7, 7, 16, V, seed=1).query_key * 2
    query_key = places[:, torch.arange(M) // 40] + problem.query_key * 0.3
    memory_key = places[:, torch.arange(N) // 24 % 7] + problem.memory_key * 0.3
    return affinity_of(query_key, memory_key, similarity), problem.memory_value


# half of the mass is several blocks, of which each alone could be left out
@pytest.mark.parametrize(
    "similarity, splits, tiles, skip",
    [("dot", 1, TALL, 0.5), ("dot", 3, NARROW, SKIP), ("l2", 1, LARGE, SKIP), ("l2", 3, NARROW, SKIP)],
)
def test_counted_blocks_are_those_that_the_kernel_multiplies(monkeypatch, similarity, splits, tiles, skip):
    affinity, value = local(similarity)
    per_split = -(-270 // tiles.block_n // splits) * tiles.block_n
    monkeypatch.setattr(forward, "forward_tiles", lambda *arguments, **form: tiles)
    monkeypatch.setattr(forward, "forward_splits", lambda *arguments: (-(-270 // per_split), per_split))
    products = []
    dot = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_dot", lambda *inputs: products.append(1) or dot(*inputs)
    )
    *_, kept = triton_read(affinity, value, skip)
    visited = visited_blocks(affinity, skip, tiles, per_split)
    assert visited.any() and not visited.all()
    # of every block the keys, and of a visited one the values
    slices = -(-V // tiles.block_v)
    assert len(products) == slices * (visited.numel() + visited.sum())
    cells = visited.repeat_interleave(tiles.block_m // SKIP_QUERIES, 1)
    cells = cells.repeat_interleave(tiles.block_n // SKIP_POSITIONS, 2)[:, : kept.shape[1], : kept.shape[2]]
    assert cells.equal(kept.bool())


@pytest.mark.parametrize("similarity, k, N", [("dot", 3, 133), ("l2", 3, 133), ("dot", 16, 133)])
def test_counted_positions_are_those_that_the_kernel_gathers(monkeypatch, similarity, k, N):
    affinity, _ = local(similarity, 6, N)
    gathered, within = [], []
    builder = interpreter.InterpreterBuilder
    load, run = builder.create_masked_load, Launch.run

    def noted(self, pointers, mask, *rest, **options):
        # the keys are the only tile of two axes that the second pass loads
        if within[-1] == "group_products_kernel" and pointers.data.ndim == 2:
            gathered.append(np.broadcast_to(mask.data, pointers.data.shape)[:, 0].sum())
        return load(self, pointers, mask, *rest, **options)

    def named(launch, device):
        within.append(launch.kernel.__name__)
        run(launch, device)

    monkeypatch.setattr(builder, "create_masked_load", noted)
    monkeypatch.setattr(Launch, "run", named)
    triton_select(affinity, k)
    assert gathered_positions(affinity, k) == sum(gathered)


def test_64_positions_in_tiled_order_are_a_square_of_the_picture():
    y, x = np.divmod(tiled_order(18, 24).numpy(), 24)
    assert sorted(y * 24 + x) == list(range(18 * 24))
    for first in range(0, 16 * 24, 64):
        for axis in (y, x):
            assert np.ptp(axis[first : first + 64]) == 7
    # the rows that are left over are a strip of their own
    assert set(y[16 * 24 :]) == {16, 17}


def test_tiles_of_the_picture_that_see_their_own_place_read_fewer_blocks():
    tiled = tiled_order(32, 48)
    # every position looks like all others of its tile
    key = 8 * torch.nn.functional.one_hot(tiled.argsort() // 64, 24)[None].float()

    def visited(order: torch.Tensor | slice) -> int:
        affinity = affinity_of(key[:, order], key[:, order], "dot")
        return int(visited_blocks(affinity, SKIP, LARGE, 32 * 48).sum())

    # a tile reads from the newest block on until its own: all others weigh little from there on
    assert visited(tiled) == 24 * 25 // 2 < visited(slice(None))
