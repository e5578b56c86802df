"""The shared form of the network: one trunk per frame, masks that enter late, a decoder that narrows as it refines.

A frame is encoded once, whatever the number of its objects. Its key is both what it asks with and what it is
remembered by, so that all objects of a clip share one set of keys, as in STCN. What depends on an object starts at 1/8
of the frame.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stm_model.network.backbones import BACKBONES
from stm_model.network.decoder import ResBlock, upsample
from stm_model.network.encoders import GUIDANCE, FrameFeatures, FrameTrunk, Query, per_object


class SharedEncoder(FrameTrunk):
    """Key and feature maps of frames, computed once per frame.

    Args:
        backbone: name of a trunk with a stage at 1/32, see `BACKBONES`.
        key_channels: C, channels that are compared.
        width: channels at 1/16; half of them at 1/8 and a quarter at 1/4.
    """

    def __init__(self, backbone: str, key_channels: int, width: int):
        super().__init__(backbone)
        parts = BACKBONES[backbone]
        stride4, stride8, stride16 = parts.channels
        self.res5 = parts.context()
        self.lateral16 = nn.Conv2d(stride16, width, 1)
        self.lateral32 = nn.Conv2d(parts.context_channels, width, 1)
        self.Key = nn.Conv2d(width, key_channels, 3, padding=1)
        self.skip16 = nn.Conv2d(width, width, 3, padding=1)
        self.skip8 = _projection(stride8, width // 2)
        self.skip4 = _projection(stride4, width // 4)

    def forward(self, frames: Tensor) -> Query:
        """Encode frames `[B, 3, H, W]`, RGB in 0…1, H and W multiples of 16."""
        stride4 = self.res2(self.maxpool(self.relu(self.bn1(self._stem(frames)))))
        stride8 = self.res3(stride4)
        stride16 = self.res4(stride8)
        context = self.lateral32(self.res5(stride16))
        merged = self.lateral16(stride16)
        merged = F.relu(merged + F.interpolate(context, merged.shape[-2:], mode="bilinear", align_corners=False))
        features = FrameFeatures(self.skip16(merged), self.skip8(stride8), self.skip4(stride4))
        return Query(self.Key(merged), merged, features)


def _projection(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


class ValueEncoder(nn.Module):
    """Values of encoded frames with what is known of each object."""

    def __init__(self, guidance: str, value_channels: int, width: int):
        super().__init__()
        half = width // 2
        self.guide8 = nn.Conv2d(len(GUIDANCE[guidance]), half, 8, stride=8)
        self.frame8 = nn.Conv2d(half, half, 1)
        self.block8 = ResBlock(half)
        self.down16 = nn.Conv2d(half, width, 3, stride=2, padding=1)
        self.frame16 = nn.Conv2d(width, width, 1)
        self.block16 = nn.Sequential(ResBlock(width), ResBlock(width))
        self.Value = nn.Conv2d(width, value_channels, 3, padding=1)

    def forward(self, query: Query, guides: Tensor, objects_per_clip: list[int]) -> Tensor:
        """Encode B frames with maps `[K, number of guides, H, W]` of their K objects to `[K, V, H/16, W/16]`."""
        x = self.guide8(guides.to(self.guide8.weight.dtype, memory_format=torch.channels_last))
        x = x + per_object(self.frame8(query.features.stride8), objects_per_clip)
        x = self.down16(F.relu_(self.block8(x)))
        x = x + per_object(self.frame16(query.value), objects_per_clip)
        return self.Value(F.relu_(self.block16(x)))


class SharedDecoder(nn.Module):
    """Read values, and the previous frame's masks as a hint where objects are, to logits.

    Args:
        read_channels: V, channels that are read.
        width: as of `SharedEncoder`.
        prior: whether the decoder sees the previous frame's masks.
    """

    def __init__(self, read_channels: int, width: int, prior: bool):
        super().__init__()
        self.read16 = nn.Conv2d(read_channels, width, 3, padding=1)
        self.block16 = nn.Sequential(ResBlock(width), ResBlock(width))
        self.narrow8 = nn.Conv2d(width, width // 2, 1)
        self.block8 = ResBlock(width // 2)
        self.narrow4 = nn.Conv2d(width // 2, width // 4, 1)
        self.block4 = ResBlock(width // 4)
        # of each cell's four quarters
        self.predict = nn.Conv2d(width // 4, 4, 3, padding=1)
        if prior:
            self.prior16 = nn.Conv2d(2, width, 8, stride=4, padding=2)
            self.prior8 = nn.Conv2d(2, width // 2, 4, stride=2, padding=1)

    def forward(
        self, readout: Tensor, query: Query, objects_per_clip: list[int], previous: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Decode `[K, V, H/16, W/16]` to float32 logits `[K, H, W]`.

        Args:
            readout, query, objects_per_clip: what each object read, the encoded frames, the objects of each.
            previous: each object's mask in the previous frame and the summed mask of the clip's others, `[K, H, W]`
                in 0…1; None if the decoder does not see them.
        """
        x = self.read16(readout)
        x = x + per_object(query.features.stride16, objects_per_clip)
        if previous is not None:
            hint = torch.stack([F.avg_pool2d(masks, 4) for masks in previous], 1)
            hint = hint.to(self.prior8.weight.dtype)
            x = x + self.prior16(hint)
        x = upsample(self.narrow8(F.relu_(self.block16(x))), 2)
        x = x + per_object(query.features.stride8, objects_per_clip)
        if previous is not None:
            x = x + self.prior8(hint)
        x = upsample(self.narrow4(F.relu_(self.block8(x))), 2)
        x = x + per_object(query.features.stride4, objects_per_clip)
        fine = F.pixel_shuffle(self.predict(F.relu_(self.block4(x))).float(), 2)
        return upsample(fine, 2)[:, 0]
