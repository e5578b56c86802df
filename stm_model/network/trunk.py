"""Start both encoders from an image classifier: torchvision's ResNets, or EfficientNet-Lite0's port to PyTorch."""

import os
import re

import torch
from torch import nn

from stm_model.network.backbones import BACKBONES
from stm_model.network.stm import STM
from stm_model.network.weights import check_tensors, read_tensors

_LITE_LAYERS = {
    "_expand_conv": "expand.0",
    "_bn0": "expand.1",
    "_depthwise_conv": "depthwise.0",
    "_bn1": "depthwise.1",
    "_project_conv": "project.0",
    "_bn2": "project.1",
}


@torch.no_grad()
def load_trunk(model: STM, path: str | os.PathLike) -> None:
    """Set the trunks of both encoders to those of an image classifier.

    The convolutions of the masks get new random weights with which a mask moves the stem's channels as the image does,
    and the layers that see the trunk's maps are damped as the backbone says.

    Args:
        model: the network; its other weights stay.
        path: the classifier's `.pth` or `.safetensors`; layers behind 1/16 of the frame are left out.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: its tensors are not those of the network's backbone.
    """
    encoders = [model.Encoder] if model.shares_keys else [model.Encoder_Q, model.Encoder_M]
    # an EfficientNet counts its blocks through, whatever the stage
    stages = [name for name, _ in encoders[0].named_children() if name.startswith("res")]
    blocks = [f"{stage}.{name}" for stage in stages for name, _ in encoders[0].get_submodule(stage).named_children()]
    found = {_our_name(name, blocks): value for name, value in read_tensors(path).items()}
    for encoder in encoders:
        trunk = {
            name: value
            for name, value in encoder.state_dict().items()
            if name.startswith(("conv1.", "bn1.", "res")) and not name.endswith("num_batches_tracked")
        }
        given = {name: found[name] for name in trunk if name in found}
        check_tensors(trunk, given, path, kind=f"the trunk of {model.config.backbone}")
        encoder.load_state_dict(given, strict=False)
    for name in _behind(model):
        model.get_parameter(f"{name}.weight").div_(BACKBONES[model.config.backbone].damping)
    if model.shares_keys:
        return
    spread = (model.Encoder_M.get_buffer("bn1.running_var") + model.Encoder_M.bn1.eps).sqrt()
    for name in model.Encoder_M.guides:
        guide = model.Encoder_M.get_parameter(f"{name}.weight")
        nn.init.kaiming_normal_(guide, nonlinearity="linear").mul_(spread.view(-1, 1, 1, 1))


def _behind(model: STM) -> list[str]:
    """The layers that see the trunk's maps."""
    if model.shares_keys:
        return ["Encoder.lateral16", "Encoder.lateral32", "Encoder.skip8.0", "Encoder.skip4.0"]
    keys_values = [f"KV_{encoder}_r4.{layer}" for encoder in "QM" for layer in ("Key", "Value")]
    return [*keys_values, "Decoder.RF3.convFS", "Decoder.RF2.convFS"]


def _our_name(name: str, blocks: list[str]) -> str:
    """The name in our encoders of a classifier's tensor; `blocks` are ours in order."""
    if match := re.fullmatch(r"layer([123])\.(.+)", name):
        return f"res{int(match[1]) + 1}.{match[2]}"
    if match := re.fullmatch(r"_blocks\.(\d+)\.(_\w+)\.(\w+)", name):
        if int(match[1]) < len(blocks):
            return f"{blocks[int(match[1])]}.{_LITE_LAYERS[match[2]]}.{match[3]}"
    for theirs, ours in (("_conv_stem.", "conv1."), ("_bn0.", "bn1.")):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name
