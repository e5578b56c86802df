"""Shared by all rooms: without a GPU the Triton kernels run in Triton's interpreter; a tiny network."""

import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

import stm_model.progress

if TYPE_CHECKING:
    import numpy as np

    from stm_model import STM

VECTORS = Path(__file__).parent / "data"
SHARED = Path(__file__).parents[2] / "shared" / "data"

if not torch.cuda.is_available():
    # read by triton when a kernel is defined, so it must stand before the first import of one
    os.environ["TRITON_INTERPRET"] = "1"


# frames are encoded ahead only where a test says so: most of those that stop a run do so at a frame of its source
os.environ.pop("OMP_WAIT_POLICY", None)

# "thorough" draws new examples every time: make test ARGS="--hypothesis-profile=thorough -k random"
_drawn = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
settings.register_profile("quick", derandomize=True, max_examples=30, **_drawn)
settings.register_profile("thorough", max_examples=1000, **_drawn)
settings.load_profile("quick")


def pytest_configure(config: pytest.Config) -> None:
    # tests compare all that a command says, on slow machines too
    stm_model.progress.SECONDS = 3600.0
    # the interpreter's own: how it indexes, and what it computes for the masked edge of a tile
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton")
    config.addinivalue_line("filterwarnings", "ignore:invalid value encountered in matmul:RuntimeWarning:triton")
    config.addinivalue_line("filterwarnings", "ignore:overflow encountered in cast:RuntimeWarning:triton")
    config.addinivalue_line("filterwarnings", "ignore:__array__ implementation:DeprecationWarning:pycocotools")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network small enough to run in milliseconds; it has learnt nothing."""
    from stm_model import STM, STMConfig
    from stm_model.network.weights import write_tensors

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model = STM(STMConfig("resnet18", key_channels=16, value_channels=16, decoder_channels=16))
    write_tensors(model.state_dict(), path)
    return path


@pytest.fixture
def encodes_ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """There are two threads, and they sleep while they wait."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real frames and larger reference numbers, which lie beside the project where there are any."""
    if not SHARED.is_dir():
        pytest.skip("the shared data is not here")
    return SHARED


@pytest.fixture(scope="session", params=["cut", "whole"])
def parity_folder(request: pytest.FixtureRequest) -> Path:
    """What the released model computes: cut to a few channels and pixels, and whole where that is here."""
    if request.param == "cut":
        return VECTORS / "stm_parity"
    return request.getfixturevalue("shared_data") / "stm_parity"


@pytest.fixture(scope="session")
def parity_tensors():
    """The generated weights with which the released model computed its reference numbers."""
    made = runpy.run_path(str(VECTORS / "stm_parity" / "weights.py"))["make"]()
    return {name: torch.from_numpy(array) for name, array in made.items()}


@pytest.fixture(scope="session")
def released_model(parity_tensors) -> "STM":
    """The network in the released shape with the generated weights, float32."""
    from stm_model import STM

    model = STM().eval().requires_grad_(False)
    model.load_state_dict(parity_tensors)
    return model


@pytest.fixture(scope="session")
def small_model() -> "STM":
    """An untrained small network whose masks are far from empty and far from full."""
    from stm_model import STM, STMConfig

    torch.manual_seed(0)
    model = STM(STMConfig(backbone="resnet18", key_channels=16, value_channels=32, decoder_channels=16))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def clip() -> "tuple[np.ndarray, np.ndarray]":
    """Eight small frames with two objects."""
    from stm_model.data.synthetic import procedural_clip

    return procedural_clip(frames=8, size=(70, 90), objects=2, seed=3)


@pytest.fixture(scope="session")
def clips() -> "dict[str, tuple[np.ndarray, np.ndarray]]":
    """Video → (frames, labels) of two objects, 1 and 2."""
    from stm_model.data.synthetic import procedural_clip

    return {
        name: procedural_clip(count, (48, 80), objects=2, seed=seed)
        for name, count, seed in (("ant", 9, 1), ("bee", 6, 2), ("cat", 7, 4))
    }


@pytest.fixture(scope="session")
def davis(tmp_path_factory: pytest.TempPathFactory, clips) -> Path:
    """DAVIS 2017 of `clips`, with DAVIS 2016's list of the same videos."""
    from layouts import write_davis

    return write_davis(tmp_path_factory.mktemp("davis"), clips)
