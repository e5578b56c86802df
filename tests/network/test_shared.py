"""The shared form: one encoding per frame for all its objects, one set of keys, the previous masks as a hint."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d, max_pool2d

from stm_kernels import memory_read
from stm_model import STM, STMConfig
from stm_model.data.synthetic import procedural_clip
from stm_model.network import (
    as_positions,
    fold_batch_norm,
    other_object_masks,
    scribble_tensors,
    soft_aggregate,
)
from stm_model.network.inference import fuse_activations
from stm_model.network.weights import write_tensors
from stm_model.tracking.reach import hold_back
from stm_model.tracking.tracker import Tracker
from stm_model.training.loss import clip_loss
from stm_model.training.state import initialize

CONFIG = replace(STMConfig.shared(), key_channels=8, value_channels=12, decoder_channels=16)


@pytest.fixture(scope="module")
def model() -> STM:
    """An untrained network in float64, in which every part moves the masks."""
    torch.manual_seed(0)
    return STM(CONFIG).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def scene():
    """Two frames, and soft masks of three objects."""
    random = torch.Generator().manual_seed(1)
    frames = torch.rand(2, 3, 64, 96, generator=random, dtype=torch.float64)
    return frames, torch.rand(3, 64, 96, generator=random, dtype=torch.float64).softmax(0)


def segment(model: STM, frames: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """The second of two frames from the first with its masks `[n, H, W]`."""
    others, objects = other_object_masks(masks), [len(masks)]
    key, value = model.memorize(frames[:1], masks, others, objects)
    query = model.encode_query(frames[1:])
    readout = [
        memory_read(as_positions(query.key), as_positions(key), as_positions(one[None]), similarity="l2")
        for one in value
    ]
    height, width = query.key.shape[-2:]
    maps = torch.cat(readout).transpose(1, 2).unflatten(2, (height, width))
    return model.segment(maps, query, objects, (masks, others))


@pytest.mark.parametrize("guidance", ["masks", "scribbles"])
@pytest.mark.parametrize("prior", [True, False])
def test_the_weights_say_which_form_they_have(tmp_path, guidance, prior):
    config = replace(CONFIG, guidance=guidance, prior=prior)
    write_tensors(STM(config).state_dict(), tmp_path / "shared.safetensors")
    assert STM.load(tmp_path / "shared.safetensors", device="cpu").config == config


@pytest.mark.parametrize("number", [1, 2])
def test_the_weights_say_which_trunk_they_have(number):
    config = replace(CONFIG, backbone=f"efficientnet-lite{number}")
    with torch.device("meta"):
        assert STMConfig.of_tensors(STM(config).state_dict()) == config
        separate = replace(STMConfig.lite(), backbone=f"efficientnet-lite{number}")
        assert STMConfig.of_tensors(STM(separate).state_dict()) == separate


def test_a_form_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"backbone: expected one of efficientnet-lite0.* got 'resnet50'"):
        STMConfig(form="shared")
    with pytest.raises(ValueError, match="prior: expected the shared form"):
        STMConfig(prior=True)
    with pytest.raises(ValueError, match="decoder_channels: expected a multiple of 4 for the shared form, got 18"):
        replace(CONFIG, decoder_channels=18)


def test_objects_do_not_depend_on_their_order(model, scene):
    frames, masks = scene
    order = [2, 0, 1]
    torch.testing.assert_close(segment(model, frames, masks[order]), segment(model, frames, masks)[order])


def test_an_object_sees_the_others_and_the_previous_masks(model, scene):
    frames, masks = scene
    query = model.encode_query(frames[1:])
    _, value = model.memorize(query, masks, other_object_masks(masks), [3])
    seen = model.segment(value, query, [3], (masks, other_object_masks(masks)))
    for previous in ((masks, torch.zeros_like(masks)), (torch.zeros_like(masks), other_object_masks(masks))):
        assert (model.segment(value, query, [3], previous) - seen).abs().max() > 1e-3
    alone = model.memorize(query, masks, torch.zeros_like(masks), [3])[1]
    assert (alone - value).abs().max() > 1e-3
    with pytest.raises(ValueError, match="previous: expected the masks of the frame before"):
        model.segment(value, query, [3])


def test_objects_of_many_clips_in_one_batch_equal_one_clip_at_a_time(model, scene):
    frames, masks = scene
    others, counts = 1 - masks, [2, 1]
    query = model.encode_query(frames)
    key, value = model.memorize(frames, masks, others, counts)
    together = model.segment(value, query, counts, (masks, others))
    assert len(key) == 2 and len(value) == len(together) == 3
    for clip, part in enumerate((slice(0, 2), slice(2, 3))):
        one = model.encode_query(frames[clip : clip + 1])
        one_key, one_value = model.memorize(one, masks[part], others[part], counts[clip : clip + 1])
        torch.testing.assert_close(one_key[0], key[clip])
        torch.testing.assert_close(one_value, value[part])
        alone = model.segment(one_value, one, counts[clip : clip + 1], (masks[part], others[part]))
        torch.testing.assert_close(alone, together[part])


def test_folded_batch_norm_computes_the_same(scene):
    frames, masks = scene
    torch.manual_seed(2)
    model = STM(CONFIG).double().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    folded = fold_batch_norm(model)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    # batch norm is folded in float32
    torch.testing.assert_close(segment(folded, frames, masks), segment(model, frames, masks), rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter(clips_of_two):
    torch.manual_seed(0)
    model = STM(CONFIG)
    initialize(model)
    # residual branches are closed at first, and what is inside them waits
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    clip_loss(model, clips_of_two, prior_noise=0.5).backward()
    without = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert not without


@pytest.fixture(scope="module")
def clips_of_two():
    from stm_model.data.synthetic import ProceduralClips

    clips = ProceduralClips(3, (64, 96), (1, 3))
    return [clips[seed] for seed in (4, 9)]


def test_tracking_is_the_loop_of_the_paper(model):
    frames, labels = procedural_clip(frames=5, size=(64, 96), objects=2, seed=3)
    tracked = [result.probabilities for result in Tracker(model, memory="every:2").track(frames, {0: labels[0]})]
    images = torch.from_numpy(frames).permute(0, 3, 1, 2).double() / 255
    probabilities = torch.stack([torch.from_numpy(labels[0] == label) for label in range(3)]).double()
    keys, values = [], []
    for index in range(1, 5):
        masks, others = probabilities[1:], other_object_masks(probabilities[1:])
        key, value = model.memorize(images[index - 1 : index], masks, others, [2])
        memory_keys = [keys[place] for place in range(0, index - 1, 2)] + [key]
        memory_values = [values[place] for place in range(0, index - 1, 2)] + [value]
        query = model.encode_query(images[index : index + 1])
        readout = memory_read(
            as_positions(query.key).expand(2, -1, -1),
            torch.cat([as_positions(one).expand(2, -1, -1) for one in memory_keys], 1),
            torch.cat([as_positions(one) for one in memory_values], 1),
            similarity="l2",
            implementation="reference",
        )
        maps = readout.transpose(1, 2).unflatten(2, query.key.shape[-2:])
        objects = model.segment(maps, query, [2], (masks, others))
        objects = hold_back(objects, avg_pool2d(objects, 16), max_pool2d(masks, 16))
        probabilities = soft_aggregate(objects).softmax(0).double()
        torch.testing.assert_close(tracked[index], probabilities.float(), rtol=1e-4, atol=1e-5)
        keys.append(key)
        values.append(value)


def test_a_frame_is_encoded_once_and_its_key_held_once(model):
    frames, labels = procedural_clip(frames=4, size=(64, 96), objects=3, seed=3)
    tracker, encoded = Tracker(model), []
    tracker.model.Encoder.register_forward_pre_hook(lambda module, inputs: encoded.append(len(inputs[0])))
    results = list(tracker.track(frames, {0: labels[0]}))
    assert encoded == [1] * 4 and len(results[-1].objects) == 3
    (memory,) = tracker.bank.memories
    assert memory.pages.batch == 1
    plan = tracker.plan(frames.shape[1:3], 4, {0: labels[0]})
    # with a channel for what a position weighs
    assert plan.frame_bytes == 4 * 6 * (CONFIG.key_channels + 1 + 3 * CONFIG.value_channels) * 8


@pytest.mark.parametrize("given", [{0: 1, 2: 2}, {0: 3}])
def test_objects_that_enter_later_and_resumed_videos(model, given):
    """An object that enters later is tracked beside the others; a video goes on from a state to the bit."""
    frames, labels = procedural_clip(frames=6, size=(64, 96), objects=3, seed=3)
    masks = {index: np.where(labels[index] <= most, labels[index], 0) for index, most in given.items()}
    whole = list(Tracker(model).track(frames, masks))
    tracker = Tracker(model)
    for _, state in zip(range(4), ((result, tracker.state()) for result in tracker.track(frames, masks))):
        saved = state[1]
    resumed = list(Tracker(model).track(frames, masks, resume=saved))
    assert [result.index for result in resumed] == [4, 5]
    for ours, truth in zip(resumed, whole[4:], strict=True):
        assert torch.equal(ours.probabilities, truth.probabilities)
        assert ours.objects == truth.objects and len(truth.objects) == max(given.values())


def test_one_guided_by_scribbles_starts_from_one_guided_by_masks(model, scene):
    frames, masks = scene
    tensors = scribble_tensors(model.state_dict())
    guided = STM(STMConfig.of_tensors(tensors)).double().eval().requires_grad_(False)
    guided.load_state_dict(tensors)
    assert guided.config == replace(CONFIG, guidance="scribbles", prior=False)
    nothing = torch.zeros_like(masks)
    key, value = guided.memorize_scribbles(frames[:1], masks, nothing, 1 - masks, [3])
    truth_key, truth = model.memorize(frames[:1], masks, 1 - masks, [3])
    torch.testing.assert_close(value, truth)
    torch.testing.assert_close(key, truth_key.expand(3, -1, -1, -1))
    positive = guided.memorize_scribbles(frames[:1], nothing, masks, 1 - masks, [3])[1]
    torch.testing.assert_close(positive, truth)
    # of several frames, each object has its frame's key
    keys, _ = guided.memorize_scribbles(frames, masks, nothing, nothing, [1, 2])
    assert len(keys) == 3 and torch.equal(keys[1], keys[2]) and not torch.equal(keys[0], keys[1])
    guided.segment(value, guided.encode_query(frames[1:]), [3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_convolutions_change_no_more_than_rounding(dtype):
    model = STM(STMConfig.shared()).eval().to(dtype, memory_format=torch.channels_last)
    folded = fold_batch_norm(model)
    fused = fuse_activations(fold_batch_norm(model))
    if dtype == torch.float32:
        assert not any(isinstance(module, (torch.nn.ReLU6, torch.nn.Conv2d)) for module in fused.modules())
    frames = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before, after = folded.encode_query(frames), fused.encode_query(frames)
    for old, new in zip((before.key, *before.features), (after.key, *after.features)):
        # float32 sums in another order; bfloat16 is rounded at the same places
        allowed = 0 if dtype == torch.bfloat16 else 64 * torch.finfo(dtype).eps * old.abs().max()
        assert (new - old).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filters_that_are_ordered_for_one_size_serve_another(dtype):
    model = fold_batch_norm(STM(STMConfig.shared()).eval().to(dtype, memory_format=torch.channels_last))
    frames = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    fresh, used = fuse_activations(copy.deepcopy(model)), fuse_activations(copy.deepcopy(model))
    with torch.inference_mode():
        used.encode_query(frames.repeat(2, 1, 3, 2))
        for ours, true in zip(used.encode_query(frames).features, fresh.encode_query(frames).features):
            torch.testing.assert_close(ours, true)
    # what a state of tracking knows its network by
    assert used.state_dict().keys() == fresh.state_dict().keys()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("threads", [1, 2])
def test_no_convolution_of_a_tracked_frame_takes_a_slow_path(dtype, threads):
    frames, labels = procedural_clip(3, (96, 128), 2, seed=0)
    tracker = Tracker(STM.load(device="cpu", dtype=dtype), memory="every:1")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            list(tracker.track(frames, {0: labels[0]}))
    finally:
        torch.set_num_threads(before)
    names = {event.name for event in profile.events()}
    assert any("_convolution_pointwise" in name for name in names)
    assert not [name for name in names if "slow_conv" in name or "thnn" in name or "native_convolution" in name]
