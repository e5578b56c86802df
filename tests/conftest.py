"""Shared by all rooms: without a GPU the Triton kernels run in Triton's interpreter; a tiny network."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # read by triton when a kernel is defined, so it must stand before the first import of one
    os.environ["TRITON_INTERPRET"] = "1"


# "thorough" draws new examples every time: make test ARGS="--hypothesis-profile=thorough -k random"
_drawn = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
settings.register_profile("quick", derandomize=True, max_examples=30, **_drawn)
settings.register_profile("thorough", max_examples=1000, **_drawn)
settings.load_profile("quick")


def pytest_configure(config: pytest.Config) -> None:
    # the interpreter's own: how it indexes, and what it computes for the masked edge of a tile
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton")
    config.addinivalue_line("filterwarnings", "ignore:overflow encountered in cast:RuntimeWarning:triton")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network small enough to run in milliseconds; it has learnt nothing."""
    from stm_model import STM, STMConfig
    from stm_model.checkpoint import write_tensors

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model = STM(STMConfig("resnet18", key_channels=16, value_channels=16, decoder_channels=16))
    write_tensors(model.state_dict(), path)
    return path
