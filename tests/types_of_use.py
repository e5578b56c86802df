"""What a type checker makes of a user's code: checked by mypy in `make lint`, never run."""

from typing import Any

from torch import Tensor
from typing_extensions import assert_type

from stm_kernels import DistributedMemory, PagedMemory, SpaceTimeMemoryRead, memory_read, space_time_memory_read


def use(tensor: Tensor, paged: PagedMemory, distributed: DistributedMemory) -> None:
    assert_type(memory_read(tensor, tensor, tensor), Tensor)
    assert_type(memory_read(tensor, tensor, tensor, similarity="l2", top_k=3), Tensor)
    assert_type(memory_read(tensor, tensor, tensor, return_lse=True), Any)
    assert_type(space_time_memory_read(tensor, tensor, tensor, skip=0.1), Tensor)
    assert_type(paged.read(tensor, top_k=3), Tensor)
    assert_type(distributed.read(tensor), Tensor)
    memory_read(tensor, tensor, tensor, topk=3)  # type: ignore[call-overload]
    assert_type(SpaceTimeMemoryRead().forward(tensor, tensor, tensor, tensor), tuple[Tensor, None])
