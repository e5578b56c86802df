"""The public read: frames, the released module, bad input, what importing needs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stm_kernels
from stm_kernels import SpaceTimeMemoryRead, default_implementation, memory_read, space_time_memory_read
from stm_kernels.testing import extra_memory

PARITY = Path(__file__).parents[1] / "data/stm_parity/memory_read.npz"
WHOLE_PARITY = Path(__file__).parents[3] / "shared/data/stm_parity/memory_read.npz"


def frames(B=2, C=8, V=12, T=3, H=4, W=5):
    return torch.randn(B, C, H, W), torch.randn(B, C, T, H, W), torch.randn(B, V, T, H, W)


def read_by_the_paper(query_key, memory_key, memory_value, scale):
    affinity = torch.einsum("bcthw,bcij->bthwij", memory_key, query_key) * scale
    affinity = affinity.flatten(1, 3).softmax(1).view_as(affinity)
    return torch.einsum("bthwij,bvthw->bvij", affinity, memory_value)


@pytest.mark.parametrize("scale", [None, 1.0, 0.1])
def test_space_time_read_is_the_equation(scale):
    inputs = [tensor.double() for tensor in frames()]
    expected = read_by_the_paper(*inputs, 8**-0.5 if scale is None else scale)
    torch.testing.assert_close(space_time_memory_read(*inputs, scale=scale), expected)
    read, lse = space_time_memory_read(*inputs, scale=scale, return_lse=True)
    assert read.shape == (2, 12, 4, 5) and lse.shape == (2, 4, 5)
    # every position of the query read by itself
    corner, corner_lse = space_time_memory_read(inputs[0][:, :, 1:2, 3:], *inputs[1:], scale=scale, return_lse=True)
    torch.testing.assert_close((read[:, :, 1:2, 3:], lse[:, 1:2, 3:]), (corner, corner_lse))


def test_memory_of_another_grid():
    query_key, _, _ = frames()
    _, memory_key, memory_value = frames(H=2, W=7)
    read = space_time_memory_read(query_key, memory_key, memory_value)
    torch.testing.assert_close(read, read_by_the_paper(query_key, memory_key, memory_value, 8**-0.5))


def test_frames_are_read_without_a_copy():
    query_key, *memory = frames(1, 16, 32, T=600, H=12, W=12)

    def part_of_a_longer_memory(tensor):
        return torch.cat([tensor, tensor], dim=2)[:, :, :600]

    def channels_last(tensor):
        return tensor.to(memory_format=torch.channels_last_3d)

    for layout in (torch.Tensor.contiguous, channels_last, part_of_a_longer_memory):
        memory_key, memory_value = map(layout, memory)
        extra = extra_memory(lambda k=memory_key, v=memory_value: space_time_memory_read(query_key, k, v))
        assert extra < memory_key.nbytes / 2, layout


def test_module_is_the_released_one():
    query_key, memory_key, memory_value = frames()
    query_value = torch.randn(2, 12, 4, 5)
    joined, affinity = SpaceTimeMemoryRead()(memory_key, memory_value, query_key, query_value)
    assert affinity is None
    assert joined[:, 12:].equal(query_value)
    torch.testing.assert_close(joined[:, :12], read_by_the_paper(query_key, memory_key, memory_value, 8**-0.5))
    joined, _ = SpaceTimeMemoryRead(scale=1.0)(memory_key, memory_value, query_key, query_value)
    torch.testing.assert_close(joined[:, :12], read_by_the_paper(query_key, memory_key, memory_value, 1.0))


@pytest.mark.parametrize("path", [PARITY, WHOLE_PARITY], ids=["cut", "whole"])
@pytest.mark.parametrize("implementation", ["reference", "chunked", "triton"])
def test_equals_the_released_module(implementation, path, device):
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    numpy = pytest.importorskip("numpy")
    device = device if implementation == "triton" else "cpu"
    case = {name: torch.from_numpy(array).to(device) for name, array in numpy.load(path).items()}
    names = ("small_m_key", "small_m_val", "small_q_key", "small_q_val")
    joined, _ = SpaceTimeMemoryRead(implementation=implementation)(*(case[name] for name in names))
    assert (joined - case["small_out"]).abs().max() <= 1e-4


def test_auto_is_chunked_off_the_gpu():
    assert default_implementation("cpu") == default_implementation(torch.device("cpu")) == "chunked"
    assert default_implementation("cuda") == "triton"
    inputs = torch.randn(1, 3, 4), torch.randn(1, 5, 4), torch.randn(1, 5, 2)
    assert memory_read(*inputs).equal(memory_read(*inputs, implementation="chunked"))


def ones(*shape, **options):
    return torch.ones(shape, **options)


GOOD = {"query_key": ones(2, 3, 4), "memory_key": ones(2, 5, 4), "memory_value": ones(2, 5, 6)}
BAD = [
    ({"query_key": [1.0]}, TypeError, "query_key: expected a tensor, got list"),
    ({"memory_key": ones(2, 5, 4).int()}, TypeError, "memory_key: expected a floating-point tensor, got torch.int32"),
    (
        {"query_key": ones(2, 3, 4).to(torch.float8_e4m3fn)},
        TypeError,
        "query_key: expected a floating-point tensor of 16 bits or more, got torch.float8_e4m3fn",
    ),
    ({"memory_key": ones(2, 5, 4).to_sparse()}, TypeError, "memory_key: expected a dense tensor, got a sparse one"),
    (
        {"memory_value": torch.nested.as_nested_tensor([ones(5, 3), ones(4, 3)], layout=torch.jagged)},
        TypeError,
        "memory_value: expected a dense tensor, got a nested one",
    ),
    ({"query_key": ones(3, 4)}, ValueError, "query_key: expected 3 axes, got 2 in shape [3, 4]"),
    ({"memory_value": ones(2, 5, 6, 1)}, ValueError, "memory_value: expected 3 axes, got 4 in shape [2, 5, 6, 1]"),
    ({"memory_key": ones(2, 5, 7)}, ValueError, "memory_key: expected C = 4 as in query_key, got 7"),
    ({"memory_value": ones(2, 8, 6)}, ValueError, "memory_value: expected N = 5 as in memory_key, got 8"),
    ({"memory_key": ones(1, 5, 4)}, ValueError, "memory_key: expected B = 2 as in query_key, got 1"),
    (
        {"memory_value": ones(2, 5, 6).half()},
        ValueError,
        "memory_value: expected dtype torch.float32 as in query_key, got torch.float16",
    ),
    (
        {"memory_key": ones(2, 5, 4, device="meta")},
        ValueError,
        "memory_key: expected device cpu as in query_key, got meta",
    ),
    ({"memory_value": ones(2, 5, 0)}, ValueError, "memory_value: expected at least one channel, got none"),
    (
        {"query_key": ones(2, 3, 0), "memory_key": ones(2, 5, 0)},
        ValueError,
        "query_key: expected at least one channel, got none",
    ),
    ({"scale": 0.0}, ValueError, "scale: expected a positive finite number, got 0.0"),
    ({"scale": -1}, ValueError, "scale: expected a positive finite number, got -1"),
    ({"scale": float("nan")}, ValueError, "scale: expected a positive finite number, got nan"),
    ({"scale": float("inf")}, ValueError, "scale: expected a positive finite number, got inf"),
    ({"scale": "1"}, TypeError, "scale: expected a number or None, got str"),
    ({"scale": True}, TypeError, "scale: expected a number or None, got bool"),
    (
        {"implementation": "cuda"},
        ValueError,
        "implementation: expected one of auto, triton, chunked, reference, got 'cuda'",
    ),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[message.split(", got")[0] for _, _, message in BAD])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error) as raised:
        memory_read(**GOOD | change)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    "inputs",
    [{"query_key": ones(1, 3, 4, dtype=torch.float64)}, {"query_key": ones(1, 3, 300)}],
    ids=["float64", "many channels"],
)
def test_what_triton_cannot_read_is_refused_by_name(inputs):
    query_key = inputs["query_key"]
    with pytest.raises(ValueError, match='"triton" reads float16, bfloat16 and float32 with C up to 256, got'):
        memory_read(query_key, query_key, query_key, implementation="triton")


def test_bad_frames_are_named():
    query_key, memory_key, memory_value = frames()
    with pytest.raises(ValueError, match=r"query_key: expected 4 axes, got 3 in shape \[2, 8, 20\]"):
        space_time_memory_read(query_key.flatten(2), memory_key, memory_value)
    with pytest.raises(ValueError, match="memory_key: expected 5 axes, got 4"):
        space_time_memory_read(query_key, memory_key[:, :, 0], memory_value)
    message = r"memory_value: expected T, H, W = \[3, 4, 5\] as in memory_key, got \[3, 5, 4\]"
    with pytest.raises(ValueError, match=message):
        space_time_memory_read(query_key, memory_key, memory_value.mT)
    with pytest.raises(ValueError, match="memory_key: expected C = 8 as in query_key, got 7"):
        space_time_memory_read(query_key, memory_key[:, :7], memory_value)
    message = r"query_value: expected \[B, V, H, W\] = \[2, 12, 4, 5\], got \[2, 12, 5, 4\]"
    with pytest.raises(ValueError, match=message):
        SpaceTimeMemoryRead()(memory_key, memory_value, query_key, torch.randn(2, 12, 5, 4))
    with pytest.raises(ValueError, match=r"query_value: .* got NoneType"):
        SpaceTimeMemoryRead()(memory_key, memory_value, query_key, None)


def python(code: str) -> str:
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_works_without_triton():
    # None in sys.modules is how Python marks a module that cannot be imported
    printed = python("""
import sys
sys.modules["triton"] = None
import torch, stm_kernels
inputs = (torch.ones(1, 2, 3),) * 3
print(stm_kernels.memory_read(*inputs).shape, stm_kernels.default_implementation("cuda"))
try:
    stm_kernels.memory_read(*inputs, implementation="triton")
except ImportError as error:
    print(error)
""")
    assert printed.splitlines() == [
        "torch.Size([1, 2, 3]) chunked",
        'implementation: "triton" needs the package triton, which is not installed; use "chunked"',
    ]


def test_importing_brings_neither_triton_nor_a_device():
    printed = python("""
import sys, torch
before = {name for name in sys.modules if name.split(".")[0] == "triton"}
import stm_kernels
after = {name for name in sys.modules if name.split(".")[0] == "triton"}
print(after - before, torch.cuda.is_initialized())
""")
    assert printed == "set() False\n"


def test_public_names():
    assert all(hasattr(stm_kernels, name) for name in stm_kernels.__all__)
