"""A tiny network of the shared form."""

from dataclasses import replace

import pytest
import torch

from stm_model import STM, STMConfig


@pytest.fixture(scope="module")
def shared_model():
    torch.manual_seed(0)
    config = replace(STMConfig.shared(), key_channels=16, value_channels=32, decoder_channels=32)
    return STM(config).eval().requires_grad_(False)
