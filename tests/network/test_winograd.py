"""A convolution by Winograd's filtering is the plain one, within what its own roundings allow."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from stm_model import STM
from stm_model.network import for_inference, winograd
from stm_model.network.winograd import WinogradConvolution, is_fast


def bound(fast: WinogradConvolution, bias: torch.Tensor, x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """The greatest error of float32 sums in any order, `total` added: every factor by its size, the number of roundings
    in a row.
    """
    eps = torch.finfo(torch.float32).eps
    tiles, results = fast.to_tiles.double().abs(), fast.to_results.double().abs()
    filters = fast.weight.double().abs()
    largest = F.max_pool2d(x.double().abs(), 11, 1, 5).amax(1, keepdim=True)
    gain = (results @ (tiles.sum(1)[:, None] * filters.sum(1))).amax(0)
    roundings = 9 + tiles.shape[1] + filters.shape[1] + results.shape[1] + 4
    return roundings * eps * (gain.view(1, -1, 1, 1) * largest + bias.abs().view(1, -1, 1, 1) + total.abs())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 2),
    st.integers(1, 14),
    st.integers(1, 11),
    st.sampled_from([(1, 1), (3, 5), (8, 2)]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 40_000),
)
def test_equals_the_plain_one(batch, height, width, channels, relu, channels_last, strip_bytes):
    torch.manual_seed(0)
    convolution = nn.Conv2d(*channels, 3, padding=1)
    fast = WinogradConvolution(convolution, relu)
    x = torch.randn(batch, channels[0], height, width)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    total = torch.randn(batch, channels[1], height, width).contiguous(memory_format=torch.channels_last)
    truth = F.conv2d(x.double(), convolution.weight.double(), convolution.bias.double(), padding=1)
    onto = truth + total
    allowed = bound(fast, convolution.bias, x, total)
    assert allowed.max() < 0.01
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "STRIP_BYTES", strip_bytes)
        out, summed = fast(x), fast.onto(x, total)
    assert summed is total
    assert ((out - (truth.relu() if relu else truth)).abs() <= allowed).all()
    assert ((summed - (onto.relu() if relu else onto)).abs() <= allowed).all()


def test_its_error_is_of_the_order_of_the_plain_one():
    torch.manual_seed(0)
    convolution = nn.Conv2d(256, 128, 3, padding=1)
    assert is_fast(convolution)
    x = torch.randn(1, 256, 30, 54)
    truth = F.conv2d(x.double(), convolution.weight.double(), convolution.bias.double(), padding=1)
    with torch.inference_mode():
        error = WinogradConvolution(convolution)(x) - truth
    # what a plain sum of 2304 products would have if every partial sum were as large as the result, rounded at random
    plain = 2304**0.5 * torch.finfo(torch.float32).eps * truth.square().mean().sqrt()
    assert error.square().mean().sqrt() <= plain


def test_threads_share_the_strips(monkeypatch):
    torch.manual_seed(0)
    fast = WinogradConvolution(nn.Conv2d(16, 16, 3, padding=1), relu=True)
    x = torch.randn(3, 16, 37, 21)
    monkeypatch.setattr(winograd, "STRIP_BYTES", 1)
    before = torch.get_num_threads()
    try:
        with torch.inference_mode():
            torch.set_num_threads(1)
            alone = fast(x)
            torch.set_num_threads(3)
            shared = fast(x)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(shared, alone)


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(256, 256, 3, stride=2, padding=1),
        nn.Conv2d(256, 256, 3),
        nn.Conv2d(256, 256, 3, padding=2, dilation=2),
        nn.Conv2d(256, 256, 1, padding=1),
        nn.Conv2d(256, 256, 3, padding=1, groups=256),
        nn.Conv2d(128, 128, 3, padding=1),
        nn.Conv2d(256, 256, 3, padding=1, dtype=torch.bfloat16),
    ],
)
def test_other_convolutions_stay_plain(convolution):
    assert not is_fast(convolution)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_the_released_shape_has_them_and_gives_the_same():
    torch.manual_seed(0)
    model = STM().eval()
    fast = for_inference(model)
    found = [name for name, module in fast.named_modules() if isinstance(module, WinogradConvolution)]
    # five of a stage at 1/16, keys and values of both encoders; all of the decoder but what predicts
    assert len([name for name in found if "Decoder" in name]) == 13
    assert len(found) == 13 + 2 * 5 + 4
    # four times what the filters take
    filters = [fast.get_submodule(name).weight.nbytes for name in found]
    assert round(sum(filters) / 1e6) == 444
    frames = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        truth, query = model.encode_query(frames), fast.encode_query(frames)
        for old, new in zip((truth.key, truth.value), (query.key, query.value)):
            assert (new - old).norm() <= 1e-5 * old.norm()
        old, new = (net.segment(truth.value, truth, [1]) for net in (model, fast))
    assert (new - old).norm() <= 1e-5 * old.norm()
