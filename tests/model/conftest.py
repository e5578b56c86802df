import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stm_model import STM, STMConfig
from stm_model.data.synthetic import procedural_clip

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real frames and reference numbers, which lie beside the project where there are any."""
    if not SHARED.is_dir():
        pytest.skip("the shared data is not here")
    return SHARED


@pytest.fixture(scope="session")
def parity_tensors(shared_data):
    """The generated weights with which the released model computed its reference numbers."""
    sys.path.insert(0, str(shared_data / "stm_parity"))
    import weights

    return weights.torch_state_dict()


@pytest.fixture(scope="session")
def released_model(parity_tensors) -> STM:
    """The network in the released shape with the generated weights, float32."""
    model = STM().eval().requires_grad_(False)
    model.load_state_dict(parity_tensors)
    return model


@pytest.fixture(scope="session")
def small_model() -> STM:
    """An untrained small network whose masks are far from empty and far from full."""
    torch.manual_seed(0)
    model = STM(STMConfig(backbone="resnet18", key_channels=16, value_channels=32, decoder_channels=16))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def clip() -> tuple[np.ndarray, np.ndarray]:
    """Eight small frames with two objects."""
    return procedural_clip(frames=8, size=(70, 90), objects=2, seed=3)
