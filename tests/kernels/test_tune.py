"""Tiles measured on this machine: kept, found again, used by the read; never a wrong one, never a broken file."""

import json
import warnings
from dataclasses import asdict, replace

import pytest
import torch

import stm_kernels.gpu.backward as backward
import stm_kernels.gpu.forward as forward
import stm_kernels.gpu.stored as stored
import stm_kernels.tuner as tuner
from stm_kernels import memory_read
from stm_kernels.gpu.launch import architecture_of
from stm_kernels.gpu.tuning import ForwardTiles, affinity_tiles, forward_splits, forward_tiles
from stm_kernels.testing import assert_exact, draw_problem, make_problem, read_by
from stm_kernels.tuner import forward_candidates, read_with, tune

SIZES = {"key_channels": 16, "value_channels": 24, "dtype": torch.float16, "seconds": 0.0}


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stored._entries.cache_clear()
    yield tmp_path / "stm-kernels" / "tiles.json"
    stored._entries.cache_clear()


@pytest.fixture
def launched(monkeypatch):
    """The tiles of every read, in order."""
    tiles, splits = [], forward.forward_splits
    monkeypatch.setattr(forward, "forward_splits", lambda *arguments: tiles.append(arguments[0]) or splits(*arguments))
    return tiles


def _key(device, queries=40, positions=70, kernel="read, descriptors"):
    return stored.tiles_key(kernel, architecture_of(torch.device(device)), torch.float16, queries, positions, 16, 24)


def _read(device, M=40, N=70, channel_major=False):
    problem = make_problem(1, M, N, 16, 24, dtype=torch.float16, device=device, channel_major=channel_major)
    return memory_read(problem.query_key, problem.memory_key, problem.memory_value, implementation="triton")


def _default(device):
    return forward_tiles(architecture_of(torch.device(device)), torch.float16, 16, 24, descriptors=True)


def test_the_fastest_tile_is_kept_and_used_by_later_reads_of_its_size(device, file, launched, capsys):
    found = tune(40, 70, device=device, **SIZES)
    assert found[0].seconds == min(one.seconds for one in found if one.seconds is not None)
    assert json.loads(file.read_text()) == {_key(device): asdict(found[0].tiles)}
    printed = capsys.readouterr().out
    assert printed.count(" µs  block_m=") == sum(one.seconds is not None for one in found)
    # one that no default would be, so that using it shows
    other = replace(_default(device), block_m=64, splits=2)
    stored.store_tiles(other, _key(device))
    launched.clear()
    _read(device)
    assert launched == [other]


def test_tiles_hold_up_to_a_factor_of_two(device, launched):
    other = replace(_default(device), splits=2)
    stored.store_tiles(other, _key(device, 40, 70))
    for (M, N), expected in {(33, 120): other, (64, 70): _default(device), (40, 60): _default(device)}.items():
        launched.clear()
        _read(device, M, N)
        assert launched == [expected]


def test_tiles_hold_for_the_layout_they_were_measured_on(device, file, launched):
    tiles = ForwardTiles(64, 32, 32, 4, 1)
    stored.store_tiles(tiles, _key(device, kernel="read"))
    _read(device)
    _read(device, channel_major=True)
    assert launched == [_default(device), tiles]
    file.unlink()
    stored._entries.cache_clear()
    tune(40, 70, device=device, channel_major=True, **SIZES)
    assert list(json.loads(file.read_text())) == [_key(device, kernel="read")]


def test_the_file_is_read_once_a_process(device, file, monkeypatch):
    reads = []
    monkeypatch.setattr(stored, "cache_file", lambda: reads.append(1) or file)
    for _ in range(3):
        _read(device)
    assert len(reads) == 1


def test_a_backward_of_its_own(device, file, monkeypatch):
    found = tune(40, 70, device=device, backward=True, **SIZES)
    assert list(json.loads(file.read_text())) == [_key(device, kernel="backward")]
    tiles = replace(affinity_tiles(architecture_of(torch.device(device)), torch.float16, 16), block_k=16)
    stored.store_tiles(tiles, _key(device, kernel="backward"))
    used, launch = [], backward.affinity_launch
    monkeypatch.setattr(backward, "affinity_launch", lambda *a: used.append(a[3]) or launch(*a))
    assert_exact(make_problem(1, 40, 70, 16, 24, dtype=torch.float16, device=device), read_by("triton"))
    assert used == [tiles] and found[0].seconds


@pytest.mark.parametrize("content", ["{", "[1]", "\x00\x01", "9" * 5000])
def test_a_broken_file_is_ignored_with_one_warning_and_replaced(device, file, content):
    file.parent.mkdir()
    file.write_text(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = _read(device)
        _read(device)
    (told,) = [str(one.message) for one in caught if one.category is UserWarning]
    assert told.startswith(f"{file}: measured tiles ignored, ") and "\n" not in told
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stored.store_tiles(_default(device), _key(device))
    assert first.equal(_read(device)) and len(json.loads(file.read_text())) == 1


@pytest.mark.parametrize("entry", [None, 3, {"block_m": 64}, {"block_m": "64"}, "every", "string"])
def test_a_foreign_entry_is_ignored_with_one_warning(device, file, launched, entry):
    if entry == "every":
        entry = asdict(_default(device)) | {"other": 1}
    elif entry == "string":
        entry = asdict(_default(device)) | {"num_warps": "4"}
    file.parent.mkdir()
    file.write_text(json.dumps({_key(device): entry}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _read(device)
        _read(device)
    assert launched == [_default(device)] * 2
    assert len([one for one in caught if "tiles ignored" in str(one.message)]) == (entry is not None)


def test_a_wrong_candidate_is_named_and_never_kept(device, file, monkeypatch):
    candidates = [ForwardTiles(32, 32, 32, 4, 1), ForwardTiles(64, 32, 32, 4, 1)]
    monkeypatch.setattr(tuner, "forward_candidates", lambda *_: candidates)
    launch = forward.forward_launch

    def careless(*arguments):
        # tiles of 64 queries leave out the last block of the memory
        if arguments[7].block_m == 64:
            key = arguments[0].memory_key[:, :-32]
            arguments = (replace(arguments[0], memory_key=key), *arguments[1:])
        return launch(*arguments)

    monkeypatch.setattr(forward, "forward_launch", careless)
    found = tune(40, 70, device=device, **SIZES)
    right, wrong = ([one for one in found if one.tiles.block_m == m] for m in (32, 64))
    assert all(one.seconds for one in right)
    assert all(one.seconds is None and "error over allowed error" in one.reason for one in wrong)
    assert list(json.loads(file.read_text()).values())[0]["block_m"] == 32


def test_nothing_is_kept_where_nothing_runs(device, file, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("out of resources\nmore")

    monkeypatch.setattr(forward, "forward_splits", broken)
    with pytest.raises(RuntimeError, match="no tile ran and was right; .*: RuntimeError: out of resources$"):
        tune(40, 70, device=device, **SIZES)
    assert not file.exists()


def test_a_file_that_cannot_be_replaced_keeps_what_it_held(device, file, monkeypatch):
    stored.store_tiles(_default(device), _key(device))
    before = file.read_text()
    monkeypatch.setattr(stored.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        stored.store_tiles(_default(device), _key(device, 4000))
    assert file.read_text() == before and list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("skip", [0.0, 1e-3])
def test_every_candidate_and_every_split_is_exact(device, skip):
    problem = draw_problem(1, 40, 70, 16, 24, dtype=torch.float16, device=device)
    for tiles in forward_candidates(architecture_of(torch.device(device)), torch.float16, 16, 24, skip > 0, True):
        for splits in (1, 3, 64):
            assert_exact(problem, read_with(replace(tiles, splits=splits), skip=skip), gradients=splits == 3)


def test_splits_asked_for_are_taken_as_far_as_there_are_blocks(device):
    tiles = ForwardTiles(32, 32, 32, 4, 1)
    for asked, expected in ((1, (1, 320)), (3, (3, 128)), (64, (10, 32))):
        assert forward_splits(replace(tiles, splits=asked), 1, 40, 300, 24, 132) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": 0}, "positions: expected at least 1, got 0"),
        ({"dtype": torch.float64}, "dtype: expected"),
        ({"device": "meta"}, "device: expected a GPU, got meta"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(device, changes, message):
    with pytest.raises(ValueError, match=message):
        tune(**{"queries": 4, "positions": 6, "device": device} | changes)
