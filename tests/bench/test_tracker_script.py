"""bench/tracker.py and its naive twin: what is compared computes the same, and every stage is counted once."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench.tracker as tracker
from stm_model import STM, STMConfig
from stm_model.data.synthetic import procedural_clip
from stm_model.network import Query, fold_batch_norm, for_inference
from stm_model.training.state import initialize


def small_network(config=None):
    torch.manual_seed(0)
    model = STM(config or STMConfig.small())
    initialize(model)
    return model.eval()


def test_the_naive_network_decodes_to_the_same_masks():
    network = small_network()
    public = tracker.PublicNetwork(network.config)
    public.load_state_dict(network.state_dict())
    public.eval()
    with torch.no_grad():
        query: Query = network.encode_query(torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)))
        readout = torch.randn(3, 128, 4, 6, generator=torch.Generator().manual_seed(2))
        expected, got = network.segment(readout, query, [3]), public.segment(readout, query, [3])
    # both in float32, sums in another order
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [STMConfig.small(), STMConfig.shared()], ids=["separate", "shared"])
def test_the_naive_tracker_reads_the_same_memory(monkeypatch, config):
    # in one number format nothing but the order of sums differs
    monkeypatch.setattr(tracker, "default_dtype", lambda _: torch.float32)
    frames, labels = procedural_clip(5, (48, 64), 2, seed=0)
    found = {}
    for version in tracker.VERSIONS:
        one = tracker.build_tracker(version, small_network(config), "cpu", "every:1")
        found[version] = [result.probabilities for result in one.track(frames, {0: labels[0]})]
    for naive, default in zip(*found.values(), strict=True):
        torch.testing.assert_close(naive, default, rtol=0, atol=1e-4)


def test_every_stage_of_both_versions_is_counted(tmp_path, capsys):
    out = tmp_path / "deep" / "tracker.json"
    size = ["--height", "48", "--width", "64", "--objects", "1", "3", "--frames", "2", "--repeats", "2"]
    assert tracker.main(["--device", "cpu", "--threads", "1", *size, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["ceiling"] > 0 and 0 <= report["agreement_J"] <= 1
    assert [row["objects"] for row in report["rows"]] == [1, 3]
    for row in report["rows"]:
        for version in tracker.VERSIONS:
            assert list(row["stages"][version]) == list(tracker.STAGES)
            assert all(stage["wall"] > 0 for stage in row["stages"][version].values())
            assert row["pipeline_seconds"][version] > 0
        assert row["ratio"] == pytest.approx(row["pipeline_seconds"]["naive"] / row["pipeline_seconds"]["default"])
        config = STM.load(device="cpu").config
        # 12 positions are read by 12 each of 2 frames, for every object, or with one set of keys for all
        keys, values = config.key_channels, config.value_channels
        shared = keys + row["objects"] * values
        reads = 2 * 12 * 24 * (shared if config.form == "shared" else row["objects"] * (keys + values))
        assert row["operations"]["read"] == reads
    one, three = (row["operations"] for row in report["rows"])
    assert (
        one["query encoder"] == three["query encoder"] > 0 and one["decoder"] < three["decoder"] <= 3 * one["decoder"]
    )
    said = capsys.readouterr().out
    assert "frames a second from file to files" in said and "of ceiling" in said


def test_what_no_stage_took_is_all_else():
    clock = tracker.Clock("cpu")
    clock.spent |= {"track": [1.0, 2.0, 9], "read": [0.25, 0.5, 4], "decoder": [0.25, 0.25, 5]}
    spent = clock.take()
    assert spent["all else"][:2] == [0.5, 1.25] and spent["write"] == [0.0, 0.0, 0.0]
    assert not clock.spent


@pytest.mark.parametrize("int8", [False, True])
def test_fused_convolutions_are_counted_like_plain_ones(int8):
    model = small_network(STMConfig.shared())
    model.int8 = int8
    frames, found = torch.rand(1, 3, 48, 64), []
    for network in (fold_batch_norm(model), for_inference(model)):
        with FlopCounterMode(display=False, custom_mapping=tracker.FLOPS) as counter, torch.inference_mode():
            network.encode_query(frames)
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0
