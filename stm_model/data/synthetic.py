"""Procedural clips: textured shapes move, deform and occlude each other under a moving camera; the masks are exact."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stm_model.data.augment import renumbered
from stm_model.data.clips import Clip, SeededClips


def procedural_clip(
    frames: int = 24, size: tuple[int, int] = (240, 432), objects: int = 2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a continuous clip of moving textured objects.

    Args:
        frames: T, number of frames.
        size: height and width in pixels.
        objects: how many labelled objects; one more shape moves unlabelled in front of or behind them.
        seed: the clip is a function of the seed and the other arguments.

    Returns:
        Frames uint8 `[T, H, W, 3]` and labels uint8 `[T, H, W]`, 0 for background, 1…objects.
    """
    clip = ProceduralClips(frames, size, (objects, objects), step=1.0)[seed]
    pixels = (clip.frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return pixels.contiguous().numpy(), clip.labels.numpy()


class ProceduralClips(SeededClips):
    """An endless dataset of procedural clips; item i is drawn from seed i."""

    def __init__(
        self,
        frames: int = 3,
        size: tuple[int, int] = (192, 192),
        objects: tuple[int, int] = (1, 2),
        step: float | None = None,
    ):
        """
        Args:
            frames: T, frames per clip.
            size: height and width in pixels.
            objects: least and greatest number of labelled objects.
            step: video frames between two frames of the clip; None draws 1…6 per clip.
        """
        self.frames, self.size, self.objects, self.step = frames, size, objects, step

    def __getitem__(self, seed: int) -> Clip:
        random = torch.Generator().manual_seed(seed)
        count = int(torch.randint(self.objects[0], self.objects[1] + 1, (), generator=random))
        step = self.step if self.step is not None else float(torch.randint(1, 7, (), generator=random))
        times = torch.arange(self.frames) * step
        scene = _draw_background(times, self.size, random)
        labels = torch.zeros(self.frames, *self.size, dtype=torch.uint8)
        # the last shape is nobody's object: a distractor that also occludes
        order = torch.randperm(count + 1, generator=random).tolist()
        for index in order:
            picture, mask = _draw_shape(times, self.size, random)
            scene = torch.lerp(scene, picture, mask[:, None])
            labels[mask > 0.5] = index + 1 if index < count else 0
        light = 1 + 0.004 * _uniform(random, -1, 1) * times
        scene = scene * light.view(-1, 1, 1, 1) + 0.02 * torch.randn(scene.shape, generator=random)
        # objects that are hidden in the first frame are forgotten
        visible = labels[0].unique()
        return Clip(scene.clamp_(0, 1), renumbered(labels, visible[visible > 0]))


def _uniform(random: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.rand(shape, generator=random) * (high - low) + low


def _texture(random: torch.Generator, size: int = 128) -> Tensor:
    """A random coloured texture `[3, size, size]`: octaves of noise, sometimes stripes, over two or three colours."""
    roughness = float(_uniform(random, 0.35, 0.8))
    octaves = torch.zeros(1, 3, size, size)
    for level in range(2, 7):
        noise = torch.randn(1, 3, 2**level, 2**level, generator=random)
        octaves += roughness**level * F.interpolate(noise, size=(size, size), mode="bilinear", align_corners=False)
    octaves = (octaves[0] - octaves.mean()) / octaves.std()
    if float(_uniform(random, 0, 1)) < 0.4:
        angle, frequency = float(_uniform(random, 0, math.pi)), float(_uniform(random, 0.05, 0.5))
        axis = torch.arange(size).float()
        wave = torch.sin(frequency * (axis[:, None] * math.sin(angle) + axis * math.cos(angle)) + octaves[0])
        octaves = 0.5 * octaves + wave
    blend = torch.sigmoid(octaves[:1] * 1.5)
    dark, bright = _uniform(random, 0, 1, 3, 1, 1), _uniform(random, 0, 1, 3, 1, 1)
    tint = float(_uniform(random, 0, 0.15))
    return (torch.lerp(dark, bright, blend) + tint * octaves).clamp(0, 1)


def _path(times: Tensor, random: torch.Generator, speed: float, spread: float) -> Tensor:
    """A smooth path `[T, 2]`: a start, a constant velocity and a slow oscillation, in units of half a frame."""
    start = _uniform(random, -spread, spread, 2)
    velocity = speed * torch.randn(2, generator=random)
    phase, rate = _uniform(random, 0, 2 * math.pi, 2), _uniform(random, 0.02, 0.15, 2)
    sway = float(_uniform(random, 0, 0.12)) * (torch.sin(times[:, None] * rate + phase) - torch.sin(phase))
    return start + times[:, None] * velocity + sway


def _pose(times: Tensor, random: torch.Generator, turn: float, zoom: float) -> tuple[Tensor, Tensor]:
    """Angle in radians and relative scale over time, `[T]` each."""
    angle = float(_uniform(random, 0, 2 * math.pi)) + turn * torch.randn((), generator=random) * times
    scale = torch.exp(zoom * torch.randn((), generator=random) * times)
    return angle, scale


def _grid(size: tuple[int, int]) -> Tensor:
    """Pixel coordinates `[H, W, 2]` as (x, y), y in −1…1 and x in the same unit."""
    height, width = size
    y = torch.linspace(-1, 1, height)
    x = torch.linspace(-1, 1, width) * (width / height)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


def _to_local(grid: Tensor, path: Tensor, angle: Tensor, scale: Tensor) -> Tensor:
    """Frame coordinates seen from a moving, turning, growing body: `[T, H, W, 2]`."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    rotation = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2) / scale[:, None, None]
    return torch.einsum("tij,thwj->thwi", rotation, grid[None] - path[:, None, None])


def _draw_background(times: Tensor, size: tuple[int, int], random: torch.Generator) -> Tensor:
    """A textured plane under a moving camera, `[T, 3, H, W]`."""
    angle, scale = _pose(times, random, turn=0.003, zoom=0.003)
    local = _to_local(_grid(size), _path(times, random, speed=0.015, spread=0.3), angle, scale)
    return _sample(_texture(random, 256), local * float(_uniform(random, 0.15, 0.45)))


def _draw_shape(times: Tensor, size: tuple[int, int], random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A textured star-shaped body with a wobbling outline: picture `[T, 3, H, W]` and soft mask `[T, H, W]`."""
    angle, scale = _pose(times, random, turn=0.02, zoom=0.008)
    aspect = size[1] / size[0]
    path = _path(times, random, speed=0.025, spread=0.6) * torch.tensor([aspect, 1.0])
    local = _to_local(_grid(size), path, angle, scale)
    stretch = float(_uniform(random, 0.5, 1.0))
    radius, theta = (
        torch.linalg.vector_norm(local / torch.tensor([1.0, stretch]), dim=-1),
        torch.atan2(local[..., 1] / stretch, local[..., 0]),
    )
    outline = torch.full_like(radius, float(_uniform(random, 0.15, 0.55)))
    for harmonic in range(2, 7):
        amplitude = float(_uniform(random, 0, 0.5)) / harmonic
        wobble = float(_uniform(random, 0, 0.15)) * times + float(_uniform(random, 0, 2 * math.pi))
        outline = outline * (1 + amplitude * torch.cos(harmonic * theta + wobble.view(-1, 1, 1)))
    mask = ((outline - radius) * size[0] / 2 + 0.5).clamp_(0, 1)
    picture = _sample(_texture(random), local * float(_uniform(random, 0.4, 1.2)))
    shade = 1 - 0.5 * float(_uniform(random, 0, 1)) * (radius / outline).clamp(0, 1) ** 3
    return picture * shade[:, None], mask


def _sample(texture: Tensor, coordinates: Tensor) -> Tensor:
    textures = texture[None].expand(len(coordinates), -1, -1, -1)
    return F.grid_sample(textures, coordinates, padding_mode="reflection", align_corners=False)
