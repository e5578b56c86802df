"""The network against the numbers of the released model, and its own promises."""

import copy

import numpy as np
import pytest
import torch

from stm_kernels import SpaceTimeMemoryRead, space_time_memory_read
from stm_model import STM, STMConfig
from stm_model.network import aggregated, fold_batch_norm, for_inference, other_object_masks, soft_aggregate
from stm_model.tracking.tracker import Tracker

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def step(parity_folder):
    """One step of the released model: the case's frames and mask, and every intermediate."""
    case = np.load(parity_folder / "case_A.npz")
    truth = np.load(parity_folder / "step_A.npz")
    frames = torch.from_numpy(case["frames"]).permute(0, 3, 1, 2).float() / 255
    masks = torch.stack([torch.from_numpy(case["mask0"] == label).float() for label in (1, 2)])
    return frames, masks, {name: torch.from_numpy(truth[name]) for name in truth.files}


def assert_close(ours, truth):
    """Equal to the tolerance, at the channels and pixels that the truth has: all, or every n-th."""
    strides = [have // kept for have, kept in zip(ours.shape, truth.shape, strict=True)]
    ours = ours[tuple(slice(None, None, stride) for stride in strides)]
    torch.testing.assert_close(ours, truth, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("fold", [False, True], ids=["as loaded", "batch norm folded"])
def test_every_stage_equals_the_released_model(released_model, step, fold):
    model = fold_batch_norm(released_model) if fold else released_model
    assert fold != any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    frames, masks, truth = step
    with torch.no_grad():
        key, value = model.memorize(frames[:1], masks, other_object_masks(masks), [2])
        assert_close(key[:, :, None], truth["mem_key"])
        assert_close(value[:, :, None], truth["mem_val"])
        query = model.encode_query(frames[1:2])
        assert_close(query.key, truth["q_key"])
        assert_close(query.value, truth["q_val"])
        readout = space_time_memory_read(query.key.expand(2, -1, -1, -1), key[:, :, None], value[:, :, None])
        joined = torch.cat([readout, query.value.expand(2, -1, -1, -1)], 1)
        assert_close(joined, truth["read_cat"])
        logits = model.Decoder(joined, query.features, [2])
        assert_close(logits, truth["dec_logit"])
        assert_close(soft_aggregate(logits.softmax(1)[:, 1]), truth["agg_logit"])
        probabilities = model.segment(readout, query, [2])
        assert_close(probabilities, truth["dec_logit"].softmax(1)[:, 1])


def test_the_read_module_equals_the_released_one(parity_folder):
    truth = np.load(parity_folder / "memory_read.npz")
    inputs = [torch.from_numpy(truth[f"small_{name}"]) for name in ("m_key", "m_val", "q_key", "q_val")]
    assert_close(SpaceTimeMemoryRead()(*inputs)[0], torch.from_numpy(truth["small_out"]))


@pytest.mark.parametrize("parity_folder, case", [("cut", "A"), ("whole", "B")], indirect=["parity_folder"])
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_whole_videos_equal_the_released_model(released_model, parity_folder, case, implementation):
    truth = np.load(parity_folder / f"case_{case}.npz")
    tracker = Tracker(released_model, memory=f"every:{int(truth['mem_every'])}", implementation=implementation)
    results = list(tracker.track(truth["frames"], {0: truth["mask0"]}))
    probabilities = torch.stack([result.probabilities for result in results], 1)
    # the released code aggregates over 11 labels, which moves a probability by up to 4e-6
    assert_close(probabilities, torch.from_numpy(truth["prob"] / 2.0**20).float())
    labels = np.stack([result.labels for result in results])
    sure = np.sort(probabilities.numpy(), 0)
    sure = sure[-1] - sure[-2] > 2 * TOLERANCE
    assert sure.mean() > 0.95
    np.testing.assert_array_equal(labels[sure], truth["pred"][sure])


def test_the_released_shape(parity_tensors):
    model = STM()
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == {
        name: list(value.shape) for name, value in parity_tensors.items()
    }
    assert sum(parameter.numel() for parameter in model.parameters()) == 38_925_570


def test_objects_of_many_clips_in_one_batch_equal_one_clip_at_a_time(small_model):
    torch.manual_seed(1)
    counts = [2, 1, 3]
    frames, masks = torch.rand(3, 3, 32, 48), torch.rand(6, 32, 48)
    others = torch.cat([other_object_masks(part) for part in masks.split(counts)])
    with torch.no_grad():
        query = small_model.encode_query(frames)
        key, value = small_model.memorize(frames, masks, others, counts)
        together = small_model.segment(value, query, counts)
        start = 0
        for clip, count in enumerate(counts):
            part = slice(start, start + count)
            start += count
            one_query = small_model.encode_query(frames[clip : clip + 1])
            one_key, one_value = small_model.memorize(frames[clip : clip + 1], masks[part], others[part], [count])
            assert_close(one_key, key[part])
            assert_close(one_value, value[part])
            assert_close(small_model.segment(one_value, one_query, [count]), together[part])


def test_soft_aggregation_is_a_distribution_that_orders_objects_as_they_were():
    torch.manual_seed(0)
    objects = torch.rand(4, 5, 6)
    objects[:, 0, 0], objects[:, 0, 1] = 0.0, 1.0
    probabilities = soft_aggregate(objects).softmax(0)
    assert probabilities.shape == (5, 5, 6) and probabilities.isfinite().all()
    torch.testing.assert_close(probabilities.sum(0), torch.ones(5, 6))
    assert torch.equal(probabilities[1:].argsort(0)[:, 1:], objects.argsort(0)[:, 1:])
    assert probabilities[0, 0, 0] > 0.99
    permutation = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(soft_aggregate(objects[permutation])[1:], soft_aggregate(objects)[1:][permutation])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_odds_by_their_sum_are_the_softmax_of_soft_aggregation(count):
    objects = torch.rand(count, 64, 64, generator=torch.Generator().manual_seed(count))
    objects[:, 0], objects[0, 1], objects[-1, 2] = 0.0, 1.0, 1e-9
    objects[:, 3] = 1.0
    given = objects.clone()
    torch.testing.assert_close(aggregated(objects), soft_aggregate(objects).softmax(0), atol=1e-6, rtol=1e-5)
    assert torch.equal(objects, given)


def test_soft_aggregation_of_two_halves():
    """The background has (1 − ½)² = ¼, that is odds of ⅓ beside 1 and 1: a seventh of all."""
    found = soft_aggregate(torch.full((2, 1), 0.5)).softmax(0).flatten()
    torch.testing.assert_close(found, torch.tensor([1 / 7, 3 / 7, 3 / 7]))


def test_one_object_has_no_others():
    assert torch.equal(other_object_masks(torch.rand(1, 4, 4)), torch.zeros(1, 4, 4))
    masks = torch.tensor([0.5, 0.75, 0.0]).view(3, 1, 1)
    assert other_object_masks(masks).flatten().tolist() == [0.75, 0.5, 1.0]


def test_an_unknown_backbone_is_named():
    with pytest.raises(ValueError, match="backbone: expected one of .*resnet18, resnet50, got 'vgg'"):
        STMConfig(backbone="vgg")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [STMConfig(), STMConfig.small()], ids=["released", "small"])
def test_a_network_that_only_predicts_is_as_exact_however_its_weights_lie(config, dtype):
    torch.manual_seed(0)
    model = STM(config).eval().requires_grad_(False)
    frames, masks = torch.rand(1, 3, 32, 48), torch.rand(2, 32, 48)

    def outputs(network, dtype):
        query = network.encode_query(frames.to(dtype))
        key, value = network.memorize(frames.to(dtype), masks.to(dtype), 1 - masks.to(dtype), [2])
        return query.key, key, value, network.segment(value, query, [2])

    with torch.inference_mode():
        truth = outputs(fold_batch_norm(copy.deepcopy(model).double()), torch.float64)
        unfused = outputs(fold_batch_norm(copy.deepcopy(model).to(dtype)), torch.float32)
        # of a network as `STM()` and `load_state_dict` leave it, not channels-last
        fused = outputs(for_inference(copy.deepcopy(model).to(dtype)), torch.float32)
    for true, before, after in zip(truth, unfused, fused):
        spread, allowed = (after - true).square().mean().sqrt(), (before - true).square().mean().sqrt()
        # it rounds less often, and sums in another order
        assert spread <= 1.25 * allowed + 64 * torch.finfo(torch.float32).eps * true.square().mean().sqrt()
