"""Every kernel in every form stays within its tensors, and no program touches what another one writes."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

import stm_kernels.gpu
import stm_kernels.gpu.backward as backward
import stm_kernels.gpu.forward as forward
import stm_kernels.gpu.top_k as top_k
from bench.gpu_readers import chosen
from stm_kernels import PagedMemory, memory_usage
from stm_kernels.gpu.launch import Launch
from stm_kernels.gpu.tuning import ForwardTiles
from stm_kernels.testing import make_problem, read_by, results

RAGGED = (2, 33, 70, 20, 33)
WHOLE = (2, 70, 90, 32, 48)
EVERY_KERNEL = {"read_kernel", "descriptor_read_kernel", "affinity_kernel", "usage_kernel", "merge_kernel"}
EVERY_KERNEL |= {"group_max_kernel", "group_products_kernel", "select_kernel"}
GUARD = 64
launched: set[str] = set()


def read(problem, **options):
    return lambda: results(problem, read_by("triton", **options))


def paged(problem):
    memory = PagedMemory(2, 20, 33, page_size=32, device=problem.query_key.device)
    memory.append(problem.memory_key, problem.memory_value)
    return lambda: memory.read(problem.query_key, implementation="triton")


def usage(problem):
    return lambda: memory_usage(problem.query_key, problem.memory_key, key_bias=problem.key_bias,
                                lengths=problem.lengths, implementation="triton")  # fmt: skip


def by_descriptors(make: Callable, kind: str) -> Callable:
    def form(device):
        call = make(device)

        def run():
            with chosen(forward=ForwardTiles(64, 32, 32, 4, 2, kind)):
                return call()

        return run

    return form


FORMS: dict[str, Callable[[str], Callable[[], object]]] = {
    "plain": lambda device: read(make_problem(*RAGGED, device=device)),
    "channel-major, half": lambda device: read(
        make_problem(*RAGGED, device=device, dtype=torch.float16, channel_major=True)
    ),
    "bias and lengths": lambda device: read(make_problem(*RAGGED, device=device, biased=True, ragged=True)),
    "skip": lambda device: read(make_problem(*RAGGED, device=device, peak=4.0, biased=True, ragged=True), skip=0.1),
    "top-k": lambda device: read(replace(make_problem(*RAGGED, device=device, biased=True, ragged=True), top_k=7)),
    "many values": lambda device: read(make_problem(1, 33, 70, 20, 400, device=device, biased=True, ragged=True)),
    "pages": lambda device: paged(make_problem(*RAGGED, device=device)),
    "usage": lambda device: usage(make_problem(*RAGGED, device=device, biased=True, ragged=True)),
    "descriptors": by_descriptors(lambda device: read(make_problem(*WHOLE, device=device)), "descriptor"),
    "warp-specialized": by_descriptors(lambda device: read(make_problem(*WHOLE, device=device)), "warp-specialized"),
}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch, device) -> Callable[[], object]:
    """A form of the read that takes every path of its launchers: splits, chunks of the backward and of the choice."""
    if request.param in ("descriptors", "warp-specialized") and device == "cuda":
        if torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("a GPU without TMA")
    monkeypatch.setattr(forward, "forward_splits", lambda *arguments: (3, 32))
    monkeypatch.setattr(backward, "keys_per_chunk", lambda queries: 40)
    monkeypatch.setattr(forward, "keys_per_chunk", lambda queries: 40)
    monkeypatch.setattr(top_k, "groups_per_chunk", lambda queries: 3)
    return FORMS[request.param](device)


def test_only_elements_of_the_arguments_and_no_races(monkeypatch, form):
    if torch.cuda.is_available():
        pytest.skip("watches the interpreter")
    accesses = watch(monkeypatch)
    run = Launch.run

    def checked(launch: Launch, device: torch.device) -> None:
        accesses.clear()
        run(launch, device)
        name = launch.kernel.__name__
        launched.add(name)
        read_by_program, written_by_program = (together(accesses, kind) for kind in ("read", "write"))
        elements = elements_of(launch)
        for addresses, _ in (read_by_program, written_by_program):
            assert np.isin(addresses, elements).all(), f"{name} leaves its tensors"
        written, writers = written_by_program
        owned, first = np.unique(written, return_index=True)
        owners = writers[first]
        for addresses, programs in (read_by_program, written_by_program):
            shared = np.isin(addresses, owned)
            place = np.searchsorted(owned, addresses[shared])
            assert (owners[place] == programs[shared]).all(), f"{name}: two programs at one address"

    monkeypatch.setattr(Launch, "run", checked)
    form()


def test_guards_around_every_tensor_change_nothing(monkeypatch, form):
    expected = flat(form())
    run = Launch.run

    def guarded(launch: Launch, device: torch.device) -> None:
        arguments, copies = {}, []
        # the addresses of pages are in a table
        free = launch.arguments.get("key_pages_ptr") is None
        for name, value in launch.arguments.items():
            tensor = value.base if isinstance(value, TensorDescriptor) else value
            if not isinstance(tensor, Tensor) or not (free or name.startswith(("query", "out", "lse"))):
                arguments[name] = value
                continue
            buffer, copy = with_guards(tensor)
            copies.append((tensor, buffer, buffer.clone(), copy))
            arguments[name] = replace(value, base=copy) if isinstance(value, TensorDescriptor) else copy
        run(replace(launch, arguments=arguments), device)
        for tensor, buffer, before, copy in copies:
            inside = torch.zeros_like(buffer, dtype=torch.bool)
            inside.as_strided(copy.shape, copy.stride(), copy.storage_offset())[...] = True
            changed = buffer.view(torch.uint8).ne(before.view(torch.uint8)).view(*buffer.shape, -1).any(-1)
            assert not (changed & ~inside).any(), launch.kernel.__name__
            # a copy counts as a change, which autograd refuses
            if (changed & inside).any():
                tensor.copy_(copy)

    monkeypatch.setattr(Launch, "run", guarded)
    for found, result in zip(flat(form()), expected):
        assert found.equal(result)


def test_every_kernel_was_watched():
    if not launched or "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("needs all tests above in this process, in the interpreter")
    assert launched == EVERY_KERNEL


def test_there_are_no_other_kernels_and_no_atomics():
    # the cost model has a kernel of its own to compare with
    files = [path for path in Path(stm_kernels.gpu.__path__[0]).glob("*.py") if path.name != "model.py"]
    sources = [path.read_text() for path in files]
    assert set(re.findall(r"\ndef (\w+_kernel)\(", "".join(sources))) == EVERY_KERNEL
    assert "atomic_" not in "".join(sources)


def watch(monkeypatch) -> list[tuple[str, int, np.ndarray]]:
    """What the interpreter accesses: whether read or written, by which program, which addresses."""
    accesses: list[tuple[str, int, np.ndarray]] = []
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def note(self, kind: str, pointers: np.ndarray, mask: np.ndarray) -> None:
        x, y, z = self.grid_idx
        accesses.append((kind, (z * 10**4 + y) * 10**6 + x, np.unique(pointers[np.broadcast_to(mask, pointers.shape)])))

    def noted_load(self, pointers, mask, *rest, **options):
        note(self, "read", pointers.data, mask.data)
        return load(self, pointers, mask, *rest, **options)

    def noted_store(self, pointers, value, mask, *rest, **options):
        note(self, "write", pointers.data, mask.data)
        return store(self, pointers, value, mask, *rest, **options)

    monkeypatch.setattr(builder, "create_masked_load", noted_load)
    monkeypatch.setattr(builder, "create_masked_store", noted_store)
    return accesses


def together(accesses: list[tuple[str, int, np.ndarray]], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Addresses of one kind, and the program of each."""
    chosen = [(program, addresses) for each, program, addresses in accesses if each == kind]
    addresses = [addresses.astype(np.int64) for _, addresses in chosen]
    programs = [np.full(len(addresses), program) for program, addresses in chosen]
    return tuple(np.concatenate([np.zeros(0, np.int64), *parts]) for parts in (addresses, programs))


def elements_of(launch: Launch) -> np.ndarray:
    """The addresses of all elements that a launch may touch."""
    arguments, found = launch.arguments, []
    for value in arguments.values():
        if isinstance(value, Tensor | TensorDescriptor):
            found.append(addresses_of(value.base if isinstance(value, TensorDescriptor) else value))
    for pages, part in (("key_pages_ptr", "memory_key_ptr"), ("value_pages_ptr", "memory_value_ptr")):
        if arguments.get(pages) is not None:
            page = arguments[part]
            found += [addresses_of(page) - page.data_ptr() + address for address in arguments[pages].tolist()]
    return np.concatenate(found)


def addresses_of(tensor: Tensor) -> np.ndarray:
    """Of every element."""
    places = np.zeros(tensor.shape, np.int64)
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride())):
        places += (np.arange(size) * stride).reshape([-1 if i == axis else 1 for i in range(tensor.ndim)])
    return np.unique(tensor.data_ptr() + places * tensor.itemsize)


def with_guards(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A buffer of NaN, or of bytes 0xFF, and in its middle a copy of a tensor with the same strides."""
    extent = (
        1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
    )
    buffer = torch.full((extent + 2 * GUARD, tensor.itemsize), 0xFF, dtype=torch.uint8, device=tensor.device)
    buffer = buffer.view(-1).view(tensor.dtype)
    copy = buffer.as_strided(tensor.shape, tensor.stride(), GUARD)
    return buffer, copy.copy_(tensor)


def flat(found: object) -> list[Tensor]:
    """The tensors of a result."""
    return [found] if isinstance(found, Tensor) else list(found.values() if isinstance(found, dict) else found)
