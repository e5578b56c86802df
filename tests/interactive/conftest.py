import pytest
import torch
from drawing import middle, stroke

from stm_model import STM
from stm_model.interactive.session import ScribbleSession
from stm_model.runtime import DEFAULT_INTERACTIVE_WEIGHTS


@pytest.fixture(scope="session")
def tracking_model() -> STM:
    """The network in the package that is guided by masks."""
    return STM.load(device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def scribble_model() -> STM:
    """The network in the package that is guided by scribbles."""
    return STM.load(DEFAULT_INTERACTIVE_WEIGHTS, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def two_rounds(scribble_model, clip):
    """A session of two rounds, the second of which adds an object; not to be changed."""
    frames, truths = clip
    session = ScribbleSession(scribble_model, frames)
    session.add_scribbles(1, [middle(truths[1], 1), stroke(0, (0.02, 0.02), (0.3, 0.02))])
    session.run()
    session.add_scribbles(6, [middle(truths[6], 2)])
    session.run()
    return session
