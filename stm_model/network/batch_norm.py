"""Batch norm of a network that only predicts, computed by the convolutions before it."""

import copy
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from stm_model.network.encoders import MemoryEncoder
from stm_model.network.resnet import BasicBlock, Bottleneck

Model = TypeVar("Model", bound=nn.Module)

# of a batch norm that only adds: exact in every number format, and no epsilon counts beside the variance
_DEVIATION = 2.0**7


def fold_batch_norm(model: Model) -> Model:
    """A copy of a network in eval mode that computes the same without any batch norm.

    The folding is done in float32; the copy has the dtype and device of the original.
    """
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    for module, norm_name, convolutions in _norms(folded):
        norm = module.get_submodule(norm_name)
        bias = _scale(convolutions, norm).to(norm.weight.dtype)
        convolutions[0].bias = nn.Parameter(bias, requires_grad=False)
        setattr(module, norm_name, nn.Identity())
    return folded


@torch.no_grad()
def absorb_batch_norm(model: nn.Module) -> None:
    """Let every batch norm of a network in eval mode only add, in place: the convolutions before it are scaled.

    Then what folds it in half precision rounds each weight once, not before and after it is scaled.
    """
    for module, norm_name, convolutions in _norms(model):
        norm = module.get_submodule(norm_name)
        norm.bias.copy_(_scale(convolutions, norm))
        norm.running_mean.zero_()
        norm.running_var.fill_(_DEVIATION**2)
        norm.weight.fill_(_DEVIATION)


def _norms(model: nn.Module) -> Iterator[tuple[nn.Module, str, list[nn.Conv2d]]]:
    """Modules, the names of their batch norms, and the convolutions whose sum each normalises."""
    for module in model.modules():
        if isinstance(module, MemoryEncoder):
            names = {"bn1": ["conv1", *module.guides]}
        elif isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[1], nn.BatchNorm2d):
            names = {"1": ["0"]}
        else:
            names = {"bn1": ["conv1"]} if hasattr(module, "bn1") else {}
        if isinstance(module, (BasicBlock, Bottleneck)):
            names["bn2"] = ["conv2"]
        if isinstance(module, Bottleneck):
            names["bn3"] = ["conv3"]
        for norm_name, convolutions in names.items():
            yield module, norm_name, [module.get_submodule(name) for name in convolutions]


@torch.no_grad()
def _scale(convolutions: list[nn.Conv2d], norm: nn.BatchNorm2d) -> Tensor:
    """Scale convolutions as the batch norm of their sum does; returns, in float32, the bias that is left to add."""
    gain = norm.weight.float() * torch.rsqrt(norm.running_var.float() + norm.eps)
    for convolution in convolutions:
        weight = convolution.weight
        weight.copy_((weight.float() * gain.view(-1, 1, 1, 1)).to(weight.dtype))
    return norm.bias.float() - norm.running_mean.float() * gain
