"""The read under PyTorch's transformations: autograd, torch.compile, autocast, vmap."""

import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from stm_kernels import SpaceTimeMemoryRead, memory_read, space_time_memory_read
from stm_kernels.operator import backward_operator, read_operator
from stm_kernels.testing import make_problem, results


def double_inputs(channel_major: bool = False) -> list[torch.Tensor]:
    problem = make_problem(2, 5, 7, 6, 3, dtype=torch.float64, channel_major=channel_major)
    return [t.requires_grad_() for t in (problem.query_key, problem.memory_key, problem.memory_value)]


def read(query_key, memory_key, memory_value, implementation="chunked"):
    return memory_read(query_key, memory_key, memory_value, return_lse=True, implementation=implementation)


@pytest.mark.parametrize("outputs", [(0, 1), (0,), (1,)], ids=["out_and_lse", "out", "lse"])
@pytest.mark.parametrize("channel_major", [False, True], ids=["token_major", "channel_major"])
def test_gradcheck(outputs, channel_major):
    torch.autograd.gradcheck(lambda *inputs: [read(*inputs)[i] for i in outputs], double_inputs(channel_major))


def test_gradients_of_some_inputs_only():
    query_key, memory_key, memory_value = double_inputs()
    torch.autograd.gradcheck(lambda q: read(q, memory_key.detach(), memory_value.detach()), query_key)
    torch.autograd.gradcheck(lambda v: read(query_key.detach(), memory_key.detach(), v), memory_value)


def test_second_derivative_is_refused():
    inputs = double_inputs()
    out, lse = read(*inputs)
    (grad,) = torch.autograd.grad(out.sum() + lse.sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match='second derivatives exist only with implementation="reference"'):
        torch.autograd.grad(grad.sum(), inputs[1])


def test_reference_has_second_derivatives():
    torch.autograd.gradgradcheck(lambda *inputs: read(*inputs, "reference"), double_inputs())


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
@pytest.mark.parametrize("channel_major", [False, True], ids=["token_major", "channel_major"])
def test_opcheck(implementation, channel_major, device):
    device = device if implementation == "triton" else "cpu"
    problem = make_problem(2, 5, 7, 6, 3, device=device, channel_major=channel_major)
    inputs = [t.requires_grad_() for t in (problem.query_key, problem.memory_key, problem.memory_value)]
    settings = (0.3, 0, 0.0, implementation)
    torch.library.opcheck(read_operator, (*inputs, None, None, *settings))
    inputs = [*(t.detach() for t in inputs), None, None]
    out, lse, skipped, choice = read_operator(*inputs, *settings)
    grads = (torch.randn_like(out), torch.randn_like(lse))
    torch.library.opcheck(backward_operator, (*grads, *inputs, out, lse, skipped, choice, *settings))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic):
    torch.compiler.reset()
    compiled = torch.compile(read, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for sizes in ((2, 5, 7, 6, 3), (3, 9, 8, 10, 4)):
        problem = make_problem(*sizes)
        expected = results(problem, lambda q, k, v, scale: read(q, k, v))
        found = results(problem, lambda q, k, v, scale: compiled(q, k, v))
        assert all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"similarity": "l2"}], ids=str)
def test_a_longer_memory_is_not_compiled_anew(options):
    """Once for the first length, and once for any."""
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(partial(memory_read, **options), fullgraph=True, backend=counter)
    for frames in (1, 2, 3, 4, 8):
        problem = make_problem(1, 12, 12 * frames, 16, 32)
        tensors = [getattr(problem, name).requires_grad_() for name in ("query_key", "memory_key", "memory_value")]
        compiled(*tensors).sum().backward()
    assert counter.frame_count == 2


def test_compile_of_the_module():
    torch.compiler.reset()
    module = SpaceTimeMemoryRead()
    inputs = [torch.randn(2, 4, 3, 5, 6), torch.randn(2, 8, 3, 5, 6), torch.randn(2, 4, 5, 6), torch.randn(2, 8, 5, 6)]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert compiled(*inputs)[0].equal(module(*inputs)[0])


def test_export_keeps_the_read_as_one_operator():
    inputs = tuple(tensor.detach().float() for tensor in double_inputs())

    class Read(torch.nn.Module):
        def forward(self, *inputs):
            return memory_read(*inputs)

    with warnings.catch_warnings():
        # torch's own exporter warns about torch's own use of it
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(Read(), inputs)
    assert "stm_kernels.memory_read.default" in program.graph_module.code
    assert program.module()(*inputs).equal(memory_read(*inputs))


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_autocast(implementation):
    query_key, memory_key, memory_value = (t.detach().float().requires_grad_() for t in double_inputs())
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = read(query_key.bfloat16(), memory_key, memory_value, implementation)
    expected = read(query_key.bfloat16(), memory_key.bfloat16(), memory_value.bfloat16(), implementation)
    assert out.dtype == torch.bfloat16 and out.equal(expected[0])
    assert lse.dtype == torch.float32 and lse.equal(expected[1])
    out.sum().backward()
    assert memory_key.grad.dtype == torch.float32


def test_autocast_leaves_float64():
    with torch.autocast("cpu", torch.bfloat16):
        assert read(*double_inputs())[0].dtype == torch.float64


def test_autocast_under_compile():
    torch.compiler.reset()
    inputs = [tensor.detach().float() for tensor in double_inputs()]
    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(*inputs)[0].equal(read(*inputs)[0])


def test_vmap():
    query_key, memory_key, memory_value = (tensor.detach() for tensor in double_inputs())
    queries = torch.stack([query_key, 2 * query_key, -query_key], dim=2)
    out, lse = torch.vmap(read, in_dims=(2, None, None))(queries, memory_key, memory_value)
    for index, query in enumerate(queries.unbind(2)):
        expected = read(query, memory_key, memory_value)
        torch.testing.assert_close((out[index], lse[index]), expected)


def test_batched_gradients():
    inputs = double_inputs()
    outputs = read(*inputs)
    batches = [torch.randn(4, *output.shape, dtype=output.dtype) for output in outputs]
    found = torch.autograd.grad(outputs, inputs, batches, is_grads_batched=True, retain_graph=True)
    for index in range(4):
        expected = torch.autograd.grad(outputs, inputs, [batch[index] for batch in batches], retain_graph=True)
        torch.testing.assert_close([grad[index] for grad in found], list(expected))


def test_space_time_read_is_differentiable():
    problem = make_problem(1, 6, 12, 4, 3, dtype=torch.float64, channel_major=True)
    inputs = (
        problem.query_key.mT.unflatten(2, (2, 3)),
        problem.memory_key.mT.unflatten(2, (2, 2, 3)),
        problem.memory_value.mT.unflatten(2, (2, 2, 3)),
    )
    torch.autograd.gradcheck(space_time_memory_read, [tensor.detach().requires_grad_() for tensor in inputs])


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_a_program_compiled_ahead_of_time_reads_alike(tmp_path):
    """By AOTInductor: the read is one operator of the package, which a process loads without tracing anything."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 8, 3, 4, 5), (2, 12, 3, 4, 5), (2, 8, 4, 5), (2, 12, 4, 5))
    inputs = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    module = SpaceTimeMemoryRead()

    class Step(torch.nn.Module):
        def forward(self, *tensors):
            return module(*tensors)[0] * 2

    with torch.no_grad():
        program = torch.export.export(Step(), inputs)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "read.pt2"))
        assert torch._inductor.aoti_load_package(path)(*inputs).equal(Step()(*inputs))


def test_a_read_does_not_load_the_compiler():
    """It takes a second, which a process that only reads need not wait."""
    code = "import sys, torch, stm_kernels\n"
    code += "stm_kernels.memory_read(*torch.zeros(3, 1, 2, 4), implementation='chunked')\n"
    code += "sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
