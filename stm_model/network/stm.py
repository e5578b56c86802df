"""The space-time memory network: two encoders, the memory read between them, a decoder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from stm_model.checkpoint import DEFAULT_WEIGHTS, check_tensors, read_tensors
from stm_model.network.decoder import Decoder
from stm_model.network.encoders import FrameFeatures, KeyValue, MemoryEncoder, QueryEncoder
from stm_model.network.resnet import BACKBONES, stage_channels
from stm_model.runtime import default_device, default_dtype

STRIDE = 16
"""Pixels per step of the feature grid on which memory is read."""


@dataclass(frozen=True)
class STMConfig:
    """Shape of the network; the defaults are the released STM's."""

    backbone: str = "resnet50"
    """Trunk of both encoders: `resnet50` or `resnet18`."""
    key_channels: int = 128
    """C, channels that are compared."""
    value_channels: int = 512
    """V, channels that are read."""
    decoder_channels: int = 256
    """Width of the decoder."""

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}, got {self.backbone!r}")

    @classmethod
    def small(cls) -> STMConfig:
        """The ResNet-18 variant of the default weights."""
        return cls(backbone="resnet18", key_channels=64, value_channels=128, decoder_channels=64)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> STMConfig:
        """The shape of the network whose tensors these are; the released one's where a tensor is missing."""

        def rows(name: str, default: int) -> int:
            return len(tensors[name]) if name in tensors and tensors[name].ndim else default

        has_basic_blocks = "Encoder_Q.res2.0.conv2.weight" in tensors and "Encoder_Q.res2.0.conv3.weight" not in tensors
        return cls(
            backbone="resnet18" if has_basic_blocks else cls.backbone,
            key_channels=rows("KV_Q_r4.Key.weight", cls.key_channels),
            value_channels=rows("KV_Q_r4.Value.weight", cls.value_channels),
            decoder_channels=rows("Decoder.convFM.weight", cls.decoder_channels),
        )


class Query(NamedTuple):
    """What the query encoder makes of B frames."""

    key: Tensor
    """`[B, C, H/16, W/16]`"""
    value: Tensor
    """`[B, V, H/16, W/16]`"""
    features: FrameFeatures
    """The maps the decoder refines with."""


class STM(nn.Module):
    """Space-time memory network for video object segmentation.

    The objects of all clips form one batch of K; `objects_per_clip` says how many belong to each of the B frames.
    Attribute names are those of the released checkpoint.

    Source: Oh et al., Video Object Segmentation using Space-Time Memory Networks, ICCV 2019.
    """

    def __init__(self, config: STMConfig | None = None):
        super().__init__()
        self.config = config = config or STMConfig()
        deepest = stage_channels(config.backbone)[-1]
        self.Encoder_M = MemoryEncoder(config.backbone)
        self.Encoder_Q = QueryEncoder(config.backbone)
        self.KV_M_r4 = KeyValue(deepest, config.key_channels, config.value_channels)
        self.KV_Q_r4 = KeyValue(deepest, config.key_channels, config.value_channels)
        self.Decoder = Decoder(config.backbone, 2 * config.value_channels, config.decoder_channels)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> STM:
        """Load a network in eval mode, its shape read off the checkpoint's tensors.

        Args:
            path: a released `.pth` (with or without `module.`) or our `.safetensors`; None for the default weights.
            device: where it runs; None for the GPU if there is one, else the CPU.
            dtype: floating-point type of weights and memory; None for bfloat16 where the device computes it
                natively, else float32.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: the file is no checkpoint, or its tensors are not those of an STM.
        """
        path = DEFAULT_WEIGHTS if path is None else path
        device = torch.device(device) if device is not None else default_device()
        tensors = read_tensors(path)
        with torch.device("meta"):
            model = cls(STMConfig.of_tensors(tensors))
        check_tensors(model.state_dict(), tensors, path)
        model.load_state_dict(tensors, assign=True)
        model.requires_grad_(False)
        return model.eval().to(device, dtype or default_dtype(device), memory_format=torch.channels_last)

    def memorize(
        self, frames: Tensor, masks: Tensor, other_masks: Tensor, objects_per_clip: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of frames with masks.

        Args:
            frames: `[B, 3, H, W]` RGB in 0…1, H and W multiples of 16.
            masks: `[K, H, W]` soft mask of each object, 0…1.
            other_masks: `[K, H, W]` summed mask of the other objects of the same clip.
            objects_per_clip: B counts with sum K.

        Returns:
            Key `[K, C, H/16, W/16]` and value `[K, V, H/16, W/16]`.
        """
        return self.KV_M_r4(self.Encoder_M(frames, masks, other_masks, objects_per_clip))

    def encode_query(self, frames: Tensor) -> Query:
        """Key, value and decoder maps of frames `[B, 3, H, W]`, RGB in 0…1, H and W multiples of 16."""
        features = self.Encoder_Q(frames)
        key, value = self.KV_Q_r4(features.stride16)
        return Query(key, value, features)

    def segment(self, memory_readout: Tensor, query: Query, objects_per_clip: list[int]) -> Tensor:
        """Decode what each object read from memory.

        Args:
            memory_readout: `[K, V, H/16, W/16]`.
            query: the frames' features.
            objects_per_clip: B counts with sum K.

        Returns:
            Float32 probability of each object by itself, `[K, H, W]`.
        """
        counts = torch.tensor(objects_per_clip, device=memory_readout.device)
        query_value = query.value.repeat_interleave(counts, 0, output_size=sum(objects_per_clip))
        logits = self.Decoder(torch.cat([memory_readout, query_value], 1), query.features, objects_per_clip)
        return torch.softmax(logits, 1)[:, 1]


def as_positions(feature_map: Tensor) -> Tensor:
    """`[K, D, H, W]` → token-major `[K, H·W, D]`; a view where the map is channels-last."""
    return rearrange(feature_map, "k d h w -> k (h w) d")
