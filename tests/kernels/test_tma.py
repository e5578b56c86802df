"""The read by tensor descriptors: in the interpreter where there is no GPU with a copy engine."""

import pytest
import torch

import stm_kernels.gpu.backward as backward
import stm_kernels.gpu.forward as forward
import stm_kernels.gpu.tma as tma
from stm_kernels.gpu.tma import has_descriptors
from stm_kernels.gpu.tuning import TMA_ARCHITECTURES, ForwardTiles, forward_tiles
from stm_kernels.testing import assert_exact, make_problem, read_by, results

KINDS = ["descriptor", "warp-specialized"]


@pytest.fixture
def launches(monkeypatch, device) -> list[str]:
    """Forward tiles that ask for descriptors, small enough for ragged edges on every side; the kinds launched."""
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("a GPU without a copy engine")
    launched = []

    def tiles(architecture, dtype, C, V, *, descriptors, **form):
        kind = KINDS[len(launched) % 2] if descriptors else "portable"
        return ForwardTiles(64, 32, 32, 4, 2, kind)

    def launch(affinity, memory_value, out, lse, tiles, positions_per_split):
        launched.append(tiles.kind)
        return tma.descriptor_launch(affinity, memory_value, out, lse, tiles, positions_per_split)

    monkeypatch.setattr(forward, "forward_tiles", tiles)
    monkeypatch.setattr(forward, "descriptor_launch", launch)
    return launched


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", [(2, 70, 90, 32, 48), (1, 33, 130, 40, 72), (2, 1, 5, 16, 16), (1, 64, 64, 64, 32)])
def test_exact_at_ragged_sizes(launches, device, dtype, sizes):
    for _ in KINDS:
        assert_exact(make_problem(*sizes, dtype=dtype, device=device), read_by("triton"), gradients=False)
    assert launches == KINDS


def test_splits(monkeypatch, launches, device):
    monkeypatch.setattr(forward, "forward_splits", lambda *arguments: (3, 64))
    assert_exact(make_problem(3, 40, 190, 32, 48, device=device), read_by("triton"), gradients=False)
    assert launches == KINDS[:1]


@pytest.mark.parametrize("form", [{"biased": True}, {"ragged": True}], ids=str)
def test_hidden_positions_and_padding_go_by_pointers(launches, device, form):
    """TMA cannot leave out rows, and what is hidden may be NaN."""
    problem = make_problem(3, 40, 190, 32, 48, device=device, **form)
    if form == {"biased": True}:
        problem.memory_value[problem.key_bias.isneginf()] = torch.nan
    assert_exact(problem, read_by("triton"), gradients=False)
    assert launches == []


def test_squared_distances_go_by_descriptors(launches, device):
    """Their bias hides nothing, but a user's beside it may, and what follows `lengths` may be NaN."""
    problem = make_problem(3, 40, 190, 32, 48, device=device, similarity="l2")
    assert_exact(problem, read_by("triton"))
    assert launches == KINDS[:1]
    for form in ({"biased": True}, {"ragged": True}):
        problem = make_problem(3, 40, 190, 32, 48, device=device, similarity="l2", **form)
        if problem.key_bias is not None:
            problem.memory_value[problem.key_bias.isneginf()] = torch.nan
        assert_exact(problem, read_by("triton"), gradients=False)
    assert launches == KINDS[:1]


def test_squared_distances_copy_no_memory(monkeypatch, device):
    """Only what a bias may hide is replaced by zeros before a matrix product."""
    replaced = []
    visible = backward.visible
    monkeypatch.setattr(
        backward, "visible", lambda memory, part: replaced.append(part.hidden() is not None) or visible(memory, part)
    )
    for biased in (False, True):
        results(make_problem(1, 20, 70, 16, 24, similarity="l2", biased=biased, device=device), read_by("triton"))
    assert replaced == [False, True]


def test_what_a_copy_engine_cannot_fetch_goes_by_pointers(launches, device):
    for channels in (6, 20):
        # rows of 12 or 40 bytes
        problem = make_problem(1, 40, 70, channels, 32, dtype=torch.float16, device=device)
        assert_exact(problem, read_by("triton"), gradients=False)
    problem = make_problem(1, 40, 70, 32, 32, device=device, channel_major=True)
    assert_exact(problem, read_by("triton"), gradients=False)
    assert launches == []


def test_has_descriptors():
    tensor = torch.zeros(2, 6, 16, dtype=torch.float16)
    assert has_descriptors(tensor, tensor[:, 2:], tensor[:, ::2], tensor[:, :, 8:])
    odd = torch.zeros(2, 6, 20, dtype=torch.float16)
    for wrong in (odd, tensor.mT, tensor[:, :, 1:], tensor[:1].expand(2, -1, -1), tensor[:, :, ::2]):
        assert not has_descriptors(tensor, wrong)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942", "gfx1100", "interpreter"])
def test_only_some_architectures_ask_for_descriptors(architecture):
    for dtype in (torch.bfloat16, torch.float32):
        for skips in (False, True):
            asked = forward_tiles(architecture, dtype, 128, 512, skips=skips, descriptors=True).kind == "descriptor"
            assert asked == (architecture in TMA_ARCHITECTURES and dtype == torch.bfloat16 and not skips)
            assert forward_tiles(architecture, dtype, 128, 512, skips=skips).kind == "portable"
