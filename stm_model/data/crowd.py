"""Clips with more on them: the objects of other clips, and look-alikes that move by themselves.

Look-alikes are cut-outs: either a twin of an object that the clip follows, as it looks in every frame, or an instance
of a still image. They cross others, leave the view and come back. Which are followed, and how they move, is drawn: what
looks alike can be told apart by where it was alone.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from stm_model.data.augment import large_objects, paste_objects, random_color, visible_objects
from stm_model.data.clips import Clip, SeededClips, generator
from stm_model.data.images import LabelledImage
from stm_model.io.images import MediaError

TWIN = 0.5
"""Share of the cut-outs that are twins of a followed object; the rest are instances of images."""
FOLLOWED = 0.5
"""Share of the copies that are followed."""
TWICE = 0.5
"""Share of the instances that are pasted twice."""
IN_FRONT = 0.6
"""Share of the copies that hide the objects of the clip; the rest pass behind them."""
SMALLEST = 0.06
"""Size of the smallest instances, of the clip's height."""


class CollageClips(SeededClips):
    """Clips of one dataset, some with the objects of another's clips pasted on."""

    def __init__(
        self, clips: Dataset, objects: Dataset, paste: float = 0.35, distract: float = 0.15, replace: float = 0.15
    ):
        """Clips `clips`, on some of which objects of clips `objects` are pasted, of the same frames and size.

        Args:
            paste: share of clips with further objects to follow, in front of or behind their own.
            distract: share of clips with further objects that are not to be followed.
            replace: share of clips of which only the background stays, for the pasted objects alone to be followed.
        """
        shares = (paste, distract, replace)
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(f"paste, distract, replace: expected shares with a sum of at most 1, got {shares}")
        self.clips, self.objects, self.shares = clips, objects, shares

    def __getitem__(self, seed: int) -> Clip:
        clip, random = self.clips[seed], generator(seed, 3)
        paste, distract, replace = self.shares
        draw = _chance(random)
        if draw >= paste + distract + replace:
            return clip
        # far from the seeds of the clips below, and as far on in the training
        other = self.objects[seed + 2**31]
        if draw >= paste + distract:
            clip = clip._replace(labels=torch.zeros_like(clip.labels))
        labelled = not paste <= draw < paste + distract
        return visible_objects(paste_objects(clip, other, random, labelled))


class CutOut(NamedTuple):
    """A picture to be pasted."""

    layers: Tensor
    """`[T or 1, 4, h, w]` float: colors in 0…1 and the mask."""
    centers: Tensor
    """`[T or 1, 2]` the middle of the mask, x and y in pixels."""
    scale: float
    """Pixels of the clip for one of the picture."""


class CrowdClips(SeededClips):
    """Clips of one dataset, some with cut-outs on them.

    Args:
        images: where instances are cut out; without, there are twins alone.
        share: of the clips that get cut-outs.
        most_objects: objects of a clip; further ones become background.
        color: strength of the change of an instance's colors, see `random_color`.
    """

    def __init__(
        self,
        clips: Dataset,
        images: Sequence[LabelledImage],
        share: float,
        most_objects: int = 5,
        color: float = 0.3,
    ):
        self.clips, self.images, self.share = clips, images, share
        self.most_objects, self.color = most_objects, color

    def __getitem__(self, seed: int) -> Clip:
        clip, random = self.clips[seed], generator(seed, 5)
        problems: list[str] = []
        for _ in range(_whole(random, 1, 3) if _chance(random) < self.share else 0):
            try:
                cut_out, copies = self._draw(clip, random)
            except MediaError as error:
                problems.append(str(error))
                continue
            if cut_out is not None:
                clip = _paste_copies(clip, cut_out, copies, random)
        clip = clip._replace(unreadable=(*clip.unreadable, *problems))
        return visible_objects(clip, max(32, clip.labels[0].numel() // 1000), self.most_objects)

    def _draw(self, clip: Clip, random: torch.Generator) -> tuple[CutOut | None, int]:
        """A cut-out, None if nothing can be cut out, and how often it is pasted."""
        if clip.objects and (not self.images or _chance(random) < TWIN):
            return twin(clip, random), 1
        if not self.images:
            return None, 0
        image, size = self.images[_whole(random, 0, len(self.images) - 1)], (clip.labels.shape[1], clip.labels.shape[2])
        return instance(image, size, random, self.color), 1 + (_chance(random) < TWICE)


def twin(clip: Clip, random: torch.Generator) -> CutOut | None:
    """An object of the first frame as it looks in every frame, or in the reversed order."""
    masks = clip.labels == _whole(random, 1, clip.objects)
    seen = masks.flatten(1).any(1)
    if not seen[0]:
        return None
    # where the object is hidden its twin shows what it showed last
    last = torch.tensor([max(index for index in range(time + 1) if seen[index]) for time in range(len(seen))])
    if _chance(random) < 0.5:
        last = last.flip(0)
    frames, masks = clip.frames[last], masks[last]
    scale = 1.0 if _chance(random) < 0.5 else math.exp(_between(random, -0.3, 0.3))
    return CutOut(torch.cat([frames, masks[:, None].float()], 1), _middles(masks), scale)


def instance(image: LabelledImage, size: tuple[int, int], random: torch.Generator, color: float) -> CutOut | None:
    """One of the instances of an image, a twentieth to half of a view high; None without a large one."""
    frame, drawn = image.load()
    labels = torch.from_numpy(drawn)
    large = large_objects(labels, 0.002 * labels.numel())
    if len(large) == 0:
        return None
    mask = labels == large[_whole(random, 0, len(large) - 1)]
    rows, columns = (torch.nonzero(mask.any(axis))[:, 0] for axis in (1, 0))
    top, bottom, left, right = (int(edge) for edge in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1))
    picture = torch.from_numpy(frame[top:bottom, left:right]).permute(2, 0, 1).float()[None] / 255
    mask = mask[None, top:bottom, left:right]
    extent = math.sqrt((bottom - top) * (right - left))
    scale = size[0] * math.exp(_between(random, math.log(SMALLEST), math.log(0.6))) / extent
    if scale < 0.5:
        # averaged down first: sampled as it is, it would flicker
        smaller = max(1, round((bottom - top) * scale)), max(1, round((right - left) * scale))
        picture = F.interpolate(picture, smaller, mode="area")
        mask = F.interpolate(mask[None].float(), smaller, mode="nearest-exact")[0] > 0.5
        scale = 1.0
    if not mask.any():
        return None
    picture = random_color(picture, random, color)
    return CutOut(torch.cat([picture, mask[:, None].float()], 1), _middles(mask), scale)


def _middles(masks: Tensor) -> Tensor:
    """Middle of each mask `[T, h, w]` as x and y in pixels: `[T, 2]`."""
    ys, xs = torch.arange(masks.shape[1]).float(), torch.arange(masks.shape[2]).float()
    weight = masks.flatten(1).sum(1).clamp(min=1)
    return torch.stack([(masks.sum(1) * xs).sum(1) / weight, (masks.sum(2) * ys).sum(1) / weight], 1) + 0.5


def _paste_copies(clip: Clip, cut_out: CutOut, copies: int, random: torch.Generator) -> Clip:
    paths = random_paths(clip, copies, random)
    mirrors = 1.0 if _chance(random) < 0.7 else -1.0
    for path in paths:
        layers = move(cut_out, path, (clip.labels.shape[1], clip.labels.shape[2]), mirrors, random)
        label = clip.objects + 1 if _chance(random) < FOLLOWED else 0
        alpha, cover = layers[:, 3:], layers[:, 3] > 0.5
        if _chance(random) >= IN_FRONT:
            free = clip.labels == 0
            cover &= free
            alpha = alpha * free[:, None]
        labels = torch.where(cover, label, clip.labels).to(torch.uint8)
        clip = clip._replace(frames=torch.lerp(clip.frames, layers[:, :3], alpha), labels=labels)
    return clip


def random_paths(clip: Clip, copies: int, random: torch.Generator) -> list[Tensor]:
    """Where copies of a cut-out are in every frame: `[T, 2]` each, x and y in −1…1.

    They drift, change places with each other or cross an object of the clip, or leave the view and come back.
    """
    times = torch.linspace(0, 1, len(clip.frames))[:, None]
    start = torch.rand(copies, 2, generator=random) * 1.6 - 0.8
    draw = _chance(random)
    noise = 0.15 * torch.randn(copies, 2, generator=random)
    if draw < 0.4:
        end = start + 3 * noise
    elif copies == 2:
        end = start.flip(0) + noise
    else:
        end = 2 * _some_place(clip, random) - start + noise
    paths = [start[copy] + (end[copy] - start[copy]) * times for copy in range(copies)]
    if draw > 0.75:
        # out on one side in the middle of the clip
        turn = _between(random, 0, 2 * math.pi)
        away = 1.8 * torch.tensor([math.cos(turn), math.sin(turn)])
        hump = 4 * times * (1 - times)
        paths[0] = paths[0] * (1 - hump) + away * hump
    wobble = 0.03 * torch.randn(copies, len(times), 2, generator=random)
    return [path + step for path, step in zip(paths, wobble)]


def _some_place(clip: Clip, random: torch.Generator) -> Tensor:
    """The middle of an object of the first frame, or of the view without any."""
    if not clip.objects:
        return torch.zeros(2)
    middle = _middles(clip.labels[:1] == _whole(random, 1, clip.objects))[0]
    return 2 * middle / torch.tensor([clip.labels.shape[2], clip.labels.shape[1]]) - 1


def move(cut_out: CutOut, path: Tensor, size: tuple[int, int], mirror: float, random: torch.Generator) -> Tensor:
    """A cut-out seen along a path, `[T, 4, H, W]`; it turns, grows and bends a little while it moves."""
    count = len(path)
    angle = _between(random, -0.2, 0.2) + 0.15 * torch.randn(count, generator=random).cumsum(0)
    zoom = cut_out.scale * torch.exp(0.08 * torch.randn(count, generator=random).cumsum(0))
    stretch = torch.exp(0.06 * torch.randn(count, generator=random).cumsum(0))
    extent = torch.tensor([size[1], size[0]], dtype=torch.float32)
    source = torch.tensor([cut_out.layers.shape[-1], cut_out.layers.shape[-2]], dtype=torch.float32)
    cos, sin = torch.cos(angle), torch.sin(angle)
    # from offsets in the view to offsets in the picture, in pixels
    linear = torch.stack([torch.stack([mirror * cos, mirror * sin], -1), torch.stack([-sin, cos], -1)], -2)
    linear = linear / zoom[:, None, None]
    linear[:, 0] = linear[:, 0] * stretch[:, None]
    normalized = linear * (extent / 2) / (source / 2)[:, None]
    offset = 2 * cut_out.centers / source - 1 - torch.einsum("tij,tj->ti", normalized, path)
    theta = torch.cat([normalized, offset[:, :, None]], -1)
    grid = F.affine_grid(theta, [count, 4, *size], align_corners=False)
    return F.grid_sample(cut_out.layers.expand(count, -1, -1, -1), grid, align_corners=False)


def _chance(random: torch.Generator) -> float:
    return float(torch.rand((), generator=random))


def _between(random: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * _chance(random)


def _whole(random: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=random))
