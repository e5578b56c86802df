"""Every kernel in its forms, with its default tiles, for GPUs that need not be here."""

from dataclasses import replace
from functools import cache
from itertools import product

import torch
from torch import Tensor

from stm_kernels.affinity import SKIP_POSITIONS, SKIP_QUERIES, Affinity
from stm_kernels.gpu.affinity import affinity_launch
from stm_kernels.gpu.forward import PageTable, forward_launch
from stm_kernels.gpu.launch import Launch
from stm_kernels.gpu.merge import merge_launch
from stm_kernels.gpu.tma import descriptor_launch
from stm_kernels.gpu.top_k import GROUP, group_max_launch, group_products_launch, select_launch
from stm_kernels.gpu.tuning import MAX_GROUPS, affinity_tiles, forward_tiles, group_tiles, usage_tiles
from stm_kernels.gpu.usage import usage_launch


@cache
def default_launches(
    dtype: torch.dtype, architecture: str, C: int = 128, V: int = 512, B: int = 2, M: int = 1620, N: int = 32400
) -> dict[str, Launch]:
    """Every kernel in its forms, with its default tiles, on the meta device: for token-major inputs, and those that
    read inputs for channel-major ones too.
    """

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    affinity = Affinity(empty(B, M, C), empty(B, N, C), C**-0.5)
    value, out = empty(B, N, V), empty(B, M, V)
    lse, delta, nothing = empty(B, M, of=torch.float64), empty(B, M, of=torch.float32), empty(B, 0, of=torch.uint8)
    # every argument that a kernel may go without
    full = replace(affinity, key_bias=empty(B, N, of=torch.float32), lengths=empty(B, of=torch.int32))
    kept = empty(B, M // SKIP_QUERIES + 1, N // SKIP_POSITIONS + 1, of=torch.uint8)
    # a part begins and ends with a tile
    part = N // 8 // 128 * 128
    partial = empty(8, B, M, V, of=torch.float32), empty(8, B, M, of=torch.float64)
    # as of squared distances
    plain_bias = replace(full, lengths=None, may_hide=False)
    (tiles, skip_tiles), (l2_tiles, l2_skip_tiles), (bias_tiles, full_skip_tiles) = (
        [
            forward_tiles(architecture, dtype, C, V, skips=skips, biased=biased, may_hide=may_hide)
            for skips in (False, True)
        ]
        for biased, may_hide in ((False, False), (True, False), (True, True))
    )
    engine_tiles = forward_tiles(architecture, dtype, C, V, descriptors=True)
    written, written_skipping = (affinity_tiles(architecture, dtype, C, skips=skips) for skips in (False, True))
    gradient = (value, out, delta, empty(B, M, N))
    table = empty(N // 1280, of=torch.int64)
    pages = PageTable(table, table, 1280, N)
    launches = {
        "read": forward_launch(affinity, value, out[None], lse[None], delta[None], nothing, 0.0, tiles, N),
        "read, split": forward_launch(affinity, value, *partial, empty(8, B, M), nothing, 0.0, tiles, part),
        "read, bias and lengths": forward_launch(
            full, value, out[None], lse[None], delta[None], nothing, 0.0, bias_tiles, N
        ),
        "read, l2": forward_launch(plain_bias, value, out[None], lse[None], delta[None], nothing, 0.0, l2_tiles, N),
        "read, skipping, l2": forward_launch(
            plain_bias, value, out[None], lse[None], delta[None], kept, 1e-3, l2_skip_tiles, N
        ),
        "read, skipping": forward_launch(affinity, value, out[None], lse[None], delta[None], kept, 1e-3, skip_tiles, N),
        "read, skipping, bias and lengths": forward_launch(
            full, value, out[None], lse[None], delta[None], kept, 1e-3, full_skip_tiles, N
        ),
        "read, paged": forward_launch(
            affinity, value, out[None], lse[None], delta[None], nothing, 0.0, tiles, N, pages
        ),
        "read, paged, l2": forward_launch(
            plain_bias, value, out[None], lse[None], delta[None], nothing, 0.0, l2_tiles, N, pages
        ),
        "merge": merge_launch(*partial, out, lse, architecture),
        "affinity": affinity_launch(affinity, lse, empty(B, M, N), written),
        "affinity and gradient": affinity_launch(affinity, lse, empty(B, M, N), written, gradient),
        "the same, skipping": affinity_launch(full, lse, empty(B, M, N), written_skipping, gradient, kept),
        "usage": usage_launch(affinity, lse, delta, usage_tiles(architecture, dtype, C)),
        "usage, bias and lengths": usage_launch(full, lse, delta, usage_tiles(architecture, dtype, C)),
    }
    if engine_tiles.kind != "portable":
        specialized = replace(engine_tiles, kind="warp-specialized", num_warps=4, num_stages=2)
        launches |= {
            "read, descriptors": descriptor_launch(affinity, value, out[None], lse[None], engine_tiles, N),
            "read, descriptors, l2": descriptor_launch(plain_bias, value, out[None], lse[None], engine_tiles, N),
            "read, descriptors, split": descriptor_launch(affinity, value, *partial, engine_tiles, part),
            "read, warp-specialized": descriptor_launch(affinity, value, out[None], lse[None], specialized, N),
        }
    launches |= _channel_major_launches(dtype, architecture, (B, M, N), C, V, kept)
    return launches | _top_k_launches(affinity, full, architecture)


def _channel_major_launches(
    dtype: torch.dtype, architecture: str, sizes: tuple[int, int, int], C: int, V: int, kept: Tensor
) -> dict[str, Launch]:
    """Reads, gradients, usage and maxima of keys and values that are `[B, C, N]` in memory; `kept` is the map of a read
    that may drop blocks.
    """
    B, M, N = sizes

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    affinity = Affinity(empty(B, C, M).mT, empty(B, C, N).mT, C**-0.5)
    full = replace(affinity, key_bias=empty(B, N, of=torch.float32), lengths=empty(B, of=torch.int32))
    forms = {"": affinity, ", l2": replace(full, lengths=None, may_hide=False), ", bias and lengths": full}
    value, out, nothing = empty(B, V, N).mT, empty(1, B, M, V), empty(B, 0, of=torch.uint8)
    lse, skipped = empty(1, B, M, of=torch.float64), empty(1, B, M, of=torch.float32)
    launches = {}
    for (name, one), skips in product(forms.items(), (False, True)):
        biased = one.key_bias is not None
        form = {"skips": skips, "biased": biased, "may_hide": biased and one.may_hide, "channel_major": True}
        tiles = forward_tiles(architecture, dtype, C, V, **form)
        blocks, skip = (kept, 1e-3) if skips else (nothing, 0.0)
        launch = forward_launch(one, value, out, lse, skipped, blocks, skip, tiles, N)
        launches[f"read, channel-major{', skipping' if skips else ''}{name}"] = launch
    row_top, delta, weights = lse[0], skipped[0], empty(B, M, N)
    gradient = (value, out[0], delta, empty(B, M, N))
    written, written_skipping = (affinity_tiles(architecture, dtype, C, skips=skips) for skips in (False, True))
    counted, groups = usage_tiles(architecture, dtype, C), group_tiles(architecture, dtype, C)
    maxima = empty(B * M, N // GROUP, of=torch.float32)
    for name, one in (("", affinity), (", bias and lengths", full)):
        launches |= {
            f"usage, channel-major{name}": usage_launch(one, row_top, delta, counted),
            f"maxima, channel-major{name}": group_max_launch(one, maxima, groups),
        }
    return launches | {
        "affinity and gradient, channel-major": affinity_launch(affinity, row_top, weights, written, gradient),
        "the same, channel-major, skipping": affinity_launch(full, row_top, weights, written_skipping, gradient, kept),
    }


def _top_k_launches(affinity: Affinity, full: Affinity, architecture: str, k: int = 30) -> dict[str, Launch]:
    """The kernels that choose the `k` best positions; `full` has all that an affinity may go without."""
    (B, M, N), query_key = affinity.sizes, affinity.query_key
    tiles = group_tiles(architecture, query_key.dtype, query_key.shape[2])

    def empty(columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(B * M, columns, dtype=dtype, device="meta")

    maxima, best, chosen = empty(N // GROUP), empty(k), empty(k, torch.int32)
    products, positions = empty(k + k * GROUP), empty(k + k * GROUP, torch.int32)
    gathered = (products[:, k:], positions[:, k:], tiles)
    return {
        "maxima": group_max_launch(affinity, maxima, tiles),
        "maxima, bias and lengths": group_max_launch(full, maxima, tiles),
        "chosen": group_products_launch(affinity, chosen, best, None, 0, *gathered),
        "chosen, bias and lengths": group_products_launch(full, chosen, best, empty(1), 0, *gathered),
        "selection": select_launch(products, positions, best, chosen, architecture),
        "selection, a whole tile": select_launch(empty(MAX_GROUPS), None, best, chosen, architecture),
        "selection, long rows": select_launch(empty(2 * MAX_GROUPS), None, best, chosen, architecture),
    }
