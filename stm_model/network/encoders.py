"""The two encoders: a frame with its masks becomes memory features, a frame alone becomes query features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stm_model.network.resnet import build_stages


class FrameFeatures(NamedTuple):
    """Feature maps of frames, deepest first, with B frames."""

    stride16: Tensor
    stride8: Tensor
    stride4: Tensor


class _Encoder(nn.Module):
    """Stem and residual stages shared by both encoders; the names are those of the released checkpoint."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: str):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.res2, self.res3, self.res4 = build_stages(backbone)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def _stem(self, frames: Tensor) -> Tensor:
        normalized = (frames - self.mean.to(frames)) / self.std.to(frames)
        return self.conv1(normalized.to(self.conv1.weight.dtype))


class QueryEncoder(_Encoder):
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


class MemoryEncoder(_Encoder):
    """Features of frames seen together with what is known of one object."""

    def __init__(self, backbone: str, guidance: str):
        super().__init__(backbone)
        self.guides = GUIDANCE[guidance]
        for name in self.guides:
            self.add_module(name, nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False))

    def forward(self, frames: Tensor, guides: Tensor, objects_per_clip: list[int]) -> Tensor:
        """Encode frames `[B, 3, H, W]` with maps `[K, number of guides, H, W]` to `[K, D, H/16, W/16]`.

        The K objects belong to the B frames in order, `objects_per_clip` each.
        """
        weight = torch.cat([self.get_parameter(f"{name}.weight") for name in self.guides], 1)
        x = F.conv2d(guides.to(weight.dtype), weight, stride=2, padding=3)
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
