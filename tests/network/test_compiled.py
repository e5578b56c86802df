"""A compiled network gives the masks of one that is not."""

import shutil

import pytest
import torch

from stm_model import Tracker
from stm_model.network import inference

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="a CPU needs a C++ compiler")


# of PyTorch's own code
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@needs_compiler
def test_a_compiled_tracker_gives_the_same(small_model, clip):
    frames, labels = clip
    given = {0: labels[0]}
    plain = list(Tracker(small_model, memory="every:2").track(frames[:4], given))
    tracker = Tracker(small_model, memory="every:2", compiled=True)
    compiled = list(tracker.track(frames[:4], given))
    # the parts that are called are those that were compiled
    for part in ("encode_query", "memorize", "segment"):
        assert hasattr(vars(tracker.model)[part], "_torchdynamo_orig_callable")
    for ours, expected in zip(compiled, plain, strict=True):
        # float32, the same sums in another order, four frames deep
        torch.testing.assert_close(ours.probabilities, expected.probabilities, rtol=0, atol=1e-4)


def test_without_a_compiler_it_is_said_before_anything_is_read(small_model, monkeypatch):
    monkeypatch.setattr(inference.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="compiled: expected a C\\+\\+ compiler"):
        Tracker(small_model, compiled=True)
