"""Trunks of image classifiers: what an encoder makes of a frame is what the classifier did."""

import re

import pytest
import torch
from torch.nn import functional as F

from stm_model import STM, STMConfig
from stm_model.network import fold_batch_norm
from stm_model.network.efficientnet import DepthwiseConv2d
from stm_model.network.trunk import load_trunk
from stm_model.network.weights import CheckpointError, write_tensors
from stm_model.training.config import LiteConfig, TrainConfig
from stm_model.training.state import TrainState, initialize

# input and output channels, kernel, stride, expansion of EfficientNet-Lite0's blocks; the last is not of the trunk
LITE_BLOCKS = [
    (32, 16, 3, 1, 1),
    *[(16, 24, 3, 2, 6), (24, 24, 3, 1, 6)],
    *[(24, 40, 5, 2, 6), (40, 40, 5, 1, 6)],
    *[(40, 80, 3, 2, 6), (80, 80, 3, 1, 6), (80, 80, 3, 1, 6)],
    *[(80, 112, 5, 1, 6), (112, 112, 5, 1, 6), (112, 112, 5, 1, 6)],
    *[(112, 192, 5, 2, 6), (192, 192, 5, 1, 6), (192, 192, 5, 1, 6), (192, 192, 5, 1, 6)],
    (192, 320, 3, 1, 6),
]
LITE_STAGE_ENDS = (2, 4, 10, 14)
RESNETS = {"resnet18": ("basic", (2, 2, 2, 2)), "resnet50": ("bottleneck", (3, 4, 6, 3))}


def test_the_encoders_see_what_efficientnet_lite_saw(tmp_path):
    tensors = lite_classifier()
    torch.save(tensors, tmp_path / "lite.pth")
    model = loaded("efficientnet-lite0", tmp_path / "lite.pth")
    frame = torch.rand(1, 3, 64, 96)
    x = (frame * 255 - 127) / 128
    x = F.relu6(norm(F.conv2d(x, tensors["_conv_stem.weight"], stride=2, padding=1), tensors, "_bn0", 1e-3))
    maps = []
    for number, (channels, out_channels, kernel, stride, expansion) in enumerate(LITE_BLOCKS[:15]):
        name = f"_blocks.{number}."
        y = x
        if expansion > 1:
            y = F.relu6(norm(F.conv2d(y, tensors[name + "_expand_conv.weight"]), tensors, name + "_bn0", 1e-3))
        weight = tensors[name + "_depthwise_conv.weight"]
        y = F.conv2d(y, weight, stride=stride, padding=kernel // 2, groups=len(weight))
        y = F.relu6(norm(y, tensors, name + "_bn1", 1e-3))
        y = norm(F.conv2d(y, tensors[name + "_project_conv.weight"]), tensors, name + "_bn2", 1e-3)
        x = x + y if stride == 1 and channels == out_channels else y
        if number in LITE_STAGE_ENDS:
            maps.append(x)
    same_maps(model, frame, maps[:3])
    shared = STM(STMConfig.shared())
    load_trunk(shared, tmp_path / "lite.pth")
    seen, stages = [], (shared.Encoder.res2, shared.Encoder.res3, shared.Encoder.res4, shared.Encoder.res5)
    for stage in stages:
        stage.register_forward_hook(lambda module, inputs, output: seen.append(output))
    shared.eval().encode_query(frame)
    for ours, theirs in zip(seen, maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("backbone", RESNETS)
def test_the_encoders_see_what_a_resnet_saw(backbone, tmp_path):
    tensors = resnet_classifier(backbone)
    torch.save(tensors, tmp_path / "resnet.pth")
    model = loaded(backbone, tmp_path / "resnet.pth")
    frame = torch.rand(1, 3, 64, 96)
    x = (frame - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    x = F.relu(norm(F.conv2d(x, tensors["conv1.weight"], stride=2, padding=3), tensors, "bn1"))
    x = F.max_pool2d(x, 3, 2, 1)
    maps = []
    for layer, depth in enumerate(RESNETS[backbone][1][:3], 1):
        for block in range(depth):
            stride = 2 if layer > 1 and block == 0 else 1
            x = resnet_block(x, tensors, f"layer{layer}.{block}.", stride)
        maps.append(x)
    same_maps(model, frame, maps)


@pytest.mark.parametrize("guidance", ["masks", "scribbles"])
def test_a_mask_moves_the_stem_as_an_image_does(guidance, tmp_path):
    torch.save(lite_classifier(), tmp_path / "lite.pth")
    torch.manual_seed(1)
    model = STM(STMConfig.lite(guidance))
    variances = []
    for _ in range(8):
        load_trunk(model, tmp_path / "lite.pth")
        for name in model.Encoder_M.guides:
            gain = model.Encoder_M.bn1.running_var.add(1e-3).rsqrt().view(-1, 1, 1, 1)
            weight = model.Encoder_M.get_submodule(name).weight * gain
            variances.append((weight.square().sum() / len(weight)).item())
    # behind batch norm, white noise of variance 1 gives one of variance 1: one draw errs by a tenth, the mean by less
    assert sum(variances) / len(variances) == pytest.approx(1, abs=0.15)


def test_another_classifier_is_named(tmp_path):
    torch.save(resnet_classifier("resnet18"), tmp_path / "resnet.pth")
    model = STM(STMConfig.lite())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"resnet\.pth does not hold the trunk of efficientnet-lite0: missing"):
        load_trunk(model, tmp_path / "resnet.pth")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.save(lite_classifier(), tmp_path / "lite.pth")
    with pytest.raises(CheckpointError, match="does not hold the trunk of resnet18: missing res2.0.conv1.weight"):
        load_trunk(STM(STMConfig.small()), tmp_path / "lite.pth")
    with pytest.raises(FileNotFoundError, match=r"no such file: .*none\.pth"):
        load_trunk(model, tmp_path / "none.pth")


def test_a_folded_lite_network_computes_the_same(tmp_path):
    torch.save(lite_classifier(), tmp_path / "lite.pth")
    model = loaded("efficientnet-lite0", tmp_path / "lite.pth")
    folded = fold_batch_norm(model)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    frame, mask = torch.rand(1, 3, 48, 64), torch.rand(2, 48, 64)
    for ours, theirs in zip(
        folded.memorize(frame, mask, mask.flip(0), [2]), model.memorize(frame, mask, mask.flip(0), [2]), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_shape_is_read_off_the_tensors():
    for config in (STMConfig.lite(), STMConfig.lite("scribbles")):
        with torch.device("meta"):
            assert STMConfig.of_tensors(STM(config).state_dict()) == config


def depthwise(x, weight, stride):
    """The convolution, with gradients to both."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=len(weight)), x, weight


@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_depthwise_gradients_equal_those_in_float64(kernel, stride):
    torch.manual_seed(0)
    layer = DepthwiseConv2d(32, kernel, stride)
    x = torch.randn(2, 32, 11, 18, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    layer.weight.data = layer.weight.data.bfloat16().float()
    truth, *wide = depthwise(x.double(), layer.weight.double(), stride)
    plain, *narrow = depthwise(x, layer.weight.bfloat16(), stride)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    gradient = torch.randn_like(out)
    for result in (out, truth, plain):
        result.backward(gradient.to(result.dtype))
    if (kernel, stride) == (3, 1):
        # PyTorch's own, which sums in bfloat16 on some processors: twice its error, and one rounding to bfloat16
        ours = (out, x.grad, layer.weight.grad)
        pytorchs, exacts = (plain, *(tensor.grad for tensor in narrow)), (truth, *(tensor.grad for tensor in wide))
        for found, same, exact in zip(ours, pytorchs, exacts, strict=True):
            errors = [(value.double() - exact).abs().max() for value in (found, same)]
            assert errors[0] <= 2 * errors[1] + 2**-8 * exact.abs().max()
        return
    # sums of n products in float32 err by n roundings of their magnitudes at most; but for the weights' gradients, what
    # comes out is rounded to bfloat16
    magnitude, *sizes = depthwise(x.double().abs(), layer.weight.double().abs(), stride)
    magnitude.backward(gradient.double().abs())
    for found, exact, size, terms, rounding in (
        (out, truth, magnitude, kernel**2, 2**-8),
        (x.grad, wide[0].grad, sizes[0].grad, kernel**2, 2**-8),
        (layer.weight.grad, wide[1].grad, sizes[1].grad, gradient[:, 0].numel(), 0.0),
    ):
        assert ((found.double() - exact).abs() <= rounding * exact.abs() + terms * 2**-24 * size).all()


def test_a_fresh_lite_network_starts_with_its_residual_branches_closed():
    model = STM(STMConfig.lite())
    initialize(model)
    block = model.Encoder_Q.res4[1].eval()
    x = torch.rand(1, 80, 4, 4)
    torch.testing.assert_close(block(x.clone()), x)
    # a block without a shortcut is open, or nothing would get through
    assert model.eval().encode_query(torch.rand(1, 3, 32, 32)).features.stride16.abs().max() > 0


def test_the_first_stage_stays_and_the_trunk_learns_at_its_rate(tmp_path):
    torch.save(lite_classifier(), tmp_path / "lite.pth")
    config = TrainConfig(
        tmp_path, network="lite", trunk=tmp_path / "lite.pth", freeze_first_stage=True, trunk_rate=0.25
    )
    state = TrainState(config, torch.device("cpu"))
    state.set_mode(1)
    encoder = state.model.Encoder_Q
    assert not encoder.bn1.training
    assert not any(module.training for module in encoder.res2.modules() if isinstance(module, torch.nn.BatchNorm2d))
    assert encoder.res3[0].project[1].training
    assert state.model.Encoder_M.bn1.training
    rates = {id(parameter): group["rate"] for group in state.optimizer.param_groups for parameter in group["params"]}
    for name, parameter in state.model.named_parameters():
        if name.startswith(("Encoder_Q.conv1.", "Encoder_Q.bn1.", "Encoder_Q.res2.")):
            assert id(parameter) not in rates
        else:
            in_trunk = re.match(r"Encoder_.\.(conv1|bn1|res.)\.", name)
            assert rates[id(parameter)] == (0.25 if in_trunk else 1.0), name


def test_weights_to_start_from_and_a_trunk_are_one_too_many(tmp_path):
    with pytest.raises(ValueError, match="init, trunk: expected one of them"):
        TrainConfig(tmp_path, init=tmp_path / "a.pth", trunk=tmp_path / "b.pth")
    with pytest.raises(ValueError, match="freeze_first_stage: expected a trunk"):
        LiteConfig(tmp_path)


def test_weights_to_start_from_have_their_own_shape(tmp_path):
    model = STM(STMConfig.lite())
    write_tensors(model.state_dict(), tmp_path / "lite.safetensors")
    for guidance, rounds in (("masks", 0), ("scribbles", 2)):
        config = TrainConfig(tmp_path / guidance, init=tmp_path / "lite.safetensors", rounds=rounds)
        assert TrainState(config, torch.device("cpu")).model.config == STMConfig.lite(guidance)
    torch.save(lite_classifier(), tmp_path / "classifier.pth")
    with pytest.raises(CheckpointError, match="does not hold an STM: missing"):
        TrainState(TrainConfig(tmp_path / "run", init=tmp_path / "classifier.pth"), torch.device("cpu"))


def loaded(backbone: str, path) -> STM:
    model = STM(STMConfig(backbone, key_channels=16, value_channels=16, decoder_channels=16))
    load_trunk(model, path)
    return model.eval().requires_grad_(False)


def same_maps(model: STM, frame: torch.Tensor, maps: list[torch.Tensor]) -> None:
    """The query encoder's maps are these, and those of the memory encoder without any mask."""
    features = model.Encoder_Q(frame)
    for ours, theirs in zip((features.stride4, features.stride8, features.stride16), maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    nothing = torch.zeros(1, len(model.Encoder_M.guides), *frame.shape[-2:])
    torch.testing.assert_close(model.Encoder_M(frame, nothing, [1]), features.stride16)


def lite_classifier() -> dict[str, torch.Tensor]:
    """Random tensors named as those of the published EfficientNet-Lite0."""
    tensors: dict[str, torch.Tensor] = {}
    convolution(tensors, "_conv_stem", "_bn0", (32, 3, 3, 3))
    for number, (channels, out_channels, kernel, _, expansion) in enumerate(LITE_BLOCKS):
        name, wide = f"_blocks.{number}.", channels * expansion
        if expansion > 1:
            convolution(tensors, name + "_expand_conv", name + "_bn0", (wide, channels, 1, 1))
        convolution(tensors, name + "_depthwise_conv", name + "_bn1", (wide, 1, kernel, kernel))
        convolution(tensors, name + "_project_conv", name + "_bn2", (out_channels, wide, 1, 1))
    convolution(tensors, "_conv_head", "_bn1", (1280, 320, 1, 1))
    return tensors | {"_fc.weight": torch.rand(10, 1280), "_fc.bias": torch.rand(10)}


def resnet_classifier(backbone: str) -> dict[str, torch.Tensor]:
    """Random tensors named as those of torchvision's ResNets."""
    kind, depths = RESNETS[backbone]
    tensors: dict[str, torch.Tensor] = {}
    convolution(tensors, "conv1", "bn1", (64, 3, 7, 7))
    channels = 64
    for layer, depth in enumerate(depths, 1):
        narrow = 32 * 2**layer
        out_channels = narrow * (4 if kind == "bottleneck" else 1)
        for block in range(depth):
            name = f"layer{layer}.{block}."
            if kind == "basic":
                shapes = [(narrow, channels, 3, 3), (narrow, narrow, 3, 3)]
            else:
                shapes = [(narrow, channels, 1, 1), (narrow, narrow, 3, 3), (out_channels, narrow, 1, 1)]
            for index, shape in enumerate(shapes, 1):
                convolution(tensors, f"{name}conv{index}", f"{name}bn{index}", shape)
            if block == 0 and (channels != out_channels or layer > 1):
                convolution(tensors, name + "downsample.0", name + "downsample.1", (out_channels, channels, 1, 1))
            channels = out_channels
    return tensors | {"fc.weight": torch.rand(10, channels), "fc.bias": torch.rand(10)}


def resnet_block(x: torch.Tensor, tensors: dict[str, torch.Tensor], name: str, stride: int) -> torch.Tensor:
    last = 3 if f"{name}conv3.weight" in tensors else 2
    y = x
    for index in range(1, last + 1):
        weight = tensors[f"{name}conv{index}.weight"]
        # the first 3×3 convolution of a block carries the stride
        step = stride if index == last - 1 else 1
        y = norm(F.conv2d(y, weight, stride=step, padding=weight.shape[-1] // 2), tensors, f"{name}bn{index}")
        y = F.relu(y) if index < last else y
    if f"{name}downsample.0.weight" in tensors:
        x = norm(F.conv2d(x, tensors[f"{name}downsample.0.weight"], stride=stride), tensors, f"{name}downsample.1")
    return F.relu(x + y)


def convolution(tensors: dict[str, torch.Tensor], name: str, norm_name: str, shape: tuple[int, ...]) -> None:
    """Add a random convolution and the batch norm behind it."""
    random = torch.Generator().manual_seed(len(tensors))
    fan_in = shape[1] * shape[2] * shape[3]
    tensors[f"{name}.weight"] = torch.randn(shape, generator=random) * (2 / fan_in) ** 0.5
    for part, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
        tensors[f"{norm_name}.{part}"] = torch.rand(shape[0], generator=random) + low
    tensors[f"{norm_name}.num_batches_tracked"] = torch.tensor(7)


def norm(x: torch.Tensor, tensors: dict[str, torch.Tensor], name: str, epsilon: float = 1e-5) -> torch.Tensor:
    mean, variance, weight, bias = (
        tensors[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return F.batch_norm(x, mean, variance, weight, bias, eps=epsilon)
