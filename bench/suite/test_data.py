"""What stands beside the network: the measures and the augmentation of clips."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.ndimage import binary_dilation
from torch import Tensor
from torch.nn import functional as F

from stm_model.data.augment import _object_center, _view_matrices, random_view, thin_plate_field
from stm_model.data.clips import Clip, generator
from stm_model.data.synthetic import procedural_clip
from stm_model.evaluation.metrics import contour_accuracy


def contour(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from the next one to the right, below, or both; the mask goes on past its edge."""
    wide = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ wide[:-1, 1:]) | (mask ^ wide[1:, :-1]) | (mask ^ wide[1:, 1:])


def published_contour_accuracy(prediction: np.ndarray, truth: np.ndarray) -> float:
    """F by growing whole contours by a disk, as the measure is published (Perazzi et al., CVPR 2016)."""
    reach = math.ceil(0.008 * np.linalg.norm(truth.shape))
    offsets = np.arange(-reach, reach + 1)
    disk = offsets[:, None] ** 2 + offsets**2 <= reach**2
    predicted, true = contour(prediction), contour(truth)
    precision = (predicted & binary_dilation(true, disk)).sum() / predicted.sum()
    recall = (true & binary_dilation(predicted, disk)).sum() / true.sum()
    return 2 * precision * recall / (precision + recall)


def test_contour_accuracy(race: Callable) -> None:
    """F of a 480p mask against the one two frames later."""
    _, labels = procedural_clip(5, (480, 854), 2, seed=0)
    pairs = [(labels[index + 2] == 1, labels[index] == 1) for index in range(3)]
    for pair in pairs:
        assert abs(contour_accuracy(*pair) - published_contour_accuracy(*pair)) <= 1e-9
    race(
        lambda: [contour_accuracy(*pair) for pair in pairs],
        lambda: [published_contour_accuracy(*pair) for pair in pairs],
        9,
        20,
    )


def naive_view(frames: Tensor, labels: Tensor, size: tuple[int, int], random: torch.Generator) -> Clip:
    """The view of `random_view` frame by frame, the deformation solved for every pixel."""
    theta = _view_matrices(len(frames), tuple(frames.shape[-2:]), size, _object_center(labels[0], random), random, 1.0)
    axis = torch.tensor([-0.8, 0.0, 0.8])
    points = torch.cartesian_prod(axis, axis)
    steps = 0.05 * torch.randn(len(frames), len(points), 2, generator=random)
    steps[0] = 0
    views = []
    for frame, mask, matrix, shifts in zip(frames, labels, theta, steps.cumsum(0), strict=True):
        grid = F.affine_grid(torch.eye(2, 3)[None], [1, 3, *size], align_corners=False)
        grid = grid + thin_plate_field(points, shifts[None], grid[0])
        grid = grid @ matrix[:, :2].T + matrix[:, 2]
        view = F.grid_sample(frame[None], grid, padding_mode="reflection", align_corners=False).clamp_(0, 1)
        seen = F.grid_sample(mask[None, None].float(), grid, mode="nearest", align_corners=False)
        views.append((view[0], seen[0, 0].to(torch.uint8)))
    return Clip(*(torch.stack(parts) for parts in zip(*views)))


def test_augmentation(race: Callable) -> None:
    """A clip of 8 frames through a random, bending view."""
    frames, labels = procedural_clip(8, (240, 432), 2, seed=0)
    frames = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(labels)

    def ours() -> Clip:
        return random_view(frames, labels, (192, 192), generator(0), jitter=1.0, bend=1.0)

    def naive() -> Clip:
        return naive_view(frames, labels, (192, 192), generator(0))

    # a field of every eighth pixel, interpolated, is not the field of every pixel: a few hundredths of a pixel off
    assert (ours().frames - naive().frames).abs().mean() <= 0.01
    assert (ours().labels != naive().labels).float().mean() <= 0.01
    race(ours, naive, 15, 1.0)
