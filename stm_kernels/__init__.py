"""Exact space-time memory reads that never hold the affinity."""

from stm_kernels.memory.distributed import DistributedMemory, distributed_memory_read
from stm_kernels.memory.paged import PagedMemory
from stm_kernels.merge import merge_reads
from stm_kernels.operator import default_implementation
from stm_kernels.read import SpaceTimeMemoryRead, memory_read, memory_usage, space_time_memory_read
from stm_kernels.version import __version__

__all__ = [
    "__version__",
    "DistributedMemory",
    "PagedMemory",
    "SpaceTimeMemoryRead",
    "default_implementation",
    "distributed_memory_read",
    "memory_read",
    "memory_usage",
    "merge_reads",
    "space_time_memory_read",
]
