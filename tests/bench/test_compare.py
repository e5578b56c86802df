"""bench/compare.py: a change is told from noise, and a file that holds no races is named."""

import json

import numpy as np
import pytest

from bench.compare import Race, change, interval, main, verdict


def rounds(median, spread, seed, count=25):
    return (median * np.random.default_rng(seed).lognormal(0, spread, count)).tolist()


def write(path, **races):
    entries = [
        {"name": name, "stats": {"data": race.ours}, "extra_info": {"naive": race.naive}}
        for name, race in races.items()
    ]
    path.write_text(json.dumps({"benchmarks": entries}))
    return str(path)


def test_a_change_beyond_the_noise_is_seen():
    before = Race(rounds(1.0, 0.05, 0), rounds(2.0, 0.05, 1))
    for factor, expected in ((1.5, "slower"), (0.6, "faster"), (1.0, "no difference seen")):
        middle, low, high = change(before, Race(rounds(factor, 0.02, 2), rounds(2.0, 0.02, 3)))
        assert low < middle < high and low < 1 / factor < high
        assert verdict(low, high, 0.1) == expected


def test_a_machine_that_is_slower_today_is_no_regression():
    before = Race(rounds(1.0, 0.02, 0), rounds(2.0, 0.02, 1))
    after = Race(rounds(3.0, 0.02, 2), rounds(6.0, 0.02, 3))
    assert verdict(*change(before, after)[1:], 0.05) == "no difference seen"


def test_noise_is_called_noise():
    before = Race(rounds(1.0, 0.8, 0, 5), rounds(2.0, 0.8, 1, 5))
    after = Race(rounds(1.0, 0.8, 2, 5), rounds(2.0, 0.8, 3, 5))
    assert verdict(*change(before, after)[1:], 0.05) == "too noisy to tell"


def test_an_interval_covers_what_it_should():
    """The interval of 95 % holds the truth in about that share of many experiments."""
    found = []
    for seed in range(200):
        random = np.random.default_rng(seed)
        race = Race(random.lognormal(0, 0.2, 30).tolist(), (2 * random.lognormal(0, 0.2, 30)).tolist())
        low, high = interval(race.ratios)
        found.append(low <= 2 <= high)
    # 3 standard deviations of 200 draws at 0.95, and what a bootstrap of 30 rounds is short of
    assert 0.88 <= np.mean(found) <= 1


def test_what_became_slower_is_the_exit_code(tmp_path, capsys):
    fast, slow = (Race(rounds(ours, 0.02, 0), rounds(2.0, 0.02, 1)) for ours in (1.0, 1.5))
    before = write(tmp_path / "a.json", read=fast, gone=fast)
    assert main([before, write(tmp_path / "b.json", read=fast)]) == 0
    assert main([before, write(tmp_path / "c.json", read=slow, new=slow)]) == 1
    printed = capsys.readouterr().out
    assert "slower" in printed and "gone" in printed and "new" in printed


@pytest.mark.parametrize("content", ["{", "[]", '{"benchmarks": []}', '{"benchmarks": [{"name": "x"}]}'])
def test_what_is_no_suite_is_named(tmp_path, capsys, content):
    (tmp_path / "bad.json").write_text(content)
    good = write(tmp_path / "good.json", read=Race([1.0], [1.0]))
    assert main([good, str(tmp_path / "bad.json")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "bad.json" in error
    assert main([good, str(tmp_path / "absent.json")]) == 2 and "absent.json" in capsys.readouterr().err
