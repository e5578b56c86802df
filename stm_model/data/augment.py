"""Augmentation of clips: geometry shared by frames and labels, colour shared over time."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from stm_model.data.clips import Clip


def random_view(
    frames: Tensor, labels: Tensor, size: tuple[int, int], random: torch.Generator, jitter: float = 0.0
) -> Clip:
    """Look at a clip through a random crop, turn, scale and flip; the same for all frames up to `jitter`.

    Args:
        frames: `[T, 3, H, W]` float32 in 0…1.
        labels: `[T, H, W]` uint8.
        size: height and width of the result in pixels.
        random: source of randomness.
        jitter: strength of an additional smooth motion between frames, 0 for none; 1 turns a still image into a clip
            that moves like a hand-held video.

    Returns:
        A clip of the given size. The crop keeps the objects of the first frame in view.
    """
    height, width = frames.shape[-2:]
    center = _object_center(labels[0], random)
    theta = _view_matrices(len(frames), (height, width), size, center, random, jitter)
    grid = F.affine_grid(theta, [len(frames), 3, *size], align_corners=False)
    viewed = F.grid_sample(frames, grid, padding_mode="reflection", align_corners=False)
    seen = F.grid_sample(labels[:, None].float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return Clip(viewed.clamp_(0, 1), seen[:, 0].to(torch.uint8))


def _object_center(labels: Tensor, random: torch.Generator) -> Tensor:
    """A point near the objects, as (x, y) in −1…1; the middle where there are none."""
    ys, xs = torch.nonzero(labels, as_tuple=True)
    if len(xs) == 0:
        return torch.zeros(2)
    pick = int(torch.randint(len(xs), (), generator=random))
    pixel = torch.stack([xs[pick], ys[pick]]).float()
    extent = torch.tensor([labels.shape[1], labels.shape[0]])
    return (2 * pixel + 1) / extent - 1


def _view_matrices(
    count: int,
    source: tuple[int, int],
    size: tuple[int, int],
    center: Tensor,
    random: torch.Generator,
    jitter: float,
) -> Tensor:
    """Affine matrices `[T, 2, 3]` from the view to the source, in grid_sample's coordinates."""

    def draw(scale: float) -> Tensor:
        steps = torch.randn(count, generator=random) * scale * jitter
        steps[0] = torch.randn((), generator=random) * scale
        return steps.cumsum(0)

    angle = draw(math.radians(8))
    zoom = torch.exp(draw(0.15))
    shear = draw(0.08)
    # pixels of the source per pixel of the view, so that the view is never far larger than the source
    fit = min(source[0] / size[0], source[1] / size[1])
    pixels = fit * (0.55 + 0.6 * torch.rand((), generator=random)) * zoom
    mirror = -1.0 if torch.rand((), generator=random) < 0.5 else 1.0
    cos, sin = torch.cos(angle), torch.sin(angle)
    linear = torch.stack([torch.stack([mirror * cos, shear - sin], -1), torch.stack([mirror * sin, cos], -1)], -2)
    to_source = torch.tensor([1 / source[1], 1 / source[0]])[:, None] * torch.tensor([size[1], size[0]])
    linear = linear * pixels[:, None, None] * to_source
    reach = (linear[0].abs().sum(1)).clamp(max=1.0)
    offset = (center + (torch.rand(2, generator=random) - 0.5) * 1.2 * reach).clamp(reach - 1, 1 - reach)
    drift = torch.stack([draw(0.06), draw(0.06)], -1)
    return torch.cat([linear, (offset + drift - drift[0])[:, :, None]], -1)


def random_color(frames: Tensor, random: torch.Generator, strength: float = 0.3) -> Tensor:
    """Brightness, contrast, saturation and tint of a clip `[T, 3, H, W]`, the same in all frames."""

    def factor() -> Tensor:
        return 1 + strength * (2 * torch.rand((), generator=random) - 1)

    grey = frames.mean(1, keepdim=True)
    saturation = 0.0 if torch.rand((), generator=random) < 0.05 else factor()
    frames = grey + (frames - grey) * saturation
    mean = frames.mean()
    frames = mean + (frames - mean) * factor()
    tint = 1 + 0.3 * strength * (2 * torch.rand(3, 1, 1, generator=random) - 1)
    return (frames * factor() * tint).clamp_(0, 1)


def paste_objects(clip: Clip, other: Clip, random: torch.Generator) -> Clip:
    """Put the objects of `other` in front of or behind those of `clip`, as further objects."""
    in_front = torch.rand((), generator=random) < 0.5
    cover = (other.labels > 0) & (torch.ones_like(other.labels, dtype=torch.bool) if in_front else clip.labels == 0)
    frames = torch.where(cover[:, None], other.frames, clip.frames)
    labels = torch.where(cover, other.labels + int(clip.labels.max()), clip.labels)
    return Clip(frames, labels)


def visible_objects(clip: Clip, least_pixels: int = 32) -> Clip:
    """Number the objects that are visible in the first frame 1…n; smaller and later ones become background."""
    count = torch.bincount(clip.labels[0].flatten().long(), minlength=256)
    kept = torch.nonzero(count[1:] >= least_pixels)[:, 0] + 1
    table = torch.zeros(256, dtype=torch.uint8)
    table[kept] = torch.arange(1, len(kept) + 1, dtype=torch.uint8)
    return Clip(clip.frames, table[clip.labels.long()])
