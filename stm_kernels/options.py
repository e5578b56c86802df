"""Errors of the public reads: one line that names the argument, what was expected and what came."""

import math
from typing import TypedDict

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "triton", "chunked", "reference")
SIMILARITIES = ("dot", "l2")
# nearer to 1, a float32 sum could not tell nearly all from all
MOST_SKIPPED = 1 - 2**-16


class ReadOptions(TypedDict, total=False):
    """The settings of `memory_read` by which the form of its result stays the same."""

    scale: float | None
    similarity: str
    key_bias: Tensor | None
    lengths: Tensor | None
    top_k: int | None
    skip: float
    implementation: str


def check_tensors(ndim: int = 3, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.ndim != ndim:
            raise ValueError(f"{name}: expected {ndim} axes, got {tensor.ndim} in shape {list(tensor.shape)}")


def check_agreement(query_key: Tensor, **memory: Tensor) -> None:
    for name, tensor in memory.items():
        for what, expected, got in (
            ("dtype", query_key.dtype, tensor.dtype),
            ("device", query_key.device, tensor.device),
            ("B =", query_key.shape[0], tensor.shape[0]),
        ):
            if expected != got:
                raise ValueError(f"{name}: expected {what} {expected} as in query_key, got {got}")
    memory_key, memory_value = memory["memory_key"], memory.get("memory_value")
    if memory_key.shape[2] != query_key.shape[2]:
        raise ValueError(f"memory_key: expected C = {query_key.shape[2]} as in query_key, got {memory_key.shape[2]}")
    if query_key.shape[2] == 0:
        raise ValueError("query_key: expected at least one channel, got none")
    if memory_value is None:
        return
    if memory_value.shape[1] != memory_key.shape[1]:
        raise ValueError(
            f"memory_value: expected N = {memory_key.shape[1]} as in memory_key, got {memory_value.shape[1]}"
        )
    if memory_value.shape[2] == 0:
        raise ValueError("memory_value: expected at least one channel, got none")


def checked_affinity(
    query_key: Tensor,
    memory_key: Tensor,
    scale: float | None,
    similarity: str,
    key_bias: Tensor | None,
    lengths: Tensor | None,
    implementation: str,
) -> float:
    """The scale; raises where a setting of the affinity is wrong."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity: expected one of {', '.join(SIMILARITIES)}, got {similarity!r}")
    B, N = memory_key.shape[:2]
    if key_bias is not None:
        check_rows("key_bias", key_bias, query_key, (B, N), "[B, N]")
    if lengths is not None:
        check_rows("lengths", lengths, query_key, (B,), "[B]", floating=False)
    return query_key.shape[2] ** -0.5 if scale is None else checked_scale(scale)


def check_rows(
    name: str, tensor: Tensor, query_key: Tensor, shape: tuple[int, ...], letters: str, floating: bool = True
) -> None:
    """Refuse what stands beside keys or queries: a bias, lengths, a log-sum-exp."""
    kind = "a floating-point tensor" if floating else "a tensor of integers"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected {kind}, got {type(tensor).__name__}")
    if tensor.is_floating_point() != floating or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: expected {kind}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected {letters} = {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != query_key.device:
        raise ValueError(f"{name}: expected device {query_key.device} as in query_key, got {tensor.device}")


def checked_choice(top_k: int | None, skip: float) -> tuple[int, float]:
    """How many positions to weigh, 0 for all, and the weight that may be left out."""
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, (int, torch.SymInt))):
        raise TypeError(f"top_k: expected a whole number or None, got {type(top_k).__name__}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    if isinstance(skip, bool) or not isinstance(skip, (int, float, torch.SymFloat)):
        raise TypeError(f"skip: expected a number, got {type(skip).__name__}")
    if not 0 <= skip < 1:
        raise ValueError(f"skip: expected a weight from 0 to below 1, got {skip}")
    if top_k is not None and skip:
        raise ValueError(f"skip: expected 0 beside top_k, which leaves all others out already, got {skip}")
    return top_k or 0, min(float(skip), MOST_SKIPPED)


def checked_scale(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: expected a positive finite number, got {scale}")
    return float(scale)
