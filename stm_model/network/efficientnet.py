"""The EfficientNet-Lite trunks: inverted residuals; Lite0 has a quarter of ResNet-18's parameters."""

import torch
from torch import Tensor, nn

EPSILON = 1e-3
"""Of batch norm, as in the published weights."""


class DepthwiseConv2d(nn.Conv2d):
    """A convolution of every channel by itself.

    Where gradients are taken on a CPU, all but the smallest kernels compute in float32: gradients in narrower formats
    take up to forty times as long there. What comes out has the dtype of what went in.
    """

    def __init__(self, channels: int, kernel: int, stride: int):
        super().__init__(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        fast = self.kernel_size == (3, 3) and self.stride == (1, 1)
        if fast or input.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast("cpu", enabled=False):
            return self._conv_forward(input.float(), self.weight.float(), bias).to(input.dtype)


class InvertedResidual(nn.Module):
    """1×1 expansion, depthwise convolution, 1×1 projection, with a shortcut where the shape stays the same.

    Source: Sandler et al., MobileNetV2, CVPR 2018; without squeeze and excitation and with ReLU6 in EfficientNet-Lite.
    """

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = in_channels * expansion
        self.expand = _normalized(nn.Conv2d(in_channels, wide, 1, bias=False)) if expansion > 1 else None
        self.depthwise = _normalized(DepthwiseConv2d(wide, kernel, stride))
        self.project = _normalized(nn.Conv2d(wide, channels, 1, bias=False))
        self.relu = nn.ReLU6(inplace=True)
        self.has_shortcut = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.expand is None else self.relu(self.expand(x))
        out = self.project(self.relu(self.depthwise(out)))
        if self.has_shortcut:
            out += x
        return out


def _normalized(convolution: nn.Conv2d) -> nn.Sequential:
    """A convolution and its batch norm."""
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels, eps=EPSILON))


def lite_stages(
    channels: tuple[int, int, int, int], depths: tuple[int, int, int, int]
) -> tuple[nn.Sequential, nn.Sequential, nn.Sequential]:
    """The stages up to 1/4, 1/8 and 1/16 of the frame behind a 32-channel stem at 1/2.

    Args:
        channels: of the maps at 1/4 and 1/8, and of both groups of blocks at 1/16.
        depths: blocks of each.
    """
    quarter, eighth, sixteenth, deepest = channels
    return (
        nn.Sequential(InvertedResidual(32, 16, 3, 1, expansion=1), *_stage(16, quarter, 3, 2, depths[0])),
        nn.Sequential(*_stage(quarter, eighth, 5, 2, depths[1])),
        nn.Sequential(*_stage(eighth, sixteenth, 3, 2, depths[2]), *_stage(sixteenth, deepest, 5, 1, depths[3])),
    )


def lite_context(in_channels: int, channels: int, depth: int) -> nn.Sequential:
    """The stage behind them, up to 1/32 of the frame."""
    return nn.Sequential(*_stage(in_channels, channels, 5, 2, depth))


def _stage(in_channels: int, channels: int, kernel: int, stride: int, depth: int) -> list[nn.Module]:
    first = InvertedResidual(in_channels, channels, kernel, stride, expansion=6)
    return [first, *(InvertedResidual(channels, channels, kernel, 1, expansion=6) for _ in range(depth - 1))]
