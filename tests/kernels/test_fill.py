"""Kernels compiled ahead of launches: what is filled is what a launch looks up."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from stm_kernels.gpu.fill import Filled, fill

FILL = """
import json, sys
import torch
from triton import knobs
from stm_kernels.gpu.fill import Filled, fill
hits = []
knobs.compilation.listener = lambda **found: hits.append(found["cache_hit"])
keys = fill("sm_90", (Filled(torch.bfloat16, 2, 80, 160, 32, 48), sys.argv[1]))
print(json.dumps([sorted(keys), hits]))
"""

LAUNCH = """
import json, sys
import torch
from triton.tools.tensor_descriptor import TensorDescriptor
import stm_kernels.gpu.launch as launch
from stm_kernels.gpu.fill import Filled, reads

class Driver(launch.Elsewhere):
    '''As Triton's own: devices by number.'''
    def get_current_device(self):
        return 0

def real(value):
    if isinstance(value, TensorDescriptor):
        return TensorDescriptor.from_tensor(real(value.base), value.block_shape)
    if not isinstance(value, torch.Tensor):
        return value
    held = torch.empty(value.untyped_storage().nbytes(), dtype=torch.uint8).view(value.dtype)
    return held.as_strided(value.shape, value.stride(), value.storage_offset())

launches = []
launch.Launch.run = lambda self, device: launches.append(self)
gpu = Driver("sm_90", 132)
with launch.elsewhere(gpu):
    reads(Filled(torch.bfloat16, 2, 80, 160, 32, 48))[sys.argv[1]]()
    keys = set()
    for each in launches:
        # what run() of a kernel does before it launches
        arguments = {name: real(value) for name, value in each.arguments.items()}
        found = each.kernel.run(
            grid=each.grid, warmup=True, **arguments, num_warps=each.num_warps, num_stages=each.num_stages
        )
        keys.add(found.hash)
print(json.dumps(sorted(keys)))
"""


def run(script, form, cache):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script, form]
    done = subprocess.run(
        command, env=environment | {"TRITON_CACHE_DIR": str(cache)}, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("form", ["dot", "l2, top_k"])
def test_a_launch_finds_what_was_filled(tmp_path, form):
    """By tensors with data, whose alignment Triton looks at, in a process of its own."""
    keys, hits = run(FILL, form, tmp_path)
    assert len(keys) >= 2 and not any(hits)
    entries = {path.name for path in tmp_path.iterdir()}
    assert run(LAUNCH, form, tmp_path) == keys
    # nothing was compiled anew
    assert {path.name for path in tmp_path.iterdir()} == entries
    again, hits = run(FILL, form, tmp_path)
    assert again == keys and all(hits)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU the kernels are not interpreted")
def test_the_interpreter_is_named_as_the_obstacle():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set: the interpreter compiles nothing, unset it"):
        fill("sm_90", (Filled(torch.bfloat16, 1, 16, 16, 32, 48), "dot"))
