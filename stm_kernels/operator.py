"""The read, its backward and the usage as PyTorch operators: what compile, autograd, autocast and vmap see of them.

An operator of torch.library takes tensors and numbers, no dataclass: `read` and `usage` flatten the options,
`_affinity_of` restores the affinity.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Optional

import torch
from torch import Tensor

from stm_kernels.affinity import Affinity, block_map_shape, wide_dtype
from stm_kernels.cpu.chunked import chunked_read, chunked_read_backward
from stm_kernels.cpu.flash import flash_read, flash_reads
from stm_kernels.cpu.select import chunked_select
from stm_kernels.cpu.skip import skipping_read
from stm_kernels.cpu.top_k import Select, top_k_read, top_k_read_backward, top_k_usage
from stm_kernels.cpu.usage import chunked_usage
from stm_kernels.merge import ReadResult
from stm_kernels.options import ReadOptions

TRITON_KEY_CHANNELS = 256


def read(options: ReadOptions, query_key: Tensor, memory_key: Tensor, memory_value: Tensor) -> ReadResult:
    """Read by `options.implementation`, but "reference"; the inputs are checked."""
    key_bias, lengths, scale, shift = flat(options, query_key, memory_key)
    settings = (scale, options.top_k or 0, options.dropped, options.implementation, options.key_bias is not None)
    out, lse, skipped, _ = read_operator(query_key, memory_key, memory_value, key_bias, lengths, *settings)
    return ReadResult(out, lse if shift is None else shift_back(lse, shift), skipped)


def select(options: ReadOptions, query_key: Tensor, memory_key: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The positions that a top-k read weighs, their logits, and what `shift_back` takes from their log-sum-exp."""
    key_bias, lengths, scale, shift = flat(options, query_key, memory_key)
    may_hide = options.key_bias is not None
    affinity, k = _affinity_of(query_key, memory_key, key_bias, lengths, scale, may_hide), options.top_k or 0
    if not query_key.numel():
        nothing = query_key.new_zeros(*query_key.shape[:2], min(k, memory_key.shape[1]))
        return nothing.int(), nothing.to(wide_dtype(query_key.dtype)), shift
    on_gpu = resolve_implementation(options.implementation, query_key) == "triton"
    return *_select_of(on_gpu)(affinity, k), shift


def usage(options: ReadOptions, lse: Tensor | None, query_key: Tensor, memory_key: Tensor) -> Tensor:
    """Column sums of the affinity, by `options.implementation`, but "reference"; the inputs are checked."""
    key_bias, lengths, scale, shift = flat(options, query_key, memory_key)
    if lse is not None:
        lse = lse.double() if shift is None else lse.double() + shift
    settings = (scale, options.top_k or 0, options.implementation, options.key_bias is not None)
    return usage_operator(query_key, memory_key, key_bias, lengths, lse, *settings)


def _shown(memory: Tensor, key_bias: Tensor | None, implementation: str, may_hide: bool) -> Tensor:
    """Keys or values `[B, N, ·]` as plain PyTorch may multiply them: finite where they are hidden.

    Triton's kernels leave hidden positions out themselves.
    """
    if key_bias is None or not may_hide or implementation == "triton" or not (hidden := key_bias.isneginf()).any():
        return memory
    # a sum is finite only where all its terms are
    hidden &= ~memory.sum(2).isfinite()
    return memory.masked_fill(hidden[:, :, None], 0.0) if hidden.any() else memory


def shift_back(lse: Tensor, shift: Tensor) -> Tensor:
    """The log-sum-exp of squared distances from that of their dot product."""
    # a query with no visible key has no gradient by its shift either
    return lse - shift.masked_fill(lse.isneginf(), 0.0)


def flat(
    options: ReadOptions, query_key: Tensor, memory_key: Tensor
) -> tuple[Tensor | None, Tensor | None, float, Tensor | None]:
    """Bias, lengths and scale as the operators take them, and what `shift_back` takes from their log-sum-exp.

    -scale · |q - k|² is 2 · scale · q · k - scale · |k|² - scale · |q|²: a dot product, a bias of the position, and a
    shift of the whole row, which the softmax does not see.
    """
    wide, scale = wide_dtype(query_key.dtype), options.scale_of(query_key.shape[2])
    key_bias = None if options.key_bias is None else options.key_bias.to(wide).contiguous()
    lengths = None if options.lengths is None else options.lengths.to(torch.int32).contiguous()
    if options.similarity == "dot":
        return key_bias, lengths, scale, None
    visible = memory_key.to(wide)
    # a gradient of 0 times NaN is NaN
    if lengths is not None:
        padding = torch.arange(memory_key.shape[1], device=lengths.device) >= lengths[:, None]
        visible = visible.masked_fill(padding[:, :, None], 0.0)
    if key_bias is not None:
        visible = visible.masked_fill(key_bias.isneginf()[:, :, None], 0.0)
    square = visible.square().sum(2) * -scale
    shift = query_key.double().square().sum(2) * scale
    return square if key_bias is None else square + key_bias, lengths, 2 * scale, shift


def _affinity_of(
    query_key: Tensor,
    memory_key: Tensor,
    key_bias: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    may_hide: bool = True,
) -> Affinity:
    """The affinity, from the arguments of an operator.

    Raises:
        ValueError: a length is out of range, where looking at it costs no wait for a GPU; a kernel clamps it.
    """
    N = memory_key.shape[1]
    if lengths is not None and lengths.device.type == "cpu" and lengths.numel():
        smallest, largest = int(lengths.min()), int(lengths.max())
        if smallest < 0 or largest > N:
            raise ValueError(f"lengths: expected 0 to N = {N} positions, got {smallest if smallest < 0 else largest}")
    return Affinity(query_key, memory_key, scale, key_bias, lengths, may_hide)


def _operator(name: str) -> Callable[[Callable], Any]:
    """Make a function the operator `stm_kernels::name` on every device; it changes none of its arguments.

    torch.library.custom_op would import torch._dynamo at the operator's first call: a second in every process.
    """

    def define(function: Callable) -> Any:
        full_name = f"stm_kernels::{name}"
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(full_name, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(full_name, "default")(function)
        return getattr(torch.ops.stm_kernels, name).default

    return define


@_operator("memory_read")
def read_operator(
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    key_bias: Optional[Tensor],  # noqa: UP045  the schema of an operator is read from this spelling
    lengths: Optional[Tensor],  # noqa: UP045
    scale: float,
    top_k: int,
    skip: float,
    implementation: str,
    may_hide: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read by a named implementation, "auto" resolved by the device of the inputs.

    Args:
        query_key, memory_key, memory_value: as in `memory_read`.
        key_bias, lengths, scale: as in `Affinity`.
        top_k: 0 is all.
        skip: 0 is the exact read.
        implementation: as in `memory_read`, but "reference".
        may_hide: as in `Affinity`.

    Returns:
        The read `[B, M, V]` in the dtype of the inputs; its log-sum-exp `[B, M]`, always in float64: the backward pass
        subtracts it from every logit; the dropped mass `[B, M]`, float32; and the choice that was made, for the
        backward pass: `[B, M, min(k, N)]` int32, the chosen positions, for a top-k read; for one that skips by triton
        `[B, ⌈M / SKIP_QUERIES⌉, ⌈N / SKIP_POSITIONS⌉]` uint8, 1 where a block's values were read; else `[B, 0]`.
    """
    implementation = resolve_implementation(implementation, query_key)
    memory_key, memory_value = (_shown(part, key_bias, implementation, may_hide) for part in (memory_key, memory_value))
    affinity = _affinity_of(query_key, memory_key, key_bias, lengths, scale, may_hide)
    if min(*query_key.shape, *memory_value.shape) == 0:
        out, lse, skipped, choice = _outputs(affinity, memory_value, top_k, skip, implementation)
        return out.zero_(), lse.fill_(float("-inf")), skipped.zero_(), choice.zero_()
    on_gpu = implementation == "triton"
    if top_k:
        out, lse, choice = top_k_read(affinity, memory_value, top_k, _select_of(on_gpu))
        return out, lse, torch.zeros_like(lse, dtype=torch.float32), choice
    if on_gpu:
        from stm_kernels.gpu.forward import triton_read

        return triton_read(affinity, memory_value, skip)
    if flash_reads(affinity, memory_value):
        # with `skip` too, which may drop mass and need not
        out, lse = flash_read(affinity, memory_value)
        found = out, lse, torch.zeros_like(lse, dtype=torch.float32)
    else:
        found = skipping_read(affinity, memory_value, skip) if skip else chunked_read(affinity, memory_value)
    return *found, query_key.new_zeros(len(query_key), 0, dtype=torch.uint8)


@torch.library.register_fake(read_operator)
def _(query_key, memory_key, memory_value, key_bias, lengths, scale, top_k, skip, implementation, may_hide=True):
    implementation = resolve_implementation(implementation, query_key)
    return _outputs(Affinity(query_key, memory_key, scale), memory_value, top_k, skip, implementation)


def _outputs(
    affinity: Affinity, memory_value: Tensor, top_k: int, skip: float, implementation: str
) -> tuple[Tensor, ...]:
    """Empty tensors in the form of what `read_operator` returns."""
    B, M, N = affinity.sizes
    if top_k:
        choice = memory_value.new_empty(B, M, torch.sym_min(top_k, N), dtype=torch.int32)
    else:
        blocks = block_map_shape(B, M, N, skip if implementation == "triton" else 0.0)
        choice = memory_value.new_empty(blocks, dtype=torch.uint8)
    out = memory_value.new_empty(B, M, memory_value.shape[2])
    return out, out.new_empty(B, M, dtype=torch.float64), out.new_empty(B, M, dtype=torch.float32), choice


@_operator("memory_read_backward")
def backward_operator(
    grad_out: Tensor,
    grad_lse: Tensor,
    query_key: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    key_bias: Optional[Tensor],  # noqa: UP045
    lengths: Optional[Tensor],  # noqa: UP045
    out: Tensor,
    lse: Tensor,
    skipped: Tensor,
    choice: Tensor,
    scale: float,
    top_k: int,
    skip: float,
    implementation: str,
    may_hide: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `read_operator` by its tensors, laid out as `torch.empty_like` of each; `[B, 0]` without a bias.

    With `skip`, positions whose values were not read have no gradient.
    """
    implementation = resolve_implementation(implementation, query_key)
    memory_key, memory_value = (_shown(part, key_bias, implementation, may_hide) for part in (memory_key, memory_value))
    affinity = Affinity(query_key, memory_key, scale, key_bias, lengths, may_hide)
    if min(*query_key.shape, *memory_value.shape) == 0:
        by_query, by_key, by_value = map(torch.zeros_like, (query_key, memory_key, memory_value))
        return by_query, by_key, by_value, _empty_grad_key_bias(query_key, key_bias).zero_()
    on_gpu = implementation == "triton"
    if top_k:
        grads = top_k_read_backward(grad_out, grad_lse, affinity, memory_value, out, lse, choice)
    elif on_gpu:
        from stm_kernels.gpu.backward import triton_read_backward

        grads = triton_read_backward(grad_out, grad_lse, affinity, memory_value, out, lse, skipped, choice)
    else:
        grads = chunked_read_backward(grad_out, grad_lse, affinity, memory_value, out, lse, skipped, skip)
    by_query, by_key, by_value, by_bias = grads
    return by_query, by_key, by_value, _empty_grad_key_bias(query_key, key_bias) if by_bias is None else by_bias


@torch.library.register_fake(backward_operator)
def _(grad_out, grad_lse, query_key, memory_key, memory_value, key_bias, *rest):
    grads = (torch.empty_like(tensor) for tensor in (query_key, memory_key, memory_value))
    return *grads, _empty_grad_key_bias(query_key, key_bias)


def _empty_grad_key_bias(query_key: Tensor, key_bias: Tensor | None) -> Tensor:
    return query_key.new_empty(len(query_key), 0) if key_bias is None else torch.empty_like(key_bias)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.top_k, ctx.skip, ctx.implementation, ctx.may_hide = inputs
    out, lse, skipped, choice = output
    ctx.mark_non_differentiable(skipped, choice)
    ctx.save_for_backward(*tensors, out, lse, skipped, choice)


def _differentiate(ctx, grad_out: Tensor, grad_lse: Tensor, *_):
    settings = (ctx.scale, ctx.top_k, ctx.skip, ctx.implementation, ctx.may_hide)
    *grads, grad_key_bias = backward_operator(grad_out, grad_lse, *ctx.saved_tensors, *settings)
    return *grads, None if ctx.saved_tensors[3] is None else grad_key_bias, *(None,) * 6


def _refuse(ctx, *grads):
    raise NotImplementedError(
        'memory_read: second derivatives exist only with implementation="reference", '
        "the others recompute the affinity in their backward pass"
    )


torch.library.register_autograd(read_operator, _differentiate, setup_context=_save)
torch.library.register_autograd(backward_operator, _refuse)


@_operator("memory_usage")
def usage_operator(
    query_key: Tensor,
    memory_key: Tensor,
    key_bias: Optional[Tensor],  # noqa: UP045
    lengths: Optional[Tensor],  # noqa: UP045
    lse: Optional[Tensor],  # noqa: UP045
    scale: float,
    top_k: int,
    implementation: str,
    may_hide: bool = True,
) -> Tensor:
    """Column sums `[B, N]` of the affinity, in `wide_dtype`; `lse` `[B, M]`, float64, spares a pass.

    With `top_k` they are those of a read of so many positions, and `lse` is not looked at.
    """
    implementation = resolve_implementation(implementation, query_key)
    memory_key = _shown(memory_key, key_bias, implementation, may_hide)
    affinity = _affinity_of(query_key, memory_key, key_bias, lengths, scale, may_hide)
    if min(*query_key.shape, *memory_key.shape) == 0:
        return query_key.new_zeros(memory_key.shape[:2], dtype=wide_dtype(query_key.dtype))
    on_gpu = implementation == "triton"
    if top_k:
        return top_k_usage(affinity, top_k, _select_of(on_gpu))
    if on_gpu:
        from stm_kernels.gpu.usage import triton_usage

        return triton_usage(affinity, lse)
    return chunked_usage(affinity, lse)


@torch.library.register_fake(usage_operator)
def _(query_key, memory_key, key_bias, lengths, lse, scale, top_k, implementation, may_hide=True):
    return query_key.new_empty(memory_key.shape[:2], dtype=wide_dtype(query_key.dtype))


def _register_vmap(operator: Any) -> None:
    """Fold the axis of torch.vmap into B."""

    def folded(info, in_dims, *inputs):
        size, arguments = info.batch_size, []
        for dim, value in zip(in_dims, inputs):
            if isinstance(value, Tensor):
                value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
                value = value.flatten(0, 1)
            arguments.append(value)
        outputs = operator(*arguments)
        if isinstance(outputs, Tensor):
            return outputs.unflatten(0, (size, len(outputs) // size)), 0
        return tuple(output.unflatten(0, (size, len(output) // size)) for output in outputs), (0,) * len(outputs)

    torch.library.register_vmap(operator, folded)


for _each in (read_operator, backward_operator, usage_operator):
    _register_vmap(_each)


def _select_of(on_gpu: bool) -> Select:
    if not on_gpu:
        return chunked_select
    from stm_kernels.gpu.top_k import triton_select

    return triton_select


def resolve_implementation(implementation: str, query_key: Tensor) -> str:
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
    # torch 2.11 cannot trace the question whether a device has autocast; those that are compiled for have it
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device):
        return tensors
    if not torch.is_autocast_enabled(device):
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
