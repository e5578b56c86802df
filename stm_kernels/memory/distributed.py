"""The read of a memory sharded over processes: each reads its shard, and the reads are merged by log-sum-exp."""

import math
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from stm_kernels.affinity import wide_dtype
from stm_kernels.memory.paged import PagedMemory
from stm_kernels.merge import ReadResult
from stm_kernels.options import ReadOptions
from stm_kernels.read import checked_inputs, read_checked


class DistributedMemory:
    """A growing memory whose frames are distributed round-robin over the ranks of a process group.

    Every rank makes the same calls with the same arguments; each holds its share. If a rank dies, the others raise the
    process group's error, at the latest after its timeout.

    Args:
        batch, key_channels, value_channels, page_size, dtype, device: as in `PagedMemory`, of this rank's shard.
        group: the process group; None is the default one.

    Raises:
        RuntimeError: `torch.distributed` is not initialised.
        ValueError, TypeError: as in `PagedMemory`.
    """

    def __init__(
        self,
        batch: int,
        key_channels: int,
        value_channels: int,
        *,
        page_size: int = 32768,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        _check_group()
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.shard = PagedMemory(batch, key_channels, value_channels, page_size=page_size, dtype=dtype, device=device)
        self._length = self._appended = 0

    def __len__(self) -> int:
        """Positions held by all ranks together."""
        return self._length

    def append(self, key: Tensor, value: Tensor) -> None:
        """Append P positions to the shard of one rank, in turn; arguments and errors as in `PagedMemory.append`."""
        if self._appended % self.ranks == self.rank:
            self.shard.append(key, value)
        else:
            self.shard.check(key, value)
        self._length += key.shape[1]
        self._appended += 1

    @overload
    def read(self, query_key: Tensor, *, scale: float | None = None, implementation: str = "auto") -> Tensor: ...
    @overload
    def read(
        self, query_key: Tensor, *, scale: float | None = None, return_lse: bool, implementation: str = "auto"
    ) -> Any: ...
    def read(
        self, query_key: Tensor, *, scale: float | None = None, return_lse: bool = False, implementation: str = "auto"
    ) -> Tensor | tuple[Tensor, ...]:
        """Read the shards of all ranks; every rank gets the same result, that of one whole memory.

        Args:
            query_key: `[B, M, C]`, the same on every rank.
            scale, return_lse, implementation: as in `PagedMemory.read`.

        Returns:
            As `PagedMemory.read`, differentiable by the query as in `distributed_memory_read`.

        Raises:
            TypeError, ValueError, ImportError: as in `memory_read`.
            RuntimeError: another rank died.
        """
        options = ReadOptions(scale, implementation=implementation)
        part = self.shard.read_all(_Shared.apply(query_key, self.group), options)
        return _merged(part, self.group).chosen(return_lse)


@overload
def distributed_memory_read(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    scale: float | None = None,
    implementation: str = "auto",
    group: dist.ProcessGroup | None = None,
) -> Tensor: ...
@overload
def distributed_memory_read(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool,
    implementation: str = "auto",
    group: dist.ProcessGroup | None = None,
) -> Any: ...
def distributed_memory_read(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
    group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Read a memory of which every rank holds a shard; every rank gets the read of the whole.

    Args:
        query_key: `[B, M, C]`, the same on every rank.
        memory_key: `[B, N, C]`, this rank's shard; N may differ from rank to rank, 0 included.
        memory_value: `[B, N, V]`.
        scale, return_lse, implementation: as in `memory_read`.
        group: the process group; None is the default one.

    Returns:
        As `memory_read` of all shards, the same on every rank. Its gradients are those of one process with the whole
        memory, provided that every rank differentiates the same function of the result: by the query the same on every
        rank, by the memory those of the rank's own shard.

    Raises:
        TypeError, ValueError, ImportError: as in `memory_read`.
        RuntimeError: another rank died.
    """
    _check_group()
    options = ReadOptions(scale, implementation=implementation)
    query_key, *memory = checked_inputs(options, query_key, memory_key, memory_value)
    part = read_checked(options, _Shared.apply(query_key, group), *memory)
    return _merged(part, group).chosen(return_lse)


def _check_group() -> None:
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed: expected an initialised process group, call init_process_group first")


def _merged(part: ReadResult, group: dist.ProcessGroup | None) -> ReadResult:
    """The read of the whole, on every rank, from each rank's part; rounded once."""
    out, lse = _Merge.apply(part.out.to(wide_dtype(part.out.dtype)), part.lse, group)
    return ReadResult(out.to(part.out.dtype), lse, part.skipped)


class _Shared(torch.autograd.Function):
    """The identity of a tensor that is the same on all ranks: its gradient is summed over them."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # summed in float32: rounded once, not once a rank
        total = grad.to(wide_dtype(grad.dtype)).contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total.to(grad.dtype), None


class _Merge(torch.autograd.Function):
    """`merge_reads` over ranks, of one part each."""

    @staticmethod
    def forward(ctx, out: Tensor, lse: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        top = lse.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        unseen = top.isneginf()
        top = top.masked_fill(unseen, 0.0)
        weight = (lse - top).exp()
        total = weight.clone()
        dist.all_reduce(total, group=group)
        weight = (weight / total.masked_fill(unseen, 1.0)).to(out.dtype)
        merged = weight[..., None] * out
        dist.all_reduce(merged, group=group)
        ctx.save_for_backward(weight, out, merged)
        return merged, (top + total.log()).masked_fill(unseen, -math.inf)

    @staticmethod
    def backward(ctx, grad_out: Tensor, grad_lse: Tensor):
        weight, out, merged = ctx.saved_tensors
        by_lse = (grad_out * (out - merged)).sum(-1) + grad_lse
        return weight[..., None] * grad_out, weight * by_lse, None
