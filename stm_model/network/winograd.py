"""Convolutions of 3×3 by Winograd's minimal filtering: 36 products for 16 results, where the plain one takes 144.

In float32 a processor without matrix units is bound by its multiplications, and PyTorch's plain convolutions run at
their peak already. Tiles of 6×6 are transformed, multiplied channel by channel, and transformed back to 4×4 results.

Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016; the points of interpolation as in
Barabasz et al., Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks, 2020.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# one pool of threads for reads and convolutions
from stm_kernels.cpu.gemm import Scratch, even_slices
from stm_kernels.cpu.threads import Block, side_by_side, threads_of

MIN_FILTERS = 2**15
"""Input times output channels: with fewer, the transforms take as long as they save."""
STRIP_BYTES = 2 * 2**20
"""Of the transformed tiles of a strip of the map: with their products they stay in the second-level cache."""
_SIZE = 4
_TILE = _SIZE + 2
_POINTS = (1.0, 0.0, -1.0, 0.5, -2.0)
"""Where polynomials are evaluated, besides infinity. The first is 1: there every result has the same weight."""


def is_fast(convolution: nn.Conv2d) -> bool:
    """Whether a convolution can be computed like this, and is faster so."""
    form = (convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation)
    plain = form == ((3, 3), (1, 1), (1, 1), (1, 1)) and convolution.groups == 1
    wide = convolution.in_channels * convolution.out_channels >= MIN_FILTERS
    return plain and wide and convolution.weight.dtype == torch.float32


class WinogradConvolution(nn.Module):
    """A convolution of float32 maps on a CPU, and the ReLU behind it.

    Args:
        convolution: for which `is_fast` holds.
        relu: whether ReLU follows.
    """

    def __init__(self, convolution: nn.Conv2d, relu: bool = False):
        super().__init__()
        results, filters, tiles = (_twice(matrix) for matrix in _matrices())
        weight = convolution.weight.detach().permute(2, 3, 1, 0)
        transformed = filters.to(weight) @ weight.reshape(-1, weight[0, 0].numel())
        self.register_buffer("weight", transformed.view(-1, *weight.shape[2:]))
        self.register_buffer("to_tiles", tiles.float())
        self.register_buffer("to_results", results.float())
        self.bias, self.relu = convolution.bias, relu

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, out_channels, H, W]`, channels-last."""
        out = x.new_empty(len(x), x.shape[2], x.shape[3], self.weight.shape[2]).permute(0, 3, 1, 2)
        return self._compute(x, out, added=False)

    def onto(self, x: Tensor, total: Tensor) -> Tensor:
        """The sum of a channels-last map and the convolution, and the ReLU behind that; the map is overwritten."""
        return self._compute(x, total, added=True)

    def _compute(self, x: Tensor, out: Tensor, added: bool) -> Tensor:
        height, width = x.shape[2:]
        rows, columns = -(-height // _SIZE), -(-width // _SIZE)
        # zeros around the map, and behind it up to whole tiles
        padded = x.new_zeros(len(x), rows * _SIZE + 2, columns * _SIZE + 2, x.shape[1])
        padded[:, 1 : height + 1, 1 : width + 1] = x.permute(0, 2, 3, 1)
        out_rows = out.permute(0, 2, 3, 1)
        tile_bytes = len(self.weight) * max(self.weight.shape[1:]) * x.element_size()
        # large filters are read from memory for every strip
        longest = max(STRIP_BYTES, self.weight.nbytes // 8) // (tile_bytes * columns)
        longest = max(1, min(longest, -(-len(x) * rows // threads_of(x.device))))

        def work(strips: Sequence[Block], scratch: Scratch) -> None:
            for item, strip in strips:
                top, bottom = strip.start * _SIZE, strip.stop * _SIZE
                whole = self._strip(padded[item, top : bottom + 2], strip.stop - strip.start, columns, scratch)
                target = out_rows[item, top:bottom]
                results = whole[: len(target), :width]
                target.add_(results) if added else target.copy_(results)
                if self.relu:
                    target.relu_()

        side_by_side(work, [(item, strip) for item in range(len(x)) for strip in even_slices(rows, longest)], x.device)
        return out

    def _strip(self, padded: Tensor, rows: int, columns: int, scratch: Scratch) -> Tensor:
        """Rows of tiles `[4 * rows + 2, 4 * columns + 2, C]` to results `[4 * rows, 4 * columns, out_channels]`."""
        count, channels, out_channels = self.weight.shape
        down, across, _ = padded.stride()
        tiles = padded.as_strided(
            (_TILE, _TILE, rows, columns, channels), (down, across, _SIZE * down, _SIZE * across, 1)
        )
        gathered = scratch.take("tiles", (count, rows * columns * channels), padded.dtype)
        gathered.view(tiles.shape).copy_(tiles)
        transformed = scratch.take("transformed", gathered.shape, padded.dtype)
        torch.mm(self.to_tiles, gathered, out=transformed)
        products = scratch.take("products", (count, rows * columns * out_channels), padded.dtype)
        torch.bmm(transformed.view(count, -1, channels), self.weight, out=products.view(count, -1, out_channels))
        if self.bias is not None:
            # at the point 1 in both directions, which every result has once
            products[0].view(-1, out_channels).add_(self.bias)
        results = scratch.take("results", (_SIZE * _SIZE, rows * columns * out_channels), padded.dtype)
        torch.mm(self.to_results, products, out=results)
        ordered = scratch.take("ordered", (rows * _SIZE, columns * _SIZE * out_channels), padded.dtype)
        ordered = ordered.view(rows, _SIZE, columns, _SIZE, out_channels)
        ordered.copy_(results.view(_SIZE, _SIZE, rows, columns, out_channels).permute(2, 0, 3, 1, 4))
        return ordered.view(rows * _SIZE, columns * _SIZE, out_channels)


def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """What makes 4 results of products, transforms a filter of 3, and a tile of 6, in one direction.

    Products are values of polynomials at points: a filter's and a result's are evaluated, and a tile is transformed by
    what interpolates, transposed.
    """
    points = torch.tensor(_POINTS, dtype=torch.float64)

    def evaluate(terms: int) -> Tensor:
        at_infinity = F.one_hot(torch.tensor(terms - 1), terms)
        return torch.cat([torch.vander(points, terms, increasing=True), at_infinity[None]])

    return evaluate(_SIZE).mT, evaluate(3), torch.linalg.inv(evaluate(_TILE)).mT


def _twice(matrix: Tensor) -> Tensor:
    """The transform of rows and columns as one matrix."""
    return torch.kron(matrix, matrix)
