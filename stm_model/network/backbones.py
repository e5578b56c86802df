"""The trunks that the encoders can have."""

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


def _lite(
    channels: tuple[int, int, int, int], depths: tuple[int, int, int, int], context_channels: int, context_depth: int
) -> Backbone:
    """An EfficientNet-Lite, see `lite_stages`, with what its published weights expect."""
    return Backbone(
        partial(lite_stages, channels, depths),
        (channels[0], channels[1], channels[3]),
        context=partial(lite_context, channels[3], context_channels, context_depth),
        context_channels=context_channels,
        stem_channels=32,
        stem_kernel=3,
        epsilon=EPSILON,
        activation=nn.ReLU6,
        pooled=False,
        damping=3.0,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    )


BACKBONES: dict[str, Backbone] = {
    "efficientnet-lite0": _lite((24, 40, 80, 112), (2, 2, 3, 3), 192, 4),
    "efficientnet-lite1": _lite((24, 40, 80, 112), (3, 3, 4, 4), 192, 5),
    "efficientnet-lite2": _lite((24, 48, 88, 120), (3, 3, 4, 4), 208, 5),
    "resnet18": Backbone(partial(resnet_stages, BasicBlock, (2, 2, 2)), (64, 128, 256)),
    "resnet50": Backbone(partial(resnet_stages, Bottleneck, (3, 4, 6)), (256, 512, 1024)),
}
"""By name; the layer names of the residual ones are torchvision's."""
