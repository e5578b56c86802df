"""The settings of a read as one value: checked when it is made, and once against the tensors that it is for."""

import math
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "triton", "chunked", "reference")
SIMILARITIES = ("dot", "l2")
# closer to 1, a float32 sum could not tell nearly all of the mass from all of it
MAX_SKIP = 1 - 2**-16


class PageKeywords(TypedDict, total=False):
    """The keyword arguments of `PagedMemory.read` that leave the form of its result as it is, for type checkers."""

    scale: float | None
    similarity: str
    top_k: int | None
    skip: float
    implementation: str


class ReadKeywords(PageKeywords, total=False):
    """Likewise those of `memory_read`."""

    key_bias: Tensor | None
    lengths: Tensor | None


@dataclass(frozen=True, eq=False)
class ReadOptions:
    """How a memory is read; every field as the argument of `memory_read`."""

    scale: float | None = None
    """Factor of the similarity; None is C ** -0.5."""
    similarity: str = "dot"
    """"dot" or "l2"."""
    key_bias: Tensor | None = None
    """`[B, N]`, any floating dtype."""
    lengths: Tensor | None = None
    """`[B]`, integers."""
    top_k: int | None = None
    """How many positions a query weighs; None is all."""
    skip: float = 0.0
    """Softmax mass that a query may drop, in [0, 1)."""
    implementation: str = "auto"
    """One of IMPLEMENTATIONS."""

    def __post_init__(self) -> None:
        for name, names in (("implementation", IMPLEMENTATIONS), ("similarity", SIMILARITIES)):
            if (given := getattr(self, name)) not in names:
                raise ValueError(f"{name}: expected one of {', '.join(names)}, got {given!r}")
        if self.scale is not None:
            _check_number("scale", self.scale, "a number or None")
            if not (math.isfinite(self.scale) and self.scale > 0):
                raise ValueError(f"scale: expected a positive finite number, got {self.scale}")
        if self.top_k is not None:
            if isinstance(self.top_k, bool) or not isinstance(self.top_k, (int, torch.SymInt)):
                raise TypeError(f"top_k: expected a whole number or None, got {type(self.top_k).__name__}")
            if self.top_k < 1:
                raise ValueError(f"top_k: expected at least 1, got {self.top_k}")
        _check_number("skip", self.skip, "a number")
        if not 0 <= self.skip < 1:
            raise ValueError(f"skip: expected a share of the softmax mass in [0, 1), got {self.skip}")
        if self.top_k is not None and self.skip:
            raise ValueError(f"skip: expected 0 beside top_k, which drops all other positions already, got {self.skip}")

    def scale_of(self, key_channels: int) -> float:
        """The factor of the similarity of keys with so many channels."""
        return key_channels**-0.5 if self.scale is None else float(self.scale)

    @property
    def dropped(self) -> float:
        """`skip` as the kernels take it."""
        return min(float(self.skip), MAX_SKIP)

    def meaning(self, key_channels: int) -> dict[str, Any]:
        """What the reference takes: all that defines the result, nothing of how it is computed."""
        names = ("similarity", "key_bias", "lengths", "top_k")
        return {"scale": self.scale_of(key_channels)} | {name: getattr(self, name) for name in names}

    def check(self, query_key: Tensor, memory_key: Tensor, memory_value: Tensor | None = None) -> None:
        """Raise TypeError or ValueError where these tensors, the bias and the lengths do not fit together."""
        for name, tensor in {"memory_key": memory_key, "memory_value": memory_value}.items():
            if tensor is not None:
                check_same(name, query_key, {"dtype": tensor.dtype, "device": tensor.device, "B =": tensor.shape[0]})
        (_, _, C), (B, N, key_channels) = query_key.shape, memory_key.shape
        if key_channels != C:
            raise ValueError(f"memory_key: expected C = {C} as in query_key, got {key_channels}")
        if C == 0:
            raise ValueError("query_key: expected at least one channel, got none")
        if memory_value is not None:
            if memory_value.shape[1] != N:
                raise ValueError(f"memory_value: expected N = {N} as in memory_key, got {memory_value.shape[1]}")
            if memory_value.shape[2] == 0:
                raise ValueError("memory_value: expected at least one channel, got none")
        if self.key_bias is not None:
            check_rows("key_bias", self.key_bias, query_key, (B, N), "[B, N]")
        if self.lengths is not None:
            check_rows("lengths", self.lengths, query_key, (B,), "[B]", floating=False)


def check_tensors(tensors: dict[str, Tensor], ndim: int = 3) -> None:
    """Raise where one of these is no floating-point tensor of so many axes."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        check_local(name, tensor)
        if tensor.is_nested or tensor.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got a {'nested' if tensor.is_nested else 'sparse'} one")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.itemsize < 2:
            raise TypeError(f"{name}: expected a floating-point tensor of 16 bits or more, got {tensor.dtype}")
        if tensor.ndim != ndim:
            raise ValueError(f"{name}: expected {ndim} axes, got {tensor.ndim} in shape {list(tensor.shape)}")


def check_local(name: str, tensor: Tensor) -> None:
    """Raise where a tensor is spread over processes, by its method: to import DTensor would cost a second."""
    if hasattr(tensor, "to_local"):
        raise TypeError(
            f"{name}: expected a tensor of this process, got a {type(tensor).__name__}; pass its .to_local()"
        )


def check_same(name: str, query_key: Tensor, found: dict[str, Any]) -> None:
    """Raise where the dtype, device or batch size of a tensor is not that of the query."""
    expected = {"dtype": query_key.dtype, "device": query_key.device, "B =": query_key.shape[0]}
    for what, got in found.items():
        if expected[what] != got:
            raise ValueError(f"{name}: expected {what} {expected[what]} as in query_key, got {got}")


def check_rows(
    name: str, tensor: Tensor, query_key: Tensor, shape: tuple[int, ...], letters: str, floating: bool = True
) -> None:
    """Raise where a tensor beside keys or queries (a bias, lengths, a log-sum-exp) does not fit them."""
    kind = "a floating-point tensor" if floating else "a tensor of integers"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected {kind}, got {type(tensor).__name__}")
    check_local(name, tensor)
    if tensor.is_floating_point() != floating or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: expected {kind}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected {letters} = {list(shape)}, got {list(tensor.shape)}")
    check_same(name, query_key, {"device": tensor.device})


def _check_number(name: str, value: float, kind: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected {kind}, got {type(value).__name__}")
