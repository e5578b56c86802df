"""The space-time memory network: two encoders, the memory read between them, a decoder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from stm_model.network.backbones import BACKBONES
from stm_model.network.batch_norm import absorb_batch_norm
from stm_model.network.decoder import Decoder
from stm_model.network.encoders import GUIDANCE, KeyValue, MemoryEncoder, Query, QueryEncoder, per_object
from stm_model.network.shared import SharedDecoder, SharedEncoder, ValueEncoder
from stm_model.network.weights import check_finite, check_tensors, read_tensors
from stm_model.runtime import DEFAULT_WEIGHTS, check_int8, default_dtype, dtype_name, usable_device, warn_if_emulated

STRIDE = 16
"""Pixels per step of the feature grid on which memory is read."""

# a checkpoint says by a tensor of this name that keys are compared by their distance
_L2 = "l2_similarity"


@dataclass(frozen=True)
class STMConfig:
    """Shape of the network; the defaults are the released STM's."""

    backbone: str = "resnet50"
    """Trunk of both encoders: `resnet50`, `resnet18`, or `efficientnet-lite0` to `-lite2`."""
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

    form: Literal["separate", "shared"] = "separate"
    """`separate`: memory and query have an encoder each, as released. `shared`: one trunk encodes a frame once, the
    masks of its objects enter late, and all objects share its key."""
    prior: bool = False
    """Whether the decoder sees the previous frame's masks; the shared form alone can."""

    def __post_init__(self) -> None:
        if self.form == "shared" and BACKBONES.get(self.backbone, BACKBONES["resnet50"]).context is None:
            able = [name for name, backbone in BACKBONES.items() if backbone.context is not None]
            raise ValueError(f"backbone: expected one of {', '.join(able)} for the shared form, got {self.backbone!r}")
        if self.form == "shared" and self.decoder_channels % 4:
            raise ValueError(
                f"decoder_channels: expected a multiple of 4 for the shared form, got {self.decoder_channels}"
            )
        if self.prior and self.form != "shared":
            raise ValueError("prior: expected the shared form, the separate one has none")
        for name, choices in (
            ("backbone", [*BACKBONES]),
            ("guidance", [*GUIDANCE]),
            ("similarity", ["dot", "l2"]),
            ("form", ["separate", "shared"]),
        ):
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
    def shared(cls, guidance: Literal["masks", "scribbles"] = "masks") -> STMConfig:
        """The shared form with an EfficientNet-Lite0 trunk; tracking, the decoder sees the previous frame's masks."""
        return cls(
            "efficientnet-lite0", 64, 128, 128, guidance, similarity="l2", form="shared", prior=guidance == "masks"
        )

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> STMConfig:
        """The shape of the network whose tensors these are; the released one's where a tensor is missing."""

        def rows(name: str, default: int) -> int:
            return len(tensors[name]) if name in tensors and tensors[name].ndim else default

        similarity: Literal["dot", "l2"] = "l2" if _L2 in tensors else "dot"
        if any(name.startswith("Encoder.") for name in tensors):
            guide = tensors.get("Memory.guide8.weight")
            return cls(
                backbone=_backbone_of(tensors, "Encoder") or "efficientnet-lite0",
                key_channels=rows("Encoder.Key.weight", 64),
                value_channels=rows("Memory.Value.weight", 128),
                decoder_channels=rows("Decoder.read16.weight", 128),
                guidance="scribbles" if guide is not None and guide.shape[1:2] == (3,) else "masks",
                similarity=similarity,
                form="shared",
                prior="Decoder.prior16.weight" in tensors,
            )
        has_scribbles = any(f"Encoder_M.{name}.weight" in tensors for name in ("conv1_p", "conv1_n"))
        return cls(
            backbone=_backbone_of(tensors, "Encoder_Q") or cls.backbone,
            key_channels=rows("KV_Q_r4.Key.weight", cls.key_channels),
            value_channels=rows("KV_Q_r4.Value.weight", cls.value_channels),
            decoder_channels=rows("Decoder.convFM.weight", cls.decoder_channels),
            guidance="scribbles" if has_scribbles else "masks",
            similarity=similarity,
        )


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
        self.int8 = False
        """Whether it predicts with convolutions in eight bits; all else, and its weights, are in float32."""
        if config.similarity == "l2":
            self.register_buffer(_L2, torch.ones(()))
        if config.form == "shared":
            width = config.decoder_channels
            self.Encoder = SharedEncoder(config.backbone, config.key_channels, width)
            self.Memory = ValueEncoder(config.guidance, config.value_channels, width)
            self.Decoder: nn.Module = SharedDecoder(config.value_channels, width, config.prior)
            return
        deepest = BACKBONES[config.backbone].channels[-1]
        self.Encoder_M = MemoryEncoder(config.backbone, config.guidance)
        self.Encoder_Q = QueryEncoder(config.backbone)
        self.KV_M_r4 = KeyValue(deepest, config.key_channels, config.value_channels)
        self.KV_Q_r4 = KeyValue(deepest, config.key_channels, config.value_channels)
        self.Decoder = Decoder(config.backbone, 2 * config.value_channels, config.decoder_channels)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> STM:
        """Load a network in eval mode, its shape read off the checkpoint's tensors.

        Args:
            path: a released `.pth` (with or without `module.`) or our `.safetensors`; None for the default weights.
            device: where it runs; None for the GPU if there is one, else the CPU.
            dtype: floating-point type of weights and memory, or its name; None for bfloat16 where the device computes
                it natively, else float32. `int8` predicts with convolutions in eight bits on a CPU, the rest is
                float32. In half precision convolutions take over the scale of the batch norm behind them, before their
                weights are rounded.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: the file is no checkpoint, or its tensors are not those of an STM, or not finite.
            ValueError: the device cannot be used, or not with this dtype.
        """
        path = DEFAULT_WEIGHTS if path is None else path
        device = usable_device(device)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        int8 = dtype == torch.int8
        if int8:
            check_int8(device)
            dtype = torch.float32
        if dtype is not None:
            warn_if_emulated(dtype, device)
        tensors = read_tensors(path)
        with torch.device("meta"):
            model = cls(STMConfig.of_tensors(tensors))
        check_tensors(model.state_dict(), tensors, path)
        model.load_state_dict(tensors, assign=True)
        model.requires_grad_(False)
        dtype = dtype or default_dtype(device)
        if dtype.itemsize == 2:
            check_finite(model.state_dict(), path)
            absorb_batch_norm(model.float())
        model = model.eval().to(device, dtype)
        # in the dtype that computes: float16 may not hold what float32 does
        check_finite(model.state_dict(), path)
        model.int8 = int8
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's types lack it

    @property
    def dtype_name(self) -> str:
        """The number format in which it predicts."""
        return "int8" if self.int8 else dtype_name(next(self.parameters()).dtype)

    def expect_guidance(self, guidance: Literal["masks", "scribbles"]) -> None:
        """Raise a ValueError if the network is guided by something else."""
        if self.config.guidance != guidance:
            raise ValueError(
                f"model: expected a network guided by {guidance}, got one guided by {self.config.guidance}"
            )

    @property
    def shares_keys(self) -> bool:
        """Whether all objects of a frame have its key, `[B, …]`, and a frame that was a query is remembered as such."""
        return self.config.form == "shared"

    def memorize(
        self, frames: Tensor | Query, masks: Tensor, other_masks: Tensor, objects_per_clip: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of frames with masks.

        Args:
            frames: `[B, 3, H, W]` RGB in 0…1, H and W multiples of 16; where keys are shared, or what `encode_query`
                made of them.
            masks: `[K, H, W]` soft mask of each object, 0…1.
            other_masks: `[K, H, W]` summed mask of the other objects of the same clip.
            objects_per_clip: B counts with sum K.

        Returns:
            Key `[K, C, H/16, W/16]`, or `[B, C, H/16, W/16]` where keys are shared, and value `[K, V, H/16, W/16]`.

        Raises:
            ValueError: the network is guided by scribbles.
        """
        self.expect_guidance("masks")
        return self._memorize(frames, torch.stack([masks, other_masks], 1), objects_per_clip)

    def memorize_scribbles(
        self,
        frames: Tensor | Query,
        masks: Tensor,
        positive: Tensor,
        negative: Tensor,
        objects_per_clip: list[int],
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of frames with the scribbles drawn on them.

        Args:
            frames: as in `memorize`.
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
        key, value = self._memorize(frames, torch.stack([masks, positive, negative], 1), objects_per_clip)
        if self.shares_keys:
            # each object is scribbled on in frames of its own
            key = per_object(key, objects_per_clip).expand(len(value), -1, -1, -1)
        return key, value

    def _memorize(self, frames: Tensor | Query, guides: Tensor, objects_per_clip: list[int]) -> tuple[Tensor, Tensor]:
        if self.shares_keys:
            query = self.Encoder(frames) if isinstance(frames, Tensor) else frames
            return query.key, self.Memory(query, guides, objects_per_clip)
        return self.KV_M_r4(self.Encoder_M(frames, guides, objects_per_clip))

    def encode_query(self, frames: Tensor) -> Query:
        """Key, value and decoder maps of frames `[B, 3, H, W]`, RGB in 0…1, H and W multiples of 16."""
        if self.shares_keys:
            return self.Encoder(frames)
        features = self.Encoder_Q(frames)
        key, value = self.KV_Q_r4(features.stride16)
        return Query(key, value, features)

    def segment(
        self,
        memory_readout: Tensor,
        query: Query,
        objects_per_clip: list[int],
        previous: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Decode what each object read from memory.

        Args:
            memory_readout: `[K, V, H/16, W/16]`.
            query: the frames' features.
            objects_per_clip: B counts with sum K.
            previous: `[K, H, W]` each, soft mask of each object in the frame before and the summed mask of the other
                objects; only a network with `prior` looks at it, and needs it.

        Returns:
            Float32 probability of each object by itself, `[K, H, W]`.
        """
        if self.shares_keys:
            if self.config.prior and previous is None:
                raise ValueError("previous: expected the masks of the frame before, got none")
            seen = previous if self.config.prior else None
            return torch.sigmoid(self.Decoder(memory_readout, query, objects_per_clip, seen))
        counts = torch.tensor(objects_per_clip, device=memory_readout.device)
        query_value = query.value.repeat_interleave(counts, 0, output_size=sum(objects_per_clip))
        logits = self.Decoder(torch.cat([memory_readout, query_value], 1), query.features, objects_per_clip)
        return torch.softmax(logits, 1)[:, 1]


def _backbone_of(tensors: Mapping[str, Tensor], encoder: str) -> str | None:
    """The backbone that has a first stage with these tensors, None if there is none."""
    if f"{encoder}.res2.0.depthwise.0.weight" in tensors:
        if f"{encoder}.res2.3.depthwise.0.weight" not in tensors:
            return "efficientnet-lite0"
        eighth = tensors.get(f"{encoder}.res3.0.project.0.weight")
        return "efficientnet-lite2" if eighth is not None and len(eighth) == 48 else "efficientnet-lite1"
    if f"{encoder}.res2.0.conv3.weight" in tensors:
        return "resnet50"
    return "resnet18" if f"{encoder}.res2.0.conv2.weight" in tensors else None


def scribble_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a network guided by scribbles that starts from those of one guided by masks.

    Positive scribbles are seen as the object's mask was, negative ones as that of the other objects.
    """
    guide8 = tensors.get("Memory.guide8.weight")
    if guide8 is not None:
        # a session asks for any frame, so there is no previous one to see
        started = {name: value.clone() for name, value in tensors.items() if not name.startswith("Decoder.prior")}
        return started | {"Memory.guide8.weight": guide8[:, [0, 0, 1]].contiguous()}
    names = {
        "Encoder_M.conv1_m.weight": "Encoder_M.conv1_p.weight",
        "Encoder_M.conv1_o.weight": "Encoder_M.conv1_n.weight",
    }
    started = {name: value.clone() for name, value in tensors.items() if name != "Encoder_M.conv1_o.weight"}
    return started | {names[name]: value.clone() for name, value in tensors.items() if name in names}


def as_positions(feature_map: Tensor) -> Tensor:
    """`[K, D, H, W]` → token-major `[K, H·W, D]`; a view where the map is channels-last."""
    return rearrange(feature_map, "k d h w -> k (h w) d")
