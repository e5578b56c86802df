"""An inverted residual that is computed a strip of rows after the other is the whole one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stm_model.network import inference
from stm_model.network.batch_norm import fold_batch_norm
from stm_model.network.efficientnet import InvertedResidual
from stm_model.network.inference import fuse_activations

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


def folded(block: InvertedResidual) -> nn.Module:
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.bias, 0.5, 1.5)
    return fuse_activations(fold_batch_norm(nn.Sequential(block).to(memory_format=torch.channels_last)))


@needs_onednn
@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(3, 1), (3, 2), (5, 1), (5, 2)]),
    st.sampled_from([1, 6]),
    st.integers(1, 23),
    st.integers(1, 9),
    st.integers(1, 2),
    st.integers(1, 4000),
)
def test_strips_are_the_whole(form, expansion, height, width, batch, strip_bytes):
    torch.manual_seed(0)
    # with a shortcut where the stride is 1
    block = InvertedResidual(8, 8, *form, expansion)
    net = folded(block)
    x = torch.randn(batch, 8, height, width)
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "MAX_WIDE_BYTES", 2**40)
        whole = net(x)
        patch.setattr(inference, "MAX_WIDE_BYTES", 0)
        patch.setattr(inference, "STRIP_BYTES", strip_bytes)
        strips = net(x)
    torch.testing.assert_close(strips, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole, block.eval()(x), rtol=1e-4, atol=1e-4)


@needs_onednn
def test_the_widest_map_is_never_held_whole():
    net = folded(InvertedResidual(16, 24, 3, 2, 6))
    block = net[0].block
    seen = []
    block.expand.register_forward_hook(lambda _, inputs, out: seen.append(out.nbytes))
    x = torch.randn(1, 16, 240, 432)
    with torch.inference_mode():
        net(x)
        net(x[..., :48])
    *strips, small = seen
    assert max(strips) <= inference.STRIP_BYTES and len(strips) > 10
    assert small == 96 * 240 * 48 * 4 <= inference.MAX_WIDE_BYTES
