"""Augmentation of clips: geometry shared by frames and labels, colour and quality shared over time, objects of other
clips.
"""

import io
import math

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from stm_model.data.clips import Clip, SeededClips, generator
from stm_model.io.images import encode_jpeg, read_image
from stm_model.labels import VOID


def random_view(
    frames: Tensor,
    labels: Tensor,
    size: tuple[int, int],
    random: torch.Generator,
    jitter: float = 0.0,
    bend: float = 0.0,
) -> Clip:
    """Look at a clip through a random crop, turn, scale and flip; the same for all frames up to `jitter` and `bend`.

    Frames are `[T, 3, H, W]` float32 in 0…1, labels `[T, H, W]` uint8; the crop, of `size`, keeps the objects of the
    first frame in view. `jitter` is the strength of an additional smooth motion: 1 turns a still image into a clip that
    moves like a hand-held video. `bend` is that of a thin-plate deformation that grows from frame to frame.
    """
    frames, labels = _shrink(frames, labels, size)
    center = _object_center(labels[0], random)
    theta = _view_matrices(len(frames), (frames.shape[-2], frames.shape[-1]), size, center, random, jitter)
    grid = F.affine_grid(torch.eye(2, 3).expand_as(theta), [len(frames), 3, *size], align_corners=False)
    if bend:
        grid = grid + _random_bend(len(frames), size, random, bend)
    grid = torch.einsum("tij,thwj->thwi", theta[:, :, :2], grid) + theta[:, None, None, :, 2]
    viewed = F.grid_sample(frames, grid, padding_mode="reflection", align_corners=False)
    seen = F.grid_sample(labels[:, None].float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return Clip(viewed.clamp_(0, 1), seen[:, 0].to(torch.uint8))


def _shrink(frames: Tensor, labels: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Frames far larger than the view are averaged down first: sampled as they are, they would flicker."""
    factor = min(frames.shape[-2] // size[0], frames.shape[-1] // size[1])
    if factor < 2:
        return frames, labels
    shrunk = F.avg_pool2d(frames, factor)
    middle = labels[:, factor // 2 :: factor, factor // 2 :: factor]
    return shrunk, middle[:, : shrunk.shape[-2], : shrunk.shape[-1]]


def _object_center(labels: Tensor, random: torch.Generator) -> Tensor:
    """A point on one of the objects, each as likely as the others, as (x, y) in −1…1; the middle without objects."""
    objects = labels.unique()
    objects = objects[(objects > 0) & (objects < VOID)]
    if len(objects) == 0:
        return torch.zeros(2)
    label = objects[int(torch.randint(len(objects), (), generator=random))]
    ys, xs = torch.nonzero(labels == label, as_tuple=True)
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


def _random_bend(count: int, size: tuple[int, int], random: torch.Generator, strength: float) -> Tensor:
    """A deformation `[T, H, W, 2]` that wanders over time, in units of half the view; none in the first frame."""
    axis = torch.tensor([-0.8, 0.0, 0.8])
    points = torch.cartesian_prod(axis, axis)
    steps = 0.05 * strength * torch.randn(count, len(points), 2, generator=random)
    steps[0] = 0
    # a smooth field needs few samples
    coarse = (math.ceil(size[0] / 8), math.ceil(size[1] / 8))
    identity = F.affine_grid(torch.eye(2, 3)[None], [1, 1, *coarse], align_corners=False)[0]
    field = thin_plate_field(points, steps.cumsum(0), identity)
    field = F.interpolate(field.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False)
    return field.permute(0, 2, 3, 1)


def thin_plate_field(points: Tensor, shifts: Tensor, positions: Tensor) -> Tensor:
    """The smoothest displacement, `[T, H, W, 2]` at positions `[H, W, 2]`, that moves control points by given shifts.

    Points are `[n, 2]`, not all on a line; shifts `[T, n, 2]`.

    Source: Bookstein 1989, thin-plate splines.
    """

    # half a second of imports
    from scipy.interpolate import RBFInterpolator

    moved = rearrange(shifts, "t n side -> n t side")
    spline = RBFInterpolator(points.numpy(), moved.numpy(), kernel="thin_plate_spline")
    field = torch.from_numpy(spline(positions.reshape(-1, 2).numpy())).float()
    return rearrange(field, "(h w) t side -> t h w side", h=len(positions))


def random_color(frames: Tensor, random: torch.Generator, strength: float = 0.3) -> Tensor:
    """Change brightness, contrast, saturation, hue and tint of a clip `[T, 3, H, W]`, the same in all frames."""
    if not strength:
        return frames

    def factor() -> Tensor:
        return 1 + strength * (2 * torch.rand((), generator=random) - 1)

    grey = frames.mean(1, keepdim=True)
    saturation = 0.0 if torch.rand((), generator=random) < 0.05 else factor()
    turn = _hue_rotation(strength * torch.randn((), generator=random))
    frames = grey + torch.einsum("ij,tjhw->tihw", turn, frames - grey) * saturation
    mean = frames.mean()
    frames = mean + (frames - mean) * factor()
    tint = 1 + 0.3 * strength * (2 * torch.rand(3, 1, 1, generator=random) - 1)
    return (frames * factor() * tint).clamp_(0, 1)


def random_degradation(frames: Tensor, random: torch.Generator) -> Tensor:
    """Frames `[T, 3, H, W]` as a small, compressed video has them: reduced up to threefold, saved as JPEG, enlarged."""
    height, width = frames.shape[-2:]
    draws = torch.rand(2, generator=random).tolist()
    factor, quality = 3 ** -draws[0], round(30 + 65 * draws[1])
    small = F.interpolate(frames, (round(height * factor), round(width * factor)), mode="area")
    pixels = (small.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    files = (io.BytesIO(encode_jpeg(frame, quality, "4:2:0")) for frame in pixels)
    saved = torch.from_numpy(np.stack([read_image(file) for file in files]))
    large = F.interpolate(saved.permute(0, 3, 1, 2).float() / 255, (height, width), mode="bicubic", align_corners=False)
    return large.clamp_(0, 1)


class DegradedClips(SeededClips):
    """Clips of one dataset, a share of which look like small, compressed video, see `random_degradation`."""

    def __init__(self, clips: Dataset, share: float):
        self.clips, self.share = clips, share

    def __getitem__(self, seed: int) -> Clip:
        clip, random = self.clips[seed], generator(seed, 7)
        if float(torch.rand((), generator=random)) >= self.share:
            return clip
        return clip._replace(frames=random_degradation(clip.frames, random))


def _hue_rotation(angle: Tensor) -> Tensor:
    """The rotation `[3, 3]` of colours about the grey axis by an angle in radians (Rodrigues' formula)."""
    cos, sin = torch.cos(angle), torch.sin(angle) / math.sqrt(3)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    return cos * torch.eye(3) + sin * cross + (1 - cos) / 3


def paste_objects(clip: Clip, other: Clip, random: torch.Generator, labelled: bool = True) -> Clip:
    """Put the objects of `other`, of the same T, H and W, in front of or behind those of `clip`.

    Not `labelled`, they are in front and part of the background: things that move and are not to be followed.
    """
    in_front = not labelled or bool(torch.rand((), generator=random) < 0.5)
    cover = (other.labels > 0) & (other.labels < VOID)
    if not in_front:
        cover &= clip.labels == 0
    # the edge of a picture is soft: a hard one would give the pasted object away
    alpha = F.avg_pool2d(cover[:, None].float(), 3, stride=1, padding=1, count_include_pad=False)
    alpha = torch.where(cover[:, None], alpha, 0)
    frames = torch.lerp(clip.frames, other.frames, alpha)
    further = other.labels + clip.objects if labelled else torch.zeros_like(other.labels)
    labels = torch.where(cover, further, clip.labels)
    return Clip(frames, labels, clip.unreadable + other.unreadable)


def random_region(size: tuple[int, int], random: torch.Generator) -> Tensor:
    """A random star-shaped region with a wobbly outline: bool `[H, W]`."""
    y = torch.linspace(-1, 1, size[0])[:, None]
    x = torch.linspace(-1, 1, size[1])[None] * (size[1] / size[0])
    uniform = torch.rand(16, generator=random)
    y, x = y - (1.2 * uniform[0] - 0.6), x - (1.2 * uniform[1] - 0.6) * (size[1] / size[0])
    turn, stretch = math.pi * uniform[2], 0.4 + 0.6 * uniform[3]
    along, across = x * torch.cos(turn) + y * torch.sin(turn), (y * torch.cos(turn) - x * torch.sin(turn)) / stretch
    angle, radius = torch.atan2(across, along), torch.hypot(along, across)
    outline = torch.full_like(radius, 0.2 + 0.45 * float(uniform[4]))
    for harmonic in range(2, 7):
        amplitude, phase = 0.8 * uniform[3 + harmonic] / harmonic, 2 * math.pi * uniform[8 + harmonic]
        outline = outline * (1 + amplitude * torch.cos(harmonic * angle + phase))
    return radius < outline


def renumbered(labels: Tensor, kept: Tensor) -> Tensor:
    """Labels in which the objects `kept` are 1…n, in this order, and all others background; void stays void."""
    table = torch.zeros(256, dtype=torch.uint8)
    table[kept.long()] = torch.arange(1, len(kept) + 1, dtype=torch.uint8)
    table[VOID] = VOID
    return table[labels.long()]


def large_objects(labels: Tensor, least_pixels: float) -> Tensor:
    """The objects of at least so many pixels in labels `[H, W]`, ascending."""
    counts = torch.bincount(labels.flatten().long(), minlength=256)
    return torch.nonzero(counts[1:VOID] >= least_pixels)[:, 0] + 1


def visible_objects(clip: Clip, least_pixels: int = 32, most: int = 254) -> Clip:
    """Number the objects that are visible in the first frame 1…n; smaller, later and further ones become background."""
    return clip._replace(labels=renumbered(clip.labels, large_objects(clip.labels[0], least_pixels)[:most]))


def followed_objects(clip: Clip, share: float, random: torch.Generator, least_share: float = 0.001) -> Clip:
    """Keep a random share of the objects that fill at least a thousandth of the first frame, one at least.

    The others become background, and the objects that are kept get their numbers in a random order.
    """
    large = large_objects(clip.labels[0], least_share * clip.labels[0].numel())
    order = large[torch.randperm(len(large), generator=random)]
    kept = order[: max(1, int((torch.rand(len(order), generator=random) < share).sum()))]
    return clip._replace(labels=renumbered(clip.labels, kept))
