"""Convolutions in eight bits: exact integer arithmetic, on maps that are rounded to 255 steps of their range."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stm_model import STM, Tracker
from stm_model.data.aquarium import aquarium_clip
from stm_model.evaluation.metrics import region_similarity
from stm_model.network import for_inference, int8
from stm_model.network.int8 import RELU6_STEP, Bytes, Int8Convolution, Int8InvertedResidual, to_bytes
from stm_model.runtime import check_int8, default_dtype

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.onednn, "qconv2d_pointwise"), reason="this PyTorch has no convolutions in eight bits"
)
SHAPES = {
    "1x1": {"in_channels": 24, "out_channels": 40, "kernel_size": 1},
    "3x3": {"in_channels": 16, "out_channels": 24, "kernel_size": 3, "padding": 1},
    "3x3 strided": {"in_channels": 16, "out_channels": 24, "kernel_size": 3, "padding": 1, "stride": 2},
    "depthwise 5x5": {"in_channels": 32, "out_channels": 32, "kernel_size": 5, "padding": 2, "stride": 2, "groups": 32},
}


def channels_last(*size: int, low: float = -3.0, high: float = 5.0) -> torch.Tensor:
    return torch.empty(size).uniform_(low, high).to(memory_format=torch.channels_last)


def values(found: Bytes) -> torch.Tensor:
    return (found.data.double() - found.zero) * found.step


@pytest.mark.parametrize("low, high", [(-3.0, 5.0), (0.0, 7.0), (-4.0, -1.0), (2.0, 2.5), (0.0, 0.0), (-1e-3, 80.0)])
def test_a_map_is_rounded_to_its_nearest_step_and_zero_stays_zero(low, high):
    torch.manual_seed(0)
    x = channels_last(2, 16, 9, 11, low=low, high=high)
    if low <= 0 <= high:
        x[0, 0, 0, 0] = 0
    found = to_bytes(x)
    assert 0 <= found.zero <= 255
    # half a step, and what float32 rounds of numbers up to 255
    assert (values(found) - x).abs().max() <= found.step * (0.5 + 255 * torch.finfo(torch.float32).eps)
    assert (values(found)[x == 0] == 0).all()
    assert found.step <= max(x.max() - x.min(), x.abs().max()) / 254 + 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_a_convolution_is_that_of_the_rounded_numbers(shape):
    torch.manual_seed(1)
    convolution = nn.Conv2d(**SHAPES[shape])
    x = channels_last(2, convolution.in_channels, 14, 17)
    ours = Int8Convolution(convolution)
    weight = ours.weight.double() * ours.scale.double().view(-1, 1, 1, 1)
    assert (weight - convolution.weight).abs().max() <= ours.scale.max() * 0.5001
    settings = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    truth = F.conv2d(values(to_bytes(x)), weight, convolution.bias.double(), *settings)
    # the sums are whole numbers; what is left is rounding them to float32
    assert (ours(x) - truth).abs().max() <= 8 * torch.finfo(torch.float32).eps * truth.abs().max()


def test_relu6_is_what_bytes_can_hold():
    torch.manual_seed(2)
    convolution = nn.Conv2d(16, 32, 1)
    nn.init.normal_(convolution.weight, std=0.6)
    x = channels_last(1, 16, 12, 12)
    found = Int8Convolution(convolution, relu6=True)(x)
    truth = F.relu6(Int8Convolution(convolution)(x))
    assert (truth == 0).any() and (truth == 6).any()
    assert (values(found) - truth).abs().max() <= 0.5001 * RELU6_STEP


def test_weights_leave_room_where_sums_are_cut_off(monkeypatch):
    convolution = nn.Conv2d(16, 16, 1)
    monkeypatch.setattr(int8, "sums_are_exact", lambda: False)
    assert 2 * 255 * Int8Convolution(convolution).weight.int().abs().max() < 2**15
    monkeypatch.setattr(int8, "sums_are_exact", lambda: True)
    assert Int8Convolution(convolution).weight.int().abs().max() == 127


def test_another_size_and_another_range_of_the_input_are_computed_anew():
    torch.manual_seed(3)
    convolution = nn.Conv2d(16, 16, 3, padding=1)
    ours = Int8Convolution(convolution)
    for size, high in (((1, 16, 20, 20), 1.0), ((3, 16, 7, 9), 900.0), ((1, 16, 20, 20), 1e-3)):
        x = channels_last(*size, low=0, high=high)
        weight = ours.weight.float() * ours.scale.view(-1, 1, 1, 1)
        truth = F.conv2d(x, weight, convolution.bias, padding=1)
        assert (ours(x) - truth).abs().max() <= weight.abs().sum((1, 2, 3)).max() * high / 254


@pytest.fixture(scope="module")
def networks():
    return {name: STM.load(device="cpu", dtype=name) for name in ("float32", "int8")}


def test_only_what_is_compared_remembered_or_shown_stays_in_float32(networks):
    model = for_inference(networks["int8"])
    weights = {name.split(".")[-2] for name, weight in model.named_parameters() if weight.ndim == 4}
    assert weights == {"conv1", "Key", "Value", "guide8", "predict", "prior16", "prior8"}
    assert any(isinstance(module, Int8InvertedResidual) for module in model.modules())
    assert not any(isinstance(module, Int8Convolution) for module in networks["int8"].modules())


def test_masks_are_those_of_float32(networks):
    frames, labels = aquarium_clip(8)
    masks = {
        name: [result.labels for result in Tracker(model, size=240).track(frames, {0: labels[0]})]
        for name, model in networks.items()
    }
    found = [
        region_similarity(ours == label, truth == label)
        for ours, truth in zip(*masks.values(), strict=True)
        for label in np.unique(labels[0])[1:]
    ]
    assert min(found) >= 0.98 and not all(value == 1 for value in found)


def test_a_state_is_not_taken_over_by_another_number_format(networks):
    frames, labels = aquarium_clip(4)
    tracker = Tracker(networks["int8"], size=96)
    results = tracker.track(frames, {0: labels[0]})
    next(results), next(results)
    state = tracker.state()
    with pytest.raises(ValueError, match="int8"):
        Tracker(networks["float32"], size=96).track(frames, {0: labels[0]}, resume=state)
    again = Tracker(networks["int8"], size=96).track(frames, {0: labels[0]}, resume=state)
    for ours, other in zip(results, again, strict=True):
        assert np.array_equal(ours.labels, other.labels)


def test_what_cannot_run_in_eight_bits_is_refused(networks):
    with pytest.raises(ValueError, match="compiled: expected a network in floating point, got int8"):
        Tracker(networks["int8"], compiled=True)


@pytest.mark.parametrize("emulated", [True, False])
def test_a_format_that_the_processor_emulates_is_said(monkeypatch, emulated):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: not emulated)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        STM.load(device="cpu", dtype="bfloat16")
        STM.load(device="cpu", dtype="float32")
        assert default_dtype("cpu") == torch.float32 or not emulated
    assert ["emulates bfloat16" in str(one.message) for one in said] == [True] * emulated


def test_int8_needs_a_cpu():
    with pytest.raises(ValueError, match="dtype: int8 expected an x86 CPU, got cuda"):
        check_int8(torch.device("cuda"))
