"""The space-time memory network: two encoders, the memory read between them, a decoder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from stm_model.network.backbones import BACKBONES
from stm_model.network.decoder import Decoder
from stm_model.network.encoders import GUIDANCE, FrameFeatures, KeyValue, MemoryEncoder, QueryEncoder
from stm_model.network.weights import DEFAULT_WEIGHTS, check_tensors, read_tensors
from stm_model.runtime import default_device, default_dtype

STRIDE = 16
"""Pixels per step of the feature grid on which memory is read."""

# a checkpoint says by a tensor of this name that keys are compared by their distance
_L2 = "l2_similarity"


@dataclass(frozen=True)
class STMConfig:
    """Shape of the network; the defaults are the released STM's."""

    backbone: str = "resnet50"
    """Trunk of both encoders: `resnet50`, `resnet18` or `efficientnet-lite0`."""
    key_channels: int = 128
    """C, channels that are compared."""
    value_channels: int = 512
    """V, channels that are read."""
    decoder_channels: int = 256
    """Width of the decoder."""
    guidance: Literal["masks", "scribbles"] = "masks"
    """What is remembered with a frame and an object's mask: the mask of the other objects, to track, or the object's
    positive and negative scribbles, to be corrected by them."""
    similarity: Literal["dot", "l2"] = "dot"
    """How keys are compared: by their dot product, or by their squared distance as STCN does."""

    def __post_init__(self) -> None:
        for name, choices in (("backbone", [*BACKBONES]), ("guidance", [*GUIDANCE]), ("similarity", ["dot", "l2"])):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("key_channels", "value_channels", "decoder_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @classmethod
    def small(cls, guidance: Literal["masks", "scribbles"] = "masks") -> STMConfig:
        """The ResNet-18 variant: narrow keys, values and decoder."""
        return cls("resnet18", key_channels=64, value_channels=128, decoder_channels=64, guidance=guidance)

    @classmethod
    def lite(cls, guidance: Literal["masks", "scribbles"] = "masks") -> STMConfig:
        """The EfficientNet-Lite0 variant, that of the default weights."""
        return replace(cls.small(guidance), backbone="efficientnet-lite0", key_channels=128, decoder_channels=128)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> STMConfig:
        """The shape of the network whose tensors these are; the released one's where a tensor is missing."""

        def rows(name: str, default: int) -> int:
            return len(tensors[name]) if name in tensors and tensors[name].ndim else default

        has_scribbles = any(f"Encoder_M.{name}.weight" in tensors for name in ("conv1_p", "conv1_n"))
        return cls(
            backbone=_backbone_of(tensors) or cls.backbone,
            key_channels=rows("KV_Q_r4.Key.weight", cls.key_channels),
            value_channels=rows("KV_Q_r4.Value.weight", cls.value_channels),
            decoder_channels=rows("Decoder.convFM.weight", cls.decoder_channels),
            guidance="scribbles" if has_scribbles else "masks",
            similarity="l2" if _L2 in tensors else "dot",
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

    Source: Oh et al., Video Object Segmentation using Space-Time Memory Networks, ICCV 2019; guided by scribbles:
    Oh et al., A Unified Model for Semi-supervised and Interactive Video Object Segmentation using Space-time Memory
    Networks, DAVIS Challenge 2019.
    """

    def __init__(self, config: STMConfig | None = None):
        super().__init__()
        self.config = config = config or STMConfig()
        deepest = BACKBONES[config.backbone].channels[-1]
        self.Encoder_M = MemoryEncoder(config.backbone, config.guidance)
        self.Encoder_Q = QueryEncoder(config.backbone)
        self.KV_M_r4 = KeyValue(deepest, config.key_channels, config.value_channels)
        self.KV_Q_r4 = KeyValue(deepest, config.key_channels, config.value_channels)
        self.Decoder = Decoder(config.backbone, 2 * config.value_channels, config.decoder_channels)
        if config.similarity == "l2":
            self.register_buffer(_L2, torch.ones(()))

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
        return _channels_last(model.eval().to(device, dtype or default_dtype(device)))

    @classmethod
    def from_tracking(cls, model: STM) -> STM:
        """A network guided by scribbles with the weights, mode, device and dtype of one guided by masks.

        Until it is trained further it takes a positive scribble for a piece of the object's mask, and a negative one
        for a piece of another object.
        """
        model.expect_guidance("masks")
        parameter = next(model.parameters())
        with torch.device("meta"):
            guided = cls(replace(model.config, guidance="scribbles"))
        guided.load_state_dict(scribble_tensors(model.state_dict()), assign=True)
        guided.requires_grad_(parameter.requires_grad).train(model.training)
        return _channels_last(guided)

    def expect_guidance(self, guidance: Literal["masks", "scribbles"]) -> None:
        """Raise a ValueError if the network is guided by something else."""
        if self.config.guidance != guidance:
            raise ValueError(
                f"model: expected a network guided by {guidance}, got one guided by {self.config.guidance}"
            )

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

        Raises:
            ValueError: the network is guided by scribbles.
        """
        self.expect_guidance("masks")
        return self.KV_M_r4(self.Encoder_M(frames, torch.stack([masks, other_masks], 1), objects_per_clip))

    def memorize_scribbles(
        self, frames: Tensor, masks: Tensor, positive: Tensor, negative: Tensor, objects_per_clip: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of frames with the scribbles drawn on them.

        Args:
            frames: `[B, 3, H, W]` RGB in 0…1, H and W multiples of 16.
            masks: `[K, H, W]` soft mask of each object as it stands, 0…1; 0.5 everywhere where there is none yet.
            positive: `[K, H, W]` 1 on the scribbles of the object, else 0.
            negative: `[K, H, W]` 1 on the scribbles of background and other objects, else 0.
            objects_per_clip: B counts with sum K.

        Returns:
            Key `[K, C, H/16, W/16]` and value `[K, V, H/16, W/16]`.

        Raises:
            ValueError: the network is guided by masks.
        """
        self.expect_guidance("scribbles")
        return self.KV_M_r4(self.Encoder_M(frames, torch.stack([masks, positive, negative], 1), objects_per_clip))

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


def _backbone_of(tensors: Mapping[str, Tensor]) -> str | None:
    """The backbone that has a first stage with these tensors, None if there is none."""
    if "Encoder_Q.res2.0.depthwise.0.weight" in tensors:
        return "efficientnet-lite0"
    if "Encoder_Q.res2.0.conv3.weight" in tensors:
        return "resnet50"
    return "resnet18" if "Encoder_Q.res2.0.conv2.weight" in tensors else None


def scribble_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a network guided by scribbles that starts from those of one guided by masks.

    Positive scribbles are seen as the object's mask was, negative ones as that of the other objects.
    """
    names = {
        "Encoder_M.conv1_m.weight": "Encoder_M.conv1_p.weight",
        "Encoder_M.conv1_o.weight": "Encoder_M.conv1_n.weight",
    }
    started = {name: value.clone() for name, value in tensors.items() if name != "Encoder_M.conv1_o.weight"}
    return started | {names[name]: value.clone() for name, value in tensors.items() if name in names}


def _channels_last(model: STM) -> STM:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's types leave it out


def as_positions(feature_map: Tensor) -> Tensor:
    """`[K, D, H, W]` → token-major `[K, H·W, D]`; a view where the map is channels-last."""
    return rearrange(feature_map, "k d h w -> k (h w) d")
