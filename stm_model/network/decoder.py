"""The decoder: what was read from memory becomes a mask, refined with the query's finer maps."""

from torch import Tensor, nn
from torch.nn import functional as F

from stm_model.network.backbones import BACKBONES
from stm_model.network.encoders import FrameFeatures, per_object


class ResBlock(nn.Module):
    """Pre-activation residual block without normalisation."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # in place wherever gradients allow: fresh memory costs as much as the arithmetic on it
        out = self.conv2(F.relu_(self.conv1(F.relu(x))))
        out += x
        return out


class Refine(nn.Module):
    """Merge a coarse per-object map with a finer map of the frame."""

    def __init__(self, frame_channels: int, channels: int):
        super().__init__()
        self.convFS = nn.Conv2d(frame_channels, channels, 3, padding=1)
        self.ResFS = ResBlock(channels)
        self.ResMM = ResBlock(channels)

    def forward(self, frame_map: Tensor, object_map: Tensor, objects_per_clip: list[int]) -> Tensor:
        merged = upsample(object_map, 2)
        merged += per_object(self.ResFS(self.convFS(frame_map)), objects_per_clip)
        return self.ResMM(merged)


class Decoder(nn.Module):
    """Read features to two-channel logits (background, object) at the frame's size."""

    def __init__(self, backbone: str, read_channels: int, channels: int):
        super().__init__()
        stride4, stride8, _ = BACKBONES[backbone].channels
        self.convFM = nn.Conv2d(read_channels, channels, 3, padding=1)
        self.ResMM = ResBlock(channels)
        self.RF3 = Refine(stride8, channels)
        self.RF2 = Refine(stride4, channels)
        self.pred2 = nn.Conv2d(channels, 2, 3, padding=1)

    def forward(self, readout: Tensor, features: FrameFeatures, objects_per_clip: list[int]) -> Tensor:
        """Decode `[K, read_channels, H/16, W/16]` to float32 logits `[K, 2, H, W]`.

        The part of each refinement that depends on the frame alone is computed once per frame, not once per object.
        """
        x = self.ResMM(self.convFM(readout))
        x = self.RF3(features.stride8, x, objects_per_clip)
        x = self.RF2(features.stride4, x, objects_per_clip)
        return upsample(self.pred2(F.relu_(x)).float(), 4)


def upsample(x: Tensor, factor: int) -> Tensor:
    """Bilinear upsampling, pixel centres aligned the half-pixel way."""
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
