"""Frames as the network sees them, and what wins each pixel."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from stm_model.tracking.frames import prepare_frame, winners_of

CPU = torch.device("cpu")


@pytest.fixture
def frame():
    coarse = torch.rand(1, 3, 9, 16, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, (90, 160), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)
    return (smooth * 255).round().to(torch.uint8).numpy()


def test_a_frame_of_the_networks_size_keeps_its_values(frame):
    given = frame.copy()
    for pixels in (frame, torch.from_numpy(frame), frame[:, ::-1], np.asfortranarray(frame)):
        image = prepare_frame(pixels, (90, 160), CPU)
        assert image.dtype == torch.float32 and image.is_contiguous()
        np.testing.assert_array_equal((image[0] * 255).round().permute(1, 2, 0).numpy(), np.asarray(pixels))
    np.testing.assert_array_equal(frame, given)


@pytest.mark.parametrize("size", [(45, 80), (30, 54), (120, 213)])
def test_a_resized_frame_is_that_in_floating_point_to_a_level(frame, size):
    exact = torch.from_numpy(frame).permute(2, 0, 1)[None].double() / 255
    exact = F.interpolate(exact, size, mode="bilinear", align_corners=False, antialias=True)
    found = prepare_frame(frame, size, CPU)
    assert found.shape == (1, 3, *size)
    # rounded once along rows and once along columns, by half a level at most
    assert (found - exact).abs().max() <= 1.01 / 255


@pytest.mark.parametrize("objects", [1, 2, 5])
def test_the_largest_wins_and_the_first_of_equals(objects):
    probabilities = torch.rand(objects + 1, 20, 30, generator=torch.Generator().manual_seed(objects))
    probabilities[:, :5] = 0.25
    winners = winners_of(probabilities)
    assert winners.dtype == np.uint8
    np.testing.assert_array_equal(winners, probabilities.numpy().argmax(0))
    assert not winners[:5].any()
