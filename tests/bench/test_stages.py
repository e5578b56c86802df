"""bench/stages.py and its naive twin: what is compared computes the same, and every stage is counted once."""

import json

import pytest
import torch

import bench.stages as stages
import bench.track as track
from stm_model import STM, STMConfig
from stm_model.network import Query
from stm_model.training.state import initialize


def small_network():
    torch.manual_seed(0)
    model = STM(STMConfig.small())
    initialize(model)
    return model.eval()


def test_the_naive_network_decodes_to_the_same_masks():
    network = small_network()
    public = track.PublicNetwork(network.config)
    public.load_state_dict(network.state_dict())
    public.eval()
    with torch.no_grad():
        query: Query = network.encode_query(torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)))
        readout = torch.randn(3, 128, 4, 6, generator=torch.Generator().manual_seed(2))
        expected, got = network.segment(readout, query, [3]), public.segment(readout, query, [3])
    # both in float32, sums in another order
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_every_stage_of_both_versions_is_counted_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(track, "random_network", small_network)
    out = tmp_path / "deep" / "stages.json"
    stages.main(
        ["--device", "cpu", "--height", "48", "--width", "64", "--frames", "2", "--repeats", "2", "--out", str(out)]
    )
    report = json.loads(out.read_text())
    assert out.with_suffix(".png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for version in track.VERSIONS:
        assert list(report["stages"][version]) == list(stages.STAGES)
        assert all(stage["wall"] > 0 for stage in report["stages"][version].values())
        # side by side or not, a whole frame takes some time
        assert report["pipeline_seconds"][version] > 0
    assert report["ratio"] == pytest.approx(report["pipeline_seconds"]["naive"] / report["pipeline_seconds"]["default"])
    assert "frames a second from file to files" in capsys.readouterr().out


def test_what_no_stage_took_is_resizing_and_labelling():
    clock = stages.Clock("cpu")
    clock.spent |= {"track": [1.0, 2.0], "read": [0.25, 0.5], "decoder": [0.25, 0.25]}
    spent = clock.take()
    assert spent["resize, labels"] == [0.5, 1.25] and spent["aggregation"] == [0.0, 0.0]
    assert not clock.spent
