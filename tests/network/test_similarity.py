"""A network that compares keys by their distance: it reads so wherever it reads, and its weights say so."""

import pytest
import torch
from einops import rearrange

from stm_model import STM, STMConfig, Tracker
from stm_model.data.clips import Clip
from stm_model.interactive.segmenter import Annotation, Segmenter
from stm_model.network import as_positions, other_object_masks, scribble_tensors, soft_aggregate
from stm_model.network.weights import CheckpointError, read_tensors, write_tensors
from stm_model.tracking.budget import MemoryRule
from stm_model.tracking.memory import USED, SpaceTimeMemory
from stm_model.training.config import SmokeConfig
from stm_model.training.loss import segment_clips
from stm_model.training.rounds import segment_rounds
from stm_model.training.train import train

SHAPE = {"backbone": "resnet18", "key_channels": 16, "value_channels": 16, "decoder_channels": 16}


def network(similarity: str, guidance: str = "masks") -> STM:
    torch.manual_seed(0)
    model = STM(STMConfig(**SHAPE, guidance=guidance, similarity=similarity)).eval().requires_grad_(False)
    # keys whose similarities lie far enough apart to matter
    for layer in (model.KV_M_r4.Key, model.KV_Q_r4.Key):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def clip() -> Clip:
    """Two frames with two objects."""
    random = torch.Generator().manual_seed(1)
    frames = torch.randint(256, (2, 3, 64, 80), generator=random).float() / 255
    labels = torch.zeros(2, 64, 80, dtype=torch.uint8)
    labels[:, 8:40, 8:40], labels[:, 30:60, 44:72] = 1, 2
    return Clip(frames, labels)


def segmented(model: STM, memory: tuple[torch.Tensor, torch.Tensor], frame: torch.Tensor) -> torch.Tensor:
    """Logits `[n + 1, H, W]` of a frame, the memory read in float64, by the formula."""
    query = model.encode_query(frame[None])
    keys, values = (as_positions(part).double() for part in memory)
    queries = as_positions(query.key).double()
    if model.config.similarity == "l2":
        affinity = -(queries[:, :, None] - keys[:, None]).square().sum(3)
    else:
        affinity = queries @ keys.mT
    readout = (torch.softmax(affinity / SHAPE["key_channels"] ** 0.5, 2) @ values).float()
    height, width = query.key.shape[2:]
    maps = rearrange(readout, "n (h w) v -> n v h w", h=height, w=width)
    return soft_aggregate(model.segment(maps, query, [len(maps)]))


def one_hot(labels: torch.Tensor) -> torch.Tensor:
    return torch.stack([labels == 1, labels == 2]).float()


@pytest.mark.parametrize("similarity", ["dot", "l2"])
def test_training_and_tracking_read_by_it(clip, similarity):
    model, masks = network(similarity), one_hot(clip.labels[0])
    memory = model.memorize(clip.frames[:1], masks, other_object_masks(masks), [2])
    truth = segmented(model, memory, clip.frames[1])
    torch.testing.assert_close(segment_clips(model, [clip])[0][0], truth, rtol=1e-4, atol=1e-4)
    frames = (clip.frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    tracker = Tracker(model, memory="first")
    *_, result = tracker.track(frames, {0: clip.labels[0].numpy()})
    torch.testing.assert_close(result.probabilities, torch.softmax(truth, 0), rtol=1e-4, atol=1e-4)
    other = segmented(network("l2" if similarity == "dot" else "dot"), memory, clip.frames[1])
    assert (other - truth).abs().max() > 1e-2


@pytest.mark.parametrize("similarity", ["dot", "l2"])
def test_rounds_of_scribbles_read_by_it(clip, similarity, monkeypatch):
    model = network(similarity, "scribbles")
    remembered = []
    memorize = model.memorize_scribbles
    monkeypatch.setattr(
        model, "memorize_scribbles", lambda *inputs: remembered.append((inputs, memorize(*inputs))) or remembered[-1][1]
    )
    logits = segment_rounds(model, [clip], rounds=1)[0][0][1]
    inputs, memory = remembered[0]
    truth = segmented(model, memory, clip.frames[1])
    torch.testing.assert_close(logits, truth, rtol=1e-4, atol=1e-4)
    monkeypatch.undo()
    frames = (clip.frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    segmenter = Segmenter(model, frames, None, 2**20)
    memory = segmenter.remember([Annotation(0, *inputs[1:4], (True, True), 0)])
    ((_, probabilities),) = segmenter.segment(memory, [1])
    torch.testing.assert_close(probabilities, torch.softmax(truth, 0), rtol=1e-4, atol=1e-4)


def test_use_is_weighed_by_it(clip):
    model, masks = network("l2"), one_hot(clip.labels[0])
    key, value = model.memorize(clip.frames, torch.cat([masks, masks]), torch.cat([masks, masks]).flip(0), [2, 2])
    memory = SpaceTimeMemory(MemoryRule.parse("every:1"), 2, weighed=True, similarity="l2")
    for index, part in enumerate(zip(key.split(2), value.split(2))):
        memory.remember(index, False, True, *part)
    query = model.encode_query(clip.frames[1:]).key
    memory.read(query)
    keys = torch.cat([as_positions(part) for part in key.split(2)], 1).double()
    distance = -(as_positions(query).double()[:, :, None] - keys[:, None]).square().sum(3) / 4
    truth = torch.softmax(distance, 2).mean((0, 1))
    torch.testing.assert_close(memory.notes[:, USED], truth, rtol=1e-4, atol=1e-6)


def test_the_weights_say_how_keys_are_compared(tmp_path):
    model = network("l2")
    write_tensors(model.state_dict(), tmp_path / "l2.safetensors", torch.float16)
    assert STM.load(tmp_path / "l2.safetensors", device="cpu").config == model.config
    torch.save(model.state_dict(), tmp_path / "l2.pth")
    assert STM.load(tmp_path / "l2.pth", device="cpu").config.similarity == "l2"
    assert network("dot").state_dict().keys() == model.state_dict().keys() - {"l2_similarity"}
    assert STMConfig.of_tensors(scribble_tensors(model.state_dict())).similarity == "l2"


def test_a_run_makes_the_network_that_it_was_asked_for(tmp_path):
    config = SmokeConfig(tmp_path / "run", steps=2, crop=64, key_channels=24, similarity="l2", device="cpu", workers=0)
    shape = STM.load(train(config), device="cpu").config
    assert shape == STMConfig("resnet18", key_channels=24, value_channels=128, decoder_channels=64, similarity="l2")
    further = SmokeConfig(tmp_path / "on", steps=1, crop=64, init=tmp_path / "run/weights.safetensors", workers=0)
    assert STM.load(train(further), device="cpu").config == shape


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"similarity": "cosine"}, "similarity: expected one of dot, l2, got 'cosine'"),
        ({"key_channels": 0}, "key_channels: expected at least 1, got 0"),
        ({"init": "w.pth", "value_channels": 64}, "init, value_channels: expected one of them"),
        ({"init": "w.pth", "similarity": "dot"}, "init, similarity: expected one of them"),
    ],
)
def test_a_shape_that_makes_no_sense_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        SmokeConfig(tmp_path, **settings)


def test_a_checkpoint_with_a_misspelt_name_is_no_distance(tmp_path):
    tensors = network("dot").state_dict() | {"l2": torch.ones(())}
    write_tensors(tensors, tmp_path / "w.safetensors")
    assert "l2" in read_tensors(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="unexpected l2$"):
        STM.load(tmp_path / "w.safetensors", device="cpu")
