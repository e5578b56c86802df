"""The settings of a training run, and the presets: settings that belong together."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stm_model.runtime import DEFAULT_WEIGHTS

# the network is imported where it is used: `stm train --help` answers without torch
if TYPE_CHECKING:
    from stm_model.network import STMConfig


@dataclass(frozen=True)
class TrainConfig:
    """Train the network on videos, still images and procedural clips. Every setting is a preset's, or yours."""

    out: Path
    """Folder of the run: weights, checkpoint, metrics and pictures. A run found there goes on from its checkpoint."""
    data: tuple[Path, ...] = ()
    """Folders in the layout of DAVIS, YouTube-VOS, COCO or Pascal VOC, or of images and masks; a COCO json. None trains
    on procedural clips alone."""
    weights: tuple[float, ...] = ()
    """How often each folder is drawn, relative to the others; none for all alike."""
    split: str = "train"
    """List to train on, in the layouts that have lists; `fit` and `held`, which divide DAVIS-2016's training sequences,
    ship with the package."""
    validation_split: str | None = "val"
    """List to score the weights on, of the first folder in DAVIS' layout; None never scores."""
    init: Path | None = None
    """Weights to start from, a released .pth or our .safetensors; None for random ones."""
    trunk: Path | None = None
    """Weights of an image classifier that both encoders start from, torchvision's for ResNets; None for random ones."""
    trunk_rate: float = 1.0
    """Learning rate of the encoders' trunks, relative to that of the rest."""
    freeze_first_stage: bool = False
    """Keep the query encoder's stem and first stage as they start: less arithmetic, and what a classifier learned from
    many more images stays. Those of the memory encoder learn to see masks."""
    network: Literal["shared", "lite", "small", "released"] = "small"
    """Shape of a network that does not start from weights: one EfficientNet-Lite0 for query and memory; or one for
    each, EfficientNet-Lite0 or ResNet-18 with narrow keys and values, or the released STM's ResNet-50."""
    backbone: Literal["efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"] | None = None
    """Trunk of a network that does not start from weights; None for that of `network`."""
    key_channels: int | None = None
    """Of a network that does not start from weights: channels that are compared; None for those of `network`."""
    value_channels: int | None = None
    """Likewise, channels that are read."""
    decoder_channels: int | None = None
    """Likewise, the width of the decoder."""
    similarity: Literal["dot", "l2"] | None = None
    """Likewise, how keys are compared: by their dot product (None too), or by their squared distance as STCN does."""
    prior: bool | None = None
    """Likewise, whether the decoder sees the previous frame's masks, in the shared form alone."""
    top_k: int | None = None
    """Remembered positions that each query reads, the best, see `stm_kernels.memory_read`; None reads all."""
    rounds: int = 0
    """Simulated rounds of scribbles that the frames of a clip are segmented in, by a network guided by scribbles. 0
    trains one that tracks from the mask of the first frame."""
    steps: int = 10000
    """Optimiser steps."""
    batch: int = 8
    """Clips per step, over all processes."""
    accumulate: int = 1
    """Parts a step's clips are computed in, one after the other: less memory, the same result."""
    frames: int = 3
    """Frames per clip."""
    crop: int = 192
    """Height of a training clip, in pixels, and its width unless that is given."""
    crop_width: int | None = None
    """Width of a training clip, in pixels: a wide view has as much background as a video's frames have."""
    distinct: int | None = None
    """Number of different clips, over and over; None for ever new ones."""
    stills: float = 0.35
    """Share of clips made of one image by random motion, where the data has videos; the rest is cut from videos."""
    procedural: float = 0.1
    """Share of procedural clips, where there is data."""
    paste: float = 0.35
    """Share of clips with the objects of another pasted in, to be followed too."""
    distract: float = 0.15
    """Share of clips with the objects of another pasted in as part of the background."""
    replace: float = 0.15
    """Share of clips whose own objects become background, under the objects of another."""
    crowd: float = 0.0
    """Share of clips with cut-outs that move by themselves: twins of what is followed, instances of images, pasted once
    or twice, half of them followed."""
    follow: float = 1.0
    """Share of a still image's instances that are followed; the others are background that looks alike."""
    most_objects: int = 4
    """Objects of a clip; further ones are background."""
    regions: float = 0.4
    """Share of the pasted objects that are random regions of an image."""
    color: float = 0.3
    """How much brightness, contrast, saturation, hue and tint of a clip are changed, alike in all its frames."""
    degrade: float = 0.0
    """Share of clips that look like small, compressed video: reduced, saved as JPEG and enlarged again."""
    motion: float = 0.3
    """How much turning, zooming, shearing, drifting and bending is added to a video's own motion, where a still image
    gets 1."""
    max_skip: tuple[int, int] = (5, 25)
    """Greatest number of video frames from one frame of a clip to the next, at first and when it has grown."""
    skip_growth: float = 0.3
    """Share of the steps over which it grows."""
    learning_rate: float = 2e-4
    """Adam's learning rate after the warm-up."""
    warmup: int = 300
    """Steps over which the learning rate rises from zero."""
    schedule: Literal["constant", "linear", "cosine", "poly"] = "linear"
    """How the learning rate falls: not at all, or to zero in this shape (poly: to the power of 0.9)."""
    decay: float = 0.5
    """Last share of the steps, over which the learning rate falls."""
    freeze_batch_norm: float = 0.2
    """Share of the steps after which batch norm keeps its statistics; 0 for pretrained trunks."""
    dice: float = 0.5
    """Weight of the soft Dice term beside the cross entropy."""
    clip_gradient: float = 1.0
    """Greatest norm of the gradient."""
    ema: float = 0.999
    """Decay per step of the averaged weights, which are the ones written."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number format under autocast; None takes bfloat16 where the device computes it natively, else float32."""
    prior_noise: float = 0.2
    """Share of the previous frame's masks that are missing, shifted or seen twice, there and shifted, when a network
    with a prior sees them, so that it does not follow them blindly."""
    recompute: bool = False
    """Compute activations anew in the backward pass instead of keeping them: less memory, a third more time. Needs
    batch norm frozen from the start."""
    implementation: Literal["auto", "triton", "chunked", "reference"] = "auto"
    """Of the memory read, see `stm_kernels.memory_read`."""
    workers: int = 1
    """Processes that make clips, for each process that trains."""
    validate_every: int = 1000
    """Steps between scores on the validation split."""
    save_every: int = 250
    """Steps between checkpoints."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl, each with the mean loss since the last."""
    picture_every: int = 1000
    """Steps between pictures of predictions beside the truth; 0 draws none."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too; needs the extra `train`."""
    seed: int = 0
    """Seed of weights and clips."""
    device: str | None = None
    """Where to train; None for the GPU if there is one."""

    def __post_init__(self) -> None:
        from stm_model.network import STRIDE

        least = {"steps": 1, "batch": 1, "accumulate": 1, "frames": 2, "crop": STRIDE, "workers": 0, "most_objects": 1}
        least |= dict.fromkeys(("validate_every", "save_every", "log_every"), 1) | {"picture_every": 0, "warmup": 0}
        least["rounds"] = 0
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}: expected at least {value}, got {getattr(self, name)}")
        for name, side in (("crop", self.crop), ("crop_width", self.crop_width)):
            if side is not None and (side < STRIDE or side % STRIDE):
                raise ValueError(f"{name}: expected a multiple of {STRIDE} pixels, got {side}")
        for name in ("color", "motion"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a strength of at least 0, got {getattr(self, name)}")
        shares = ("stills", "procedural", "paste", "distract", "replace", "regions", "skip_growth", "decay")
        shares += ("crowd", "follow", "degrade", "prior_noise")
        for name in (*shares, "freeze_batch_norm", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share from 0 to 1, got {getattr(self, name)}")
        if self.paste + self.distract + self.replace > 1:
            raise ValueError("paste, distract, replace: expected shares with a sum of at most 1")
        if not 1 <= self.max_skip[0] <= self.max_skip[1]:
            raise ValueError(f"max_skip: expected two numbers of frames, ascending from 1, got {self.max_skip}")
        for name in ("distinct", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.weights and len(self.weights) != len(self.data):
            raise ValueError(
                f"weights: expected one for each of {len(self.data)} data folders, got {len(self.weights)}"
            )
        if self.init is not None and self.trunk is not None:
            raise ValueError("init, trunk: expected one of them, the weights to start from have a trunk")
        if self.init is not None and self._shape:
            name = next(iter(self._shape))
            raise ValueError(f"init, {name}: expected one of them, the weights to start from have their own")
        if self.freeze_first_stage and self.init is None and self.trunk is None:
            raise ValueError(
                "freeze_first_stage: expected a trunk, or weights to start from; random weights would stay"
            )
        if self.recompute and self.freeze_batch_norm:
            raise ValueError("recompute: expected freeze_batch_norm 0, or statistics would be counted twice")
        for name in ("learning_rate", "trunk_rate", "clip_gradient"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        _ = self.network_shape  # a shape that makes no sense is refused here

    @property
    def _shape(self) -> dict:
        """What differs from the shape that `network` names."""
        names = ("backbone", "key_channels", "value_channels", "decoder_channels", "similarity", "prior")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def network_shape(self) -> STMConfig:
        """The shape of the network to train, unless it starts from weights, which have their own."""
        from stm_model.network import STMConfig

        guidance: Literal["masks", "scribbles"] = "scribbles" if self.rounds else "masks"
        shapes = {"shared": STMConfig.shared, "lite": STMConfig.lite, "small": STMConfig.small, "released": STMConfig}
        return dataclasses.replace(shapes[self.network](guidance=guidance), **self._shape)

    @property
    def settings(self) -> dict:
        """All settings as JSON holds them."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


@dataclass(frozen=True)
class SmallConfig(TrainConfig):
    """Train a small network from random weights, on a CPU, from little data made the most of.

    These are the defaults; the other presets have others.
    """


@dataclass(frozen=True)
class PretrainedConfig(TrainConfig):
    """What the presets share that start from weights."""

    split: str = "fit"
    validation_split: str | None = "held"
    freeze_first_stage: bool = True
    trunk_rate: float = 0.5
    freeze_batch_norm: float = 0.0
    batch: int = 4
    max_skip: tuple[int, int] = (25, 25)


@dataclass(frozen=True)
class LiteConfig(PretrainedConfig):
    """Train the network of the package's weights, from an image classifier's trunk that `--trunk` names.

    Source: Tan & Le, EfficientNet, ICML 2019; its lite variants are without squeeze and excitation.
    """

    network: Literal["shared", "lite", "small", "released"] = "lite"
    crop: int = 176
    crop_width: int | None = 288
    warmup: int = 200


@dataclass(frozen=True)
class SharedConfig(PretrainedConfig):
    """Train the network that encodes a frame once, for several objects at 480 pixels, from an image classifier's trunk.

    Sources: Cheng et al., STCN, NeurIPS 2021 (shared keys); Tan & Le, EfficientNet, ICML 2019.
    """

    network: Literal["shared", "lite", "small", "released"] = "shared"
    crop: int = 256
    crop_width: int | None = 384
    warmup: int = 200
    stills: float = 0.25
    procedural: float = 0.05
    paste: float = 0.2
    distract: float = 0.1
    replace: float = 0.1
    regions: float = 0.2
    crowd: float = 0.5
    follow: float = 0.5
    most_objects: int = 5


@dataclass(frozen=True)
class PaperConfig(TrainConfig):
    """The paper's recipe, second stage; with `--stills 1` on image folders its first.

    Source: Oh et al., ICCV 2019, section 3.4, and the author's answers about the released code.
    """

    network: Literal["shared", "lite", "small", "released"] = "released"
    steps: int = 150000
    batch: int = 4
    crop: int = 384
    stills: float = 0.0
    procedural: float = 0.0
    paste: float = 0.0
    distract: float = 0.0
    replace: float = 0.0
    regions: float = 0.0
    max_skip: tuple[int, int] = (1, 25)
    skip_growth: float = 0.5
    learning_rate: float = 1e-5
    warmup: int = 0
    schedule: Literal["constant", "linear", "cosine", "poly"] = "constant"
    decay: float = 0.0
    freeze_batch_norm: float = 0.0
    dice: float = 0.0
    ema: float = 0.0
    workers: int = 4


@dataclass(frozen=True)
class InteractiveConfig(PretrainedConfig):
    """Train a network guided by scribbles, for `stm interact`, from the weights of one that tracks.

    Source: Oh et al., DAVIS Challenge 2019, sections 2.4 and 3.2.
    """

    init: Path | None = DEFAULT_WEIGHTS
    rounds: int = 3
    steps: int = 4000
    crop: int = 224
    crop_width: int | None = 384
    crowd: float = 0.4
    follow: float = 0.6
    most_objects: int = 3
    warmup: int = 100


@dataclass(frozen=True)
class SmokeConfig(TrainConfig):
    """A minute on a CPU: one procedural clip learned by heart, to see that training works."""

    steps: int = 100
    batch: int = 1
    crop: int = 96
    distinct: int | None = 1
    learning_rate: float = 2e-3
    warmup: int = 20
    ema: float = 0.9
    freeze_batch_norm: float = 0.6
    save_every: int = 50
    log_every: int = 10
    picture_every: int = 50


PRESETS: dict[str, type[TrainConfig]] = {
    "small": SmallConfig,
    "shared": SharedConfig,
    "lite": LiteConfig,
    "paper": PaperConfig,
    "interactive": InteractiveConfig,
    "smoke": SmokeConfig,
}
"""Settings by name; `small` are the defaults."""
