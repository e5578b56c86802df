"""The read and its backward as a pair of PyTorch operators: what compile, autograd, autocast and vmap see of them."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from stm_kernels.chunked import chunked_read, chunked_read_backward

TRITON_KEY_CHANNELS = 256


@torch.library.custom_op("stm_kernels::memory_read", mutates_args=())
def read_operator(
    query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float, implementation: str
) -> tuple[Tensor, Tensor]:
    """Read by a named implementation, "auto" resolved by the device of the inputs.

    Returns:
        The read `[B, M, V]` in the dtype of the inputs and its log-sum-exp `[B, M]`, always in float64: the backward
        pass subtracts it from every logit.
    """
    if min(*query_key.shape, *memory_value.shape) == 0:
        B, M, V = *query_key.shape[:2], memory_value.shape[2]
        return query_key.new_zeros(B, M, V), query_key.new_full((B, M), float("-inf"), dtype=torch.float64)
    if _resolve(implementation, query_key) == "triton":
        from stm_kernels.gpu.forward import triton_read

        return triton_read(query_key, memory_key, memory_value, scale)
    return chunked_read(query_key, memory_key, memory_value, scale)


@read_operator.register_fake
def _(query_key: Tensor, memory_key: Tensor, memory_value: Tensor, scale: float, implementation: str):
    B, M, _ = query_key.shape
    return query_key.new_empty(B, M, memory_value.shape[2]), query_key.new_empty(B, M, dtype=torch.float64)


@torch.library.custom_op("stm_kernels::memory_read_backward", mutates_args=())
def backward_operator(
    grad_out: Tensor,
    grad_lse: Tensor,
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `read_operator` by its three tensors, laid out as `torch.empty_like` of each."""
    if min(*query_key.shape, *memory_value.shape) == 0:
        return torch.zeros_like(query_key), torch.zeros_like(memory_key), torch.zeros_like(memory_value)
    if _resolve(implementation, query_key) == "triton":
        from stm_kernels.gpu.backward import triton_read_backward

        return triton_read_backward(grad_out, grad_lse, query_key, memory_key, memory_value, out, lse, scale)
    return chunked_read_backward(grad_out, grad_lse, query_key, memory_key, memory_value, out, lse, scale)


@backward_operator.register_fake
def _(grad_out, grad_lse, query_key, memory_key, memory_value, out, lse, scale, implementation):
    return torch.empty_like(query_key), torch.empty_like(memory_key), torch.empty_like(memory_value)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.implementation = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, grad_out: Tensor, grad_lse: Tensor):
    return *backward_operator(grad_out, grad_lse, *ctx.saved_tensors, ctx.scale, ctx.implementation), None, None


def _refuse(ctx, *grads):
    raise NotImplementedError(
        'memory_read: second derivatives exist only with implementation="reference", '
        "the others recompute the affinity in their backward pass"
    )


read_operator.register_autograd(_differentiate, setup_context=_save)
backward_operator.register_autograd(_refuse)


@read_operator.register_vmap
def _(info, in_dims, *inputs):
    return _fold(read_operator, info.batch_size, in_dims, inputs)


@backward_operator.register_vmap
def _(info, in_dims, *inputs):
    return _fold(backward_operator, info.batch_size, in_dims, inputs)


def _fold(operator, size: int, in_dims: tuple, inputs: tuple):
    """Run an operator on inputs with one more batch axis, folded into B."""
    folded = []
    for dim, value in zip(in_dims, inputs):
        if isinstance(value, Tensor):
            value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
            value = value.flatten(0, 1)
        folded.append(value)
    outputs = operator(*folded)
    return tuple(output.unflatten(0, (size, len(output) // size)) for output in outputs), (0,) * len(outputs)


def _resolve(implementation: str, query_key: Tensor) -> str:
    """The implementation to run: "auto" takes what can read this query, one asked for by name must be able to."""
    on_gpu = default_implementation(query_key.device) == "triton"
    fits = query_key.dtype != torch.float64 and query_key.shape[2] <= TRITON_KEY_CHANNELS
    if implementation == "auto":
        return "triton" if on_gpu and fits else "chunked"
    if implementation == "triton":
        if not find_spec("triton"):
            raise ImportError(
                'implementation: "triton" needs the package triton, which is not installed; use "chunked"'
            )
        if not query_key.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f'implementation: "triton" needs tensors on a GPU, got {query_key.device}; use "chunked"')
        if not fits:
            raise ValueError(
                f'implementation: "triton" reads float16, bfloat16 and float32 with C up to {TRITON_KEY_CHANNELS}, '
                f'got {query_key.dtype} with C = {query_key.shape[2]}; use "chunked"'
            )
    return implementation


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that autocast asks of a matrix product: float64 stays, as it does there.

    `torch.library.register_autocast` would tie a device to one dtype for good; autocast's dtype is the caller's choice.
    """
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def default_implementation(device: torch.device | str) -> str:
    """Name the implementation that `auto` takes on a device.

    Args:
        device: the device of the inputs.

    Returns:
        "triton" for a GPU where triton is installed, else "chunked".
    """
    return "triton" if torch.device(device).type == "cuda" and find_spec("triton") else "chunked"
