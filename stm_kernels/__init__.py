"""Exact space-time memory reads that never hold the affinity."""

from stm_kernels.read import SpaceTimeMemoryRead, default_implementation, memory_read, space_time_memory_read

__all__ = ["SpaceTimeMemoryRead", "default_implementation", "memory_read", "space_time_memory_read"]
