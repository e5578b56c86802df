"""The read of the k best memory positions of each query."""

from collections.abc import Callable

from torch import Tensor

from stm_kernels.affinity import Affinity

Select = Callable[[Affinity, int], tuple[Tensor, Tensor]]


def top_k_read(affinity: Affinity, memory_value: Tensor, k: int, select: Select) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError


def top_k_read_backward(grad_out, grad_lse, affinity, memory_value, out, lse, indices):
    raise NotImplementedError


def chunked_select(affinity: Affinity, k: int) -> tuple[Tensor, Tensor]:
    raise NotImplementedError
