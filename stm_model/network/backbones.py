"""The trunks that the encoders can have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from stm_model.network.efficientnet import EPSILON, lite_context, lite_stages
from stm_model.network.resnet import BasicBlock, Bottleneck, resnet_stages


@dataclass(frozen=True)
class Backbone:
    """What an encoder is built of: a stem of one convolution with stride 2, and three stages."""

    stages: Callable[[], tuple[nn.Sequential, nn.Sequential, nn.Sequential]]
    """Makes the stages that end at 1/4, 1/8 and 1/16 of the frame."""
    channels: tuple[int, int, int]
    """Of their maps."""
    context: Callable[[], nn.Sequential] | None = None
    """Makes a stage that ends at 1/32, if the backbone has one."""
    context_channels: int = 0
    """Of its map."""
    stem_channels: int = 64
    stem_kernel: int = 7
    epsilon: float = 1e-5
    """Of the stem's batch norm."""
    activation: type[nn.ReLU] | type[nn.ReLU6] = nn.ReLU
    """Behind the stem."""
    pooled: bool = True
    """Whether a max pooling with stride 2 follows."""
    damping: float = 1.0
    """What the weights behind a classifier's trunk are divided by at first: linear bottlenecks leave large values."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Of the colours that the classifiers were trained with, in 0…1."""


BACKBONES: dict[str, Backbone] = {
    "efficientnet-lite0": Backbone(
        lite_stages,
        (24, 40, 112),
        context=lite_context,
        context_channels=192,
        stem_channels=32,
        stem_kernel=3,
        epsilon=EPSILON,
        activation=nn.ReLU6,
        pooled=False,
        damping=3.0,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    ),
    "resnet18": Backbone(partial(resnet_stages, BasicBlock, (2, 2, 2)), (64, 128, 256)),
    "resnet50": Backbone(partial(resnet_stages, Bottleneck, (3, 4, 6)), (256, 512, 1024)),
}
"""By name; the layer names of the residual ones are torchvision's."""
