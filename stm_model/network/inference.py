"""The network as it runs when it only predicts: batch norm and activations folded into the convolutions before them,
wide ones with fewer products; in eight bits or compiled."""

import os
import shutil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stm_model.network.batch_norm import fold_batch_norm
from stm_model.network.decoder import ResBlock
from stm_model.network.efficientnet import InvertedResidual
from stm_model.network.encoders import QueryEncoder
from stm_model.network.int8 import quantize
from stm_model.network.resnet import BasicBlock, Bottleneck
from stm_model.network.shared import SharedEncoder
from stm_model.network.stm import STM
from stm_model.network.winograd import WinogradConvolution, is_fast

MAX_WIDE_BYTES = 8 * 2**20
"""An inverted residual whose widest map is larger than this is computed in strips."""
STRIP_BYTES = 5 * 2**19
"""Of the widest map of a strip: it stays in the second- and third-level caches."""
MAX_PACKED_BYTES = 2**20
"""Of a convolution's weights: larger ones are not kept in oneDNN's order as well."""
_ACTIVATIONS: dict[type, tuple[str, list[float], str]] = {
    type(None): ("none", [], ""),
    nn.ReLU: ("relu", [], ""),
    nn.ReLU6: ("hardtanh", [0.0, 6.0], ""),
}
"""As oneDNN's operators in PyTorch name them."""


def for_inference(model: STM, compiled: bool = False) -> STM:
    """A copy of a network in eval mode that predicts the same, faster, and can no longer be trained.

    Args:
        model: the network; one that was loaded as int8 gets convolutions in eight bits.
        compiled: compile it, see `compile_parts`.

    Raises:
        ValueError: eight bits are to be compiled, or there is nothing to compile with.
    """
    if compiled and model.int8:
        raise ValueError("compiled: expected a network in floating point, got int8")
    folded = fold_batch_norm(model)
    if compiled:
        return compile_parts(folded)
    if model.int8:
        quantize(folded)
    return fuse_activations(folded)


def fuse_activations(model: STM) -> STM:
    """Let oneDNN compute the convolutions of a network without batch norm, where it can, with what is behind them: the
    activation, and the shortcut's sum; or `WinogradConvolution`, where that is faster.

    PyTorch by itself takes other ways for some of them, and an activation or a sum of its own reads and writes a whole
    map. The network is changed in place; its maps become channels-last, in which alone sums are fused in bfloat16.
    """
    if not _by_onednn(next(model.parameters())):
        return model
    model.to(memory_format=torch.channels_last)
    for module in [*model.modules()]:
        if isinstance(module, InvertedResidual):
            if module.expand is not None:
                module.expand = _Convolution(module.expand[0], module.relu)
            module.depthwise = _Convolution(module.depthwise[0], module.relu)
            module.project = _Convolution(module.project[0])
        elif isinstance(module, (QueryEncoder, SharedEncoder)):
            module.conv1 = _Convolution(module.conv1, module.relu)
        elif isinstance(module, nn.Sequential) and [*map(type, module)] == [nn.Conv2d, nn.ReLU, nn.Conv2d]:
            module[0], module[1] = _convolution(module[0], module[1]), nn.Identity()
            continue
        else:
            continue
        module.relu = nn.Identity()
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if isinstance(child, (BasicBlock, Bottleneck, ResBlock)) and type(child.conv1) is nn.Conv2d:
                setattr(module, name, _Residual(child))
            elif isinstance(child, nn.Conv2d):
                setattr(module, name, _convolution(child))
            elif isinstance(child, InvertedResidual):
                setattr(module, name, _StripedResidual(child))
    return model


def _by_onednn(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    native = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return native or weight.dtype == torch.float32


def _convolution(convolution: nn.Conv2d, relu: nn.ReLU | None = None) -> "WinogradConvolution | _Convolution":
    if is_fast(convolution):
        return WinogradConvolution(convolution, relu is not None)
    return _Convolution(convolution, relu)


class _Convolution(nn.Module):
    """A convolution, and the ReLU or ReLU6 behind it in one pass, by the operators that torch.compile generates."""

    def __init__(self, convolution: nn.Conv2d, activation: nn.Module | None = None):
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.padding = convolution.padding
        self.settings = [*map(list, (convolution.padding, convolution.stride, convolution.dilation))]
        self.groups = convolution.groups
        self.activation: tuple[str, list[float], str] = _ACTIVATIONS[type(activation)]
        self._packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        convolve = torch.ops.mkldnn._convolution_pointwise
        return convolve(x, self._filters(x), self.bias, *self.settings, self.groups, *self.activation)

    def between_rows(self, x: Tensor) -> Tensor:
        """The convolution of rows that have their neighbours above and below beside them."""
        (_, across), *settings = self.settings
        convolve = torch.ops.mkldnn._convolution_pointwise
        return convolve(x, self._filters(x), self.bias, [0, across], *settings, self.groups, *self.activation)

    def onto(self, x: Tensor, total: Tensor) -> Tensor:
        """The sum of a map and the convolution, and the ReLU behind that; the map is overwritten."""
        add = torch.ops.mkldnn._convolution_pointwise_.binary
        name, *settings = self.activation
        activation = (None if name == "none" else name, *settings)
        return add(total, x, self._filters(x), self.bias, *self.settings, self.groups, "add", 1.0, *activation)

    def _filters(self, x: Tensor) -> Tensor:
        """The weights in the order that is fastest for maps of the first one's size; oneDNN would order them anew in
        every call. Large ones would be held twice.
        """
        if self.weight.nbytes > MAX_PACKED_BYTES:
            return self.weight
        if self._packed is None:
            pack = torch.ops.mkldnn._reorder_convolution_weight
            self._packed = pack(self.weight, *self.settings, self.groups, list(x.shape))
        return self._packed


class _Residual(nn.Module):
    """A residual block without batch norm; its input is overwritten where that is the shortcut: no other reads it."""

    def __init__(self, block: BasicBlock | Bottleneck | ResBlock):
        super().__init__()
        *between, last = (child for name, child in block.named_children() if name.startswith("conv"))
        self.activated_before = isinstance(block, ResBlock)
        relu = nn.ReLU()
        self.between = nn.Sequential(*(_convolution(convolution, relu) for convolution in between))
        self.last = _convolution(last, None if self.activated_before else relu)
        self.downsample = None if self.activated_before else block.downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.between(F.relu(x) if self.activated_before else x)
        return self.last.onto(out, x if self.downsample is None else self.downsample(x))


class _StripedResidual(nn.Module):
    """An inverted residual, a strip of rows after the other where its widest map is large.

    That map, six times as wide as what goes in, never leaves the caches, and its memory is not fresh for every frame:
    page faults take longer than the arithmetic.
    """

    def __init__(self, block: InvertedResidual):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        depthwise: _Convolution = self.block.depthwise
        row_bytes = len(x) * depthwise.groups * x.shape[3] * x.element_size()
        if x.shape[2] * row_bytes <= MAX_WIDE_BYTES:
            return self.block(x)
        kernel, stride, padding = depthwise.weight.shape[2], depthwise.settings[1][0], depthwise.padding[0]
        rows = max((STRIP_BYTES // row_bytes - kernel) // stride + 1, 1)
        height = (x.shape[2] + 2 * padding - kernel) // stride + 1
        strips = []
        for first in range(0, height, rows):
            start = first * stride - padding
            stop = (min(first + rows, height) - 1) * stride - padding + kernel
            seen = x[:, :, max(start, 0) : stop]
            wide = seen if self.block.expand is None else self.block.expand(seen)
            above, below = max(-start, 0), max(stop - x.shape[2], 0)
            if above or below:
                wide = F.pad(wide, (0, 0, above, below))
            strips.append(self.block.project(depthwise.between_rows(wide)))
        out = torch.cat(strips, 2)
        return out.add_(x) if self.block.has_shortcut else out


def compile_parts(model: STM) -> STM:
    """The network with its encoders and its decoder compiled, when they first run, for the sizes they meet.

    Weights become constants: the network only predicts, and must not be changed any more. Another frame size or number
    of objects compiles anew.

    Raises:
        ValueError: the network is on a CPU, and there is no C++ compiler.
    """
    compilers = (os.environ.get("CXX", "g++"), "g++", "clang++")
    if next(model.parameters()).device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise ValueError("compiled: expected a C++ compiler (g++, clang++ or the one that CXX names), got none")
    for part in ("encode_query", "memorize", "segment"):
        compiled = torch.compile(getattr(model, part), dynamic=False, options={"freezing": True})
        setattr(model, part, compiled)
    return model
