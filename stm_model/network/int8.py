"""Convolutions in eight bits, for processors that have no bfloat16.

Nothing is calibrated: the weights have a scale for every output channel, and each map one for itself, of its own least
and greatest value, in every frame anew. What ReLU6 leaves is in 0…6 by itself, so that the wide maps between the
convolutions of an inverted residual are never anything but bytes. Keys, values and masks come from convolutions in
float32.

Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
CVPR 2018.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stm_model.network.efficientnet import InvertedResidual

LEAST_CHANNELS = 16
"""Convolutions that see fewer channels stay as they are: the stem, and those of masks and scribbles."""
PRECISE = ("Key", "Value", "predict", "pred2")
"""Layers that stay as they are, of which what is compared, remembered or shown is made."""
RELU6_STEP = 6 / 255


class Bytes(NamedTuple):
    """A map in eight bits; its values are `(data - zero) * step`."""

    data: Tensor  # uint8 [B, C, H, W]
    step: float
    zero: int


def to_bytes(x: Tensor) -> Bytes:
    """A float32 map in eight bits, with the step that its range asks for; zero stays zero."""
    # in the order of memory: PyTorch would copy the map first
    low, high = (value.item() for value in x.permute(0, 2, 3, 1).aminmax())
    low, high = min(low, 0.0), max(high, 0.0)
    step = max((high - low) / 254, 1e-12)
    zero = -int(low // step)
    # what is at least 0 is rounded by cutting off its fraction
    return Bytes(x.mul(1 / step).add_(zero + 0.5).to(torch.uint8), step, zero)


class Int8Convolution(nn.Module):
    """A convolution whose weights and input have eight bits, and whose sums have 32.

    Args:
        convolution: the float32 convolution, whose input has its range in every frame anew.
        relu6: give `Bytes` of what ReLU6 leaves, instead of float32.
    """

    def __init__(self, convolution: nn.Conv2d, relu6: bool = False):
        super().__init__()
        most = 127 if sums_are_exact() else 63
        weight = convolution.weight.detach()
        scale = weight.abs().amax((1, 2, 3)).clamp_min(1e-12) / most
        self.register_buffer("weight", (weight / scale.view(-1, 1, 1, 1)).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("zeros", torch.zeros(len(scale), dtype=torch.int64))
        self.bias = convolution.bias
        self.shape = [*map(list, (convolution.stride, convolution.padding, convolution.dilation)), convolution.groups]
        self.relu6 = relu6
        self._packed: Tensor | None = None

    def forward(self, x: Tensor | Bytes) -> Tensor | Bytes:
        data, step, zero = x if isinstance(x, Bytes) else to_bytes(x)
        if self._packed is None:
            # in the order that is fastest for maps of this size
            pack = torch.ops.onednn.qconv_prepack
            self._packed = pack(self.weight, self.scale, step, zero, *self.shape, list(data.shape))
        result = (RELU6_STEP, 0, torch.uint8) if self.relu6 else (1.0, 0, torch.float32)
        weight = (self._packed, self.scale, self.zeros, self.bias)
        # bytes below 0 and above 255 are cut off: that is ReLU6
        out = torch.ops.onednn.qconv2d_pointwise(data, step, zero, *weight, *self.shape, *result, "none", [], "")
        return Bytes(out, RELU6_STEP, 0) if self.relu6 else out


class Int8InvertedResidual(nn.Module):
    """An inverted residual without batch norm, whose wide maps have eight bits."""

    def __init__(self, block: InvertedResidual):
        super().__init__()
        self.expand = None if block.expand is None else Int8Convolution(block.expand[0], relu6=True)
        self.depthwise = Int8Convolution(block.depthwise[0], relu6=True)
        self.project = Int8Convolution(block.project[0])
        self.has_shortcut = block.has_shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.depthwise(x if self.expand is None else self.expand(x)))
        if self.has_shortcut:
            out += x
        return out


def quantize(model: nn.Module) -> None:
    """Replace the convolutions of a float32 network without batch norm by those in eight bits, in place."""
    for name, module in model.named_children():
        if isinstance(module, InvertedResidual):
            setattr(model, name, Int8InvertedResidual(module))
        elif isinstance(module, nn.Conv2d):
            if name not in PRECISE and module.in_channels >= LEAST_CHANNELS:
                setattr(model, name, Int8Convolution(module))
        else:
            quantize(module)


@cache
def sums_are_exact() -> bool:
    """Whether this processor adds products of bytes in 32 bits, as those with VNNI do.

    Others add two of them in 16 bits first, which cuts off what is greater than 32 767.
    """
    data = torch.full((1, 64, 8, 8), 255, dtype=torch.uint8).to(memory_format=torch.channels_last)
    one = nn.Conv2d(64, 64, 1)
    scale, zeros, shape = torch.ones(64), torch.zeros(64, dtype=torch.int64), ([1, 1], [0, 0], [1, 1], 1)
    weight = torch.full_like(one.weight, 127, dtype=torch.int8)
    packed = torch.ops.onednn.qconv_prepack(weight, scale, 1.0, 0, *shape, list(data.shape))
    sums = torch.ops.onednn.qconv2d_pointwise(
        data, 1.0, 0, packed, scale, zeros, None, *shape, 1.0, 0, torch.float32, "none", [], ""
    )
    return bool((sums == 64 * 255 * 127).all())
