"""Where no object is near, every so many rows and columns of a frame are remembered alone."""

import math

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st

from stm_kernels import memory_read
from stm_model import STM, Tracker
from stm_model.data.synthetic import procedural_clip
from stm_model.tracking.bank import MemoryBank
from stm_model.tracking.budget import PAGE_MULTIPLE, MemoryBudget, MemoryRule
from stm_model.tracking.memory import BESIDE, FRAME, sparse_places

HEIGHT, WIDTH, C, V = 30, 40, 4, 6


@given(st.integers(1, 33), st.integers(1, 41), st.integers(2, 9), st.integers(0, 3), st.integers(0, 2**16))
def test_what_is_near_an_object_stays_and_of_the_rest_a_grid(height, width, spacing, objects, seed):
    generator = torch.Generator().manual_seed(seed)
    cells = (torch.rand(2, height, width, generator=generator) < 0.01 * objects).float() * 0.9
    places, weights = sparse_places(cells, spacing)
    taken = torch.zeros(height * width, dtype=torch.long).index_add_(0, places, torch.ones_like(places))
    needed = torch.zeros(height, width, dtype=torch.bool)
    for y, x in cells.amax(0).nonzero().tolist():
        needed[max(0, y - BESIDE) : y + BESIDE + 1, max(0, x - BESIDE) : x + BESIDE + 1] = True
    needed[::spacing, ::spacing] = True
    assert taken.max() == 1 and taken.view(height, width)[needed].all()
    assert len(places) == min(height * width, -(-int(needed.sum()) // PAGE_MULTIPLE) * PAGE_MULTIPLE)
    # each square of positions counts for as many as it has
    mass = torch.zeros(height * width).index_add_(0, places, weights).view(height, width)
    for y in range(0, height, spacing):
        for x in range(0, width, spacing):
            square = mass[y : y + spacing, x : x + spacing]
            assert square.sum().item() == pytest.approx(square.numel())


def test_a_trace_of_an_object_is_none():
    cells = torch.full((1, HEIGHT, WIDTH), 0.01)
    assert len(sparse_places(cells, 2)[0]) < HEIGHT * WIDTH / 2
    cells[:] = 0.9
    places, weights = sparse_places(cells, 2)
    assert len(places) == HEIGHT * WIDTH and (weights == 1).all()


def scene(index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A key, two values, and two objects that move down, one on the left and one on the right."""
    generator = torch.Generator().manual_seed(index)
    cells = torch.zeros(2, HEIGHT, WIDTH)
    cells[0, 2 + index : 6 + index, 3:8] = cells[1, 2 + index : 6 + index, 30:36] = 0.8
    key = torch.randn(1, C, HEIGHT, WIDTH, generator=generator)
    return key, torch.randn(2, V, HEIGHT, WIDTH, generator=generator), cells


@pytest.mark.parametrize(("rule", "previous"), [("every:2", {5: HEIGHT * WIDTH}), ("first+every:2", {})])
def test_frames_with_a_given_mask_and_the_previous_one_stay_whole(rule, previous):
    bank = MemoryBank(MemoryRule.parse(rule), MemoryBudget(), 2, similarity="l2")
    bank.add_objects(2)
    for index in range(6):
        key, value, cells = scene(index)
        bank.remember(index, bank.wanted(index, [index == 0] * 2, [True] * 2), key, value, cells)
    sparse = len(sparse_places(scene(2)[2], 2)[0])
    assert sparse <= HEIGHT * WIDTH / 2
    frames, counts = bank.memories[0].notes[:, FRAME].long().unique(return_counts=True)
    found = dict(zip(frames.tolist(), counts.tolist()))
    assert found == {0: HEIGHT * WIDTH, 2: sparse, 4: sparse} | previous
    assert len(bank.memories[0].pages) == sum(found.values())


@pytest.mark.parametrize("similarity", ["l2", "dot"])
def test_a_read_is_that_of_every_position_as_often_as_it_weighs(similarity):
    bank = MemoryBank(MemoryRule.parse("first+every:1"), MemoryBudget(), 2, similarity=similarity)
    # one memory for each object, as they enter one after the other
    bank.add_objects(1)
    bank.add_objects(1)
    keys, values, biases = [], [], []
    for index in range(3):
        key, value, cells = scene(index)
        bank.remember(index, bank.wanted(index, [index == 0] * 2, [True] * 2), key, value, cells)
        whole = torch.arange(HEIGHT * WIDTH), torch.ones(HEIGHT * WIDTH)
        places, weights = whole if index == 0 else sparse_places(cells, 2)
        keys.append(rearrange(key, "k c h w -> k (h w) c")[:, places])
        values.append(rearrange(value, "n v h w -> n (h w) v")[:, places])
        biases.append(weights.log())
    query = torch.randn(1, C, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(9))
    asked = rearrange(query, "k c h w -> k (h w) c").expand(2, -1, -1).double()
    inputs = torch.cat(keys, 1).expand(2, -1, -1).double(), torch.cat(values, 1).double()
    bias = torch.cat(biases).expand(2, -1).double()
    options = {"similarity": similarity, "key_bias": bias, "implementation": "reference", "return_lse": True}
    truth, lse = memory_read(asked, *inputs, **options)
    readout, familiarity = bank.read(query)
    torch.testing.assert_close(rearrange(readout, "n v h w -> n (h w) v").double(), truth, rtol=1e-4, atol=1e-5)
    # of the mean position of whole frames
    expected = lse - math.log(3 * HEIGHT * WIDTH)
    torch.testing.assert_close(familiarity.flatten(1).double(), expected.double(), rtol=1e-4, atol=1e-5)


def test_it_is_the_default_where_the_decoder_sees_the_previous_masks(small_model, shared_model):
    assert Tracker(small_model).spacing == 1 and Tracker(shared_model).spacing == 2
    # where not all is kept, use is the better choice
    for budget in (MemoryBudget(share=0.5), MemoryBudget(device=2**20)):
        assert Tracker(shared_model, budget=budget).spacing == 1
        assert Tracker(shared_model, budget=budget, spacing=2).spacing == 2
    assert Tracker(shared_model, spacing=np.int64(3)).spacing == 3
    with pytest.raises(ValueError, match="spacing: expected at least 1, got 0"):
        Tracker(small_model, spacing=0)
    for wrong in ("2", 2.0, True):
        with pytest.raises(TypeError, match="spacing: expected a whole number"):
            Tracker(small_model, spacing=wrong)


def test_a_tracked_video_remembers_less_and_goes_on_the_same():
    model = STM.load(device="cpu", dtype="float32")
    frames, labels = procedural_clip(frames=7, size=(288, 384), objects=1, seed=3)
    held = {}
    for spacing in (1, 2):
        settings = {"memory": "first+every:2", "spacing": spacing}
        tracker, stopped = Tracker(model, **settings), Tracker(model, **settings)
        results = list(tracker.track(frames, {0: labels[0]}))
        held[spacing] = tracker.bank.summary()["positions_kept"]
        for _ in zip(range(4), stopped.track(frames, {0: labels[0]})):
            pass
        again = Tracker(model, **settings).track(frames, {0: labels[0]}, resume=stopped.state())
        for ours, true in zip(again, results[4:], strict=True):
            assert torch.equal(ours.probabilities, true.probabilities)
    assert held[2] < held[1] == 3 * 18 * 24
