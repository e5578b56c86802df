"""The two encoders: a frame with its masks becomes memory features, a frame alone becomes query features."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stm_model.network.backbones import BACKBONES


class FrameFeatures(NamedTuple):
    """Feature maps of frames, deepest first, with B frames."""

    stride16: Tensor
    stride8: Tensor
    stride4: Tensor


class Query(NamedTuple):
    """What is computed of B frames alone."""

    key: Tensor
    """`[B, C, H/16, W/16]`"""
    value: Tensor
    """`[B, D, H/16, W/16]`: what the decoder sees beside what is read, D = V; in the shared form what the memory
    encoder sees of the frame."""
    features: FrameFeatures
    """The maps the decoder refines with."""


class FrameTrunk(nn.Module):
    """Stem and stages that all encoders have; the names are those of the released checkpoint."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: str):
        super().__init__()
        parts = BACKBONES[backbone]
        self.conv1 = _stem_convolution(3, backbone)
        self.bn1 = nn.BatchNorm2d(parts.stem_channels, eps=parts.epsilon)
        self.relu = parts.activation(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if parts.pooled else nn.Identity()
        self.res2, self.res3, self.res4 = parts.stages()
        self.register_buffer("mean", torch.tensor(parts.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(parts.std).view(1, 3, 1, 1))

    def _stem(self, frames: Tensor) -> Tensor:
        normalized = (frames - self.mean.to(frames)).div_(self.std.to(frames))
        return self.conv1(normalized.to(self.conv1.weight.dtype))


def _stem_convolution(in_channels: int, backbone: str) -> nn.Conv2d:
    kernel = BACKBONES[backbone].stem_kernel
    return nn.Conv2d(in_channels, BACKBONES[backbone].stem_channels, kernel, stride=2, padding=kernel // 2, bias=False)


class QueryEncoder(FrameTrunk):
    """Features of frames alone, kept at three scales for the decoder."""

    def forward(self, frames: Tensor) -> FrameFeatures:
        """Encode frames `[B, 3, H, W]`, RGB in 0…1, H and W multiples of 16."""
        x = self.maxpool(self.relu(self.bn1(self._stem(frames))))
        stride4 = self.res2(x)
        stride8 = self.res3(stride4)
        return FrameFeatures(self.res4(stride8), stride8, stride4)


GUIDANCE = {"masks": ("conv1_m", "conv1_o"), "scribbles": ("conv1_m", "conv1_p", "conv1_n")}
"""What the memory encoder sees beside a frame, one channel and one convolution each: an object's mask with that of all
other objects, or with the object's positive and negative scribbles.
"""


class MemoryEncoder(FrameTrunk):
    """Features of frames seen together with what is known of one object."""

    def __init__(self, backbone: str, guidance: str):
        super().__init__(backbone)
        self.guides = GUIDANCE[guidance]
        for name in self.guides:
            self.add_module(name, _stem_convolution(1, backbone))

    def forward(self, frames: Tensor, guides: Tensor, objects_per_clip: list[int]) -> Tensor:
        """Encode frames `[B, 3, H, W]` with maps `[K, number of guides, H, W]` to `[K, D, H/16, W/16]`.

        The K objects belong to the B frames in order, `objects_per_clip` each.
        """
        weight = torch.cat([self.get_parameter(f"{name}.weight") for name in self.guides], 1)
        x = F.conv2d(guides.to(weight.dtype), weight, stride=2, padding=self.conv1.padding)
        x += per_object(self._stem(frames), objects_per_clip)
        return self.res4(self.res3(self.res2(self.maxpool(self.relu(self.bn1(x))))))


class KeyValue(nn.Module):
    """Key and value of every position of a feature map, by one 3×3 convolution each."""

    def __init__(self, in_channels: int, key_channels: int, value_channels: int):
        super().__init__()
        self.Key = nn.Conv2d(in_channels, key_channels, 3, padding=1)
        self.Value = nn.Conv2d(in_channels, value_channels, 3, padding=1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.Key(features), self.Value(features)


def per_object(maps: Tensor, objects_per_clip: list[int]) -> Tensor:
    """Repeat per-frame maps `[B, …]` for the objects of each frame, `[K, …]`.

    A single frame is not copied: it stays `[1, …]` and broadcasts; nor are frames with one object each.
    """
    if len(maps) == 1 or set(objects_per_clip) == {1}:
        return maps
    counts = torch.tensor(objects_per_clip, device=maps.device)
    return maps.repeat_interleave(counts, 0, output_size=sum(objects_per_clip))
