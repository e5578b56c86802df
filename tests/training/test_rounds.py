"""Training with simulated rounds of scribbles: what is scribbled, what is remembered, and that it is learned."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from einops import rearrange

from stm_model import STM, STMConfig
from stm_model.data.clips import Clip
from stm_model.data.synthetic import ProceduralClips, procedural_clip
from stm_model.evaluation.metrics import region_similarity
from stm_model.io.images import write_image
from stm_model.io.masks import write_mask
from stm_model.network import scribble_tensors, soft_aggregate
from stm_model.network.weights import read_tensors, write_tensors
from stm_model.training.config import InteractiveConfig, SmokeConfig, TrainConfig
from stm_model.training.datasets import batches, training_clips
from stm_model.training.rounds import Annotator, RoundsLoss, region_similarities, segment_rounds
from stm_model.training.state import initialize
from stm_model.training.train import train

SHAPE = STMConfig("resnet18", key_channels=16, value_channels=16, decoder_channels=16, guidance="scribbles")
ROUNDS = 3


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    """Three clips with one, two and three objects."""
    datasets = [ProceduralClips(size=(64, 64), objects=(count, count)) for count in (1, 2, 3)]
    return [
        next(clip._replace(seed=seed) for seed in range(100) if (clip := dataset[seed]).objects == count)
        for count, dataset in enumerate(datasets, 1)
    ]


def tiny_model(sharp: bool = False) -> STM:
    torch.manual_seed(0)
    model = STM(SHAPE)
    initialize(model)
    if sharp:
        # a fresh network attends evenly and predicts next to nothing: sharper layers make all of it matter
        for layer in (model.KV_M_r4.Key, model.KV_Q_r4.Key, model.Decoder.pred2):
            torch.nn.init.normal_(layer.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return model.eval()


def test_all_frames_are_segmented_in_every_round(clips):
    with torch.no_grad():
        predictions = segment_rounds(tiny_model(), clips, ROUNDS)
    assert [[list(logits.shape) for logits in each] for each in predictions] == [
        [[3, 1 + count, 64, 64] for count in (1, 2, 3)]
    ] * ROUNDS
    assert all(logits.dtype == torch.float32 for each in predictions for logits in each)


def test_a_round_equals_one_object_and_one_frame_at_a_time(clips):
    model, remembered, (clip,) = tiny_model(sharp=True).double(), [], clips[2:]
    clip = clip._replace(frames=clip.frames.double(), seed=1)
    hook = model.Encoder_M.register_forward_pre_hook(lambda module, inputs: remembered.append(inputs))
    with torch.no_grad():
        predicted = segment_rounds(model, [clip], ROUNDS)[-1][0]
        hook.remove()
        frames, maps, objects = remembered[-1]
        assert len(frames) > 1 and objects == [3] * len(frames)
        for ours, frame in zip(predicted, clip.frames):
            query = model.encode_query(frame[None])
            masks = []
            for known in maps.unflatten(0, (-1, 3)).unbind(1):
                key, value = model.memorize_scribbles(frames, *known.unbind(1), [1] * len(frames))
                key, value = (rearrange(part, "a d h w -> (a h w) d") for part in (key, value))
                weight = torch.softmax(rearrange(query.key[0], "c h w -> (h w) c") @ key.T / key.shape[1] ** 0.5, 1)
                readout = rearrange(weight @ value, "(h w) v -> 1 v h w", h=4)
                masks.append(model.segment(readout, query, [1]))
            torch.testing.assert_close(ours.softmax(0), soft_aggregate(torch.cat(masks)).softmax(0), atol=1e-6, rtol=0)


def test_ragged_batches_equal_the_clips_one_by_one(clips):
    # in float64: what is scribbled depends on what is predicted, to the last digit
    model = tiny_model(sharp=True).double()
    clips = [clip._replace(frames=clip.frames.double()) for clip in clips]
    with torch.no_grad():
        together = segment_rounds(model, clips, ROUNDS)[-1]
        apart = [segment_rounds(model, [clip], ROUNDS)[-1][0] for clip in clips]
    for ours, truth in zip(together, apart):
        torch.testing.assert_close(ours.softmax(1), truth.softmax(1), atol=1e-6, rtol=0)


def test_scribbles_are_a_function_of_the_seed(clips):
    model = tiny_model(sharp=True)
    with torch.no_grad():
        one, again = (segment_rounds(model, clips, ROUNDS)[-1] for _ in range(2))
        other = segment_rounds(model, [clip._replace(seed=clip.seed + 1) for clip in clips], ROUNDS)[-1]
    assert all(torch.equal(*pair) for pair in zip(one, again))
    assert not any(torch.equal(*pair) for pair in zip(one, other))


def test_frames_are_encoded_once_and_annotated_ones_remembered_with_their_masks(clips):
    model, encoded, remembered = tiny_model(), [], []
    model.Encoder_Q.register_forward_pre_hook(lambda module, inputs: encoded.append(len(inputs[0])))
    model.Encoder_M.register_forward_pre_hook(lambda module, inputs: remembered.append(inputs))
    with torch.no_grad():
        predictions = segment_rounds(model, clips[1:2], ROUNDS)
    assert encoded == [3]
    frames, maps, objects = remembered[0]
    masks, positive, _ = maps.unbind(1)
    assert torch.equal(frames, clips[1].frames[:1]) and objects == [2]
    assert (masks == 0.5).all() and set(positive.unique().tolist()) == {0.0, 1.0}
    assert all(1 <= len(frames) <= number for number, (frames, _, _) in enumerate(remembered, 1))
    # the first frame stays in the memory, with the soft masks of the round before
    for (_, maps, _), (logits,) in zip(remembered[1:], predictions):
        assert torch.equal(maps[:2, 0], torch.softmax(logits[0], 0)[1:])


def test_the_first_scribbles_are_on_every_object_and_say_the_truth(clips):
    for clip in clips:
        annotator = Annotator(clip)
        annotator.scribble(None)
        assert list(annotator.drawings) == [0]
        drawing, truth = annotator.drawings[0], clip.labels[0].numpy()
        assert (drawing[drawing >= 0] == truth[drawing >= 0]).all()
        assert set(np.unique(drawing)) - {-1, 0} == set(range(1, clip.objects + 1))
        positive, negative = annotator.maps(0)
        assert positive.shape == negative.shape == (clip.objects, 64, 64) and (positive * negative).sum() == 0


def test_corrections_are_where_the_prediction_is_wrong(clips):
    truth, drawings = clips[1].labels.numpy(), []
    wrong = np.roll(truth, 5, axis=2)
    for seed in range(20):
        annotator = Annotator(clips[1]._replace(seed=seed))
        annotator.scribble(wrong)
        drawings += annotator.drawings.items()
    assert 8 <= len(drawings) < 20, "some rounds are without scribbles"
    for index, drawing in drawings:
        drawn = drawing >= 0
        assert (drawing[drawn] == truth[index][drawn]).all() and (wrong[index][drawn] != truth[index][drawn]).all()
    annotator = Annotator(clips[1])
    for _ in range(4):
        annotator.scribble(truth)
    assert annotator.drawings and all((drawing == -1).all() for drawing in annotator.drawings.values())


def test_the_worst_frame_is_scribbled_on_most(clips):
    truth = clips[1].labels.numpy()
    predicted = truth.copy()
    predicted[0, :, :40], predicted[1] = 0, 0
    expected = [
        np.mean([region_similarity(ours == label, true == label) for label in (1, 2)])
        for ours, true in zip(predicted, truth)
    ]
    assert region_similarities(predicted, truth, 2).tolist() == expected and np.argmin(expected) == 1
    chosen = []
    for seed in range(40):
        annotator = Annotator(clips[1]._replace(seed=seed))
        annotator.scribble(predicted)
        chosen += annotator.drawings
    assert set(chosen) == {0, 1, 2} and chosen.count(1) > len(chosen) / 2


def test_void_is_scribbled_on_by_nobody(clips):
    labels = clips[0].labels.clone()
    labels[:, 20:40] = 255
    for predicted in (None, np.ones_like(labels.numpy()), np.zeros_like(labels.numpy())):
        annotator = Annotator(clips[0]._replace(labels=labels))
        annotator.scribble(predicted)
        assert all((drawing[20:40] == -1).all() for drawing in annotator.drawings.values())


def test_gradients_reach_every_part_and_do_not_need_kept_activations(clips):
    gradients = []
    for recompute in (False, True):
        model = tiny_model(sharp=True)
        RoundsLoss(model, ROUNDS, 0.5, recompute=recompute)(clips).backward()
        parameters = dict(model.named_parameters())
        for name in ("conv1_m", "conv1_p", "conv1_n", "conv1"):
            assert parameters[f"Encoder_M.{name}.weight"].grad.norm() > 0, name
        gradients.append(torch.cat([value.grad.flatten() for value in parameters.values()]))
    assert (gradients[1] - gradients[0]).norm() <= 1e-5 * gradients[0].norm() > 0


def test_one_clip_is_learned_by_heart(tmp_path):
    config = SmokeConfig(out=tmp_path / "run", rounds=2, crop=64, steps=40, picture_every=20, device="cpu")
    model = STM.load(train(config), device="cpu")
    assert model.config == STMConfig.small("scribbles")
    ((clip,),) = batches(dataclasses.replace(config, steps=1), training_clips(config), 0)
    with torch.no_grad():
        logits = segment_rounds(model, [clip], 2)[-1][0]
    assert region_similarities(logits.argmax(1).numpy(), clip.labels.numpy(), clip.objects).min() >= 0.9
    assert sorted(path.name for path in (config.out / "pictures").iterdir()) == ["000020.png", "000040.png"]


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return TrainConfig(out=tmp_path / "run", steps=2, batch=1, crop=32, log_every=1, device="cpu", rounds=2)


def test_a_run_starts_from_the_weights_of_a_tracker_or_its_own(config, tmp_path):
    torch.manual_seed(1)
    tracking = STM(STMConfig.small())
    write_tensors(tracking.state_dict(), tmp_path / "tracking.safetensors")
    config = dataclasses.replace(config, steps=1, learning_rate=1e-9, freeze_batch_norm=0.0, ema=0.0)
    first = train(dataclasses.replace(config, init=tmp_path / "tracking.safetensors"))
    second = train(dataclasses.replace(config, init=first, out=tmp_path / "second"))
    truth = scribble_tensors(tracking.state_dict())
    for weights in (first, second):
        tensors = read_tensors(weights)
        assert all(torch.allclose(tensors[name].float(), value.float(), atol=1e-3) for name, value in truth.items())
    assert InteractiveConfig(out=tmp_path).network_shape == STMConfig.small("scribbles")


def test_held_out_videos_are_scored_by_scribbles_on_them(config, tmp_path):
    frames, labels = procedural_clip(frames=5, size=(40, 64), objects=1, seed=2)
    root = tmp_path / "davis"
    for kind, write, pictures, suffix in (
        ("JPEGImages", write_image, frames, "jpg"),
        ("Annotations", write_mask, labels, "png"),
    ):
        (root / kind / "240p" / "boat").mkdir(parents=True)
        for index, picture in enumerate(pictures):
            write(root / kind / "240p" / "boat" / f"{index:05d}.{suffix}", picture)
    (root / "ImageSets" / "2016").mkdir(parents=True)
    for split in ("train", "val"):
        (root / "ImageSets/2016" / f"{split}.txt").write_text("boat\n")
    train(dataclasses.replace(config, data=(root,)))
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2 and 0 <= lines[-1]["J"] <= 1 and 0 <= lines[-1]["F"] <= 1
