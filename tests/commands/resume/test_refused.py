"""What `stm track --resume` refuses: other settings, other versions, broken states, folders of others."""

import json

import pytest
import torch
from stopping import files, stopped_at

from stm_model import STM, STMConfig
from stm_model.network.weights import write_tensors
from stm_model.tracking.resume import FORMAT

OTHER_RESULTS = {
    "memory": "first",
    "size": "32",
    "dtype": "float16",
    "compile": None,
    "memory-budget": "1MiB",
    "host-budget": "1MiB",
    "eviction": "fifo",
    "memory-share": "0.5",
    "skip-uncertain": None,
    "top-k": "5",
    "skip": "0.1",
    "binary": None,
    "resize-mask": None,
    "start": "1",
    "end": "5",
    "stride": "2",
    "crop": "0,0,64,48",
}


def test_a_finished_run_is_no_result_of_other_settings(track, clip, tmp_path):
    assert track("--no-overlay")[0] == 0
    before = files(tmp_path / "out")

    def refused(name, *extra, **options):
        code, out, err = track("--resume", *extra, **options)
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert err.startswith(f"stm: error: {tmp_path / 'out'}: was tracked with --{name} ") and "--overwrite" in err

    for name, value in OTHER_RESULTS.items():
        refused(name, "--no-overlay", f"--{name}", *([value] if value else []))
    refused("overlay")
    refused("mask", "--no-overlay", "--mask", clip / "masks" / "00006.png")
    refused("checkpoint", "--no-overlay", "--checkpoint", clip / "other.safetensors")
    refused("video", "--no-overlay", video="frames")
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("stopped", ["unfinished", "interrupted", None])
def test_a_folder_of_an_earlier_version_is_refused(track, tmp_path, stopped):
    """Its masks and its state stay as they are, whether or not it was finished."""
    assert track("--no-overlay")[0] == 0
    file = tmp_path / "out" / "summary.json"
    old = json.loads(file.read_text()) | {"stopped": stopped}
    del old["format"]
    file.write_text(json.dumps(old))
    (tmp_path / "out" / "checkpoint.pt").write_bytes(b"as it was called")
    before = files(tmp_path / "out")
    code, out, err = track("--resume", "--no-overlay")
    assert (code, out) == (2, "") and err.count("\n") == 1
    versions = f"(format 1 instead of {FORMAT})"
    assert err.startswith(f"stm: error: {tmp_path / 'out'}: was written by another version {versions}")
    assert "--overwrite" in err and files(tmp_path / "out") == before
    assert track("--overwrite", "--no-overlay")[0] == 0 and json.loads(file.read_text())["format"] == FORMAT


@pytest.mark.parametrize("change", [{"format": None}, {"format": 1}, {"format": 2}])
def test_a_state_of_another_version_is_refused(track, tmp_path, monkeypatch, capsys, change):
    stopped_at(4, monkeypatch, track)
    capsys.readouterr()
    file = tmp_path / "out" / "resume.pt"
    torch.save(torch.load(file, weights_only=True) | change, file)
    before = files(tmp_path / "out")
    code, out, err = track("--resume")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"stm: error: {file}: was written by another version (format {change['format'] or 1} instead")
    assert files(tmp_path / "out") == before


OTHER = {
    "memory": (["--memory", "first"], "memory: first instead of the every:5 that the saved state was made with"),
    "size": (["--size", "32"], "size: 32 instead of the None"),
    "skip": (["--skip", "0.1"], "skip: 0.1 instead of the 0.0"),
    "budget": (["--memory-budget", "1MiB"], "device budget: 1048576 instead of the None"),
    "end": (["--end", "9"], "end: 9 instead of the None"),
    "stride": (["--stride", "2"], "stride: 2 instead of the 1"),
    "crop": (["--crop", "0,0,64,48"], "crop: 0,0,64,48 instead of the None"),
    "dtype": (["--dtype", "int8"], "dtype: int8 instead of the"),
}


def test_a_run_with_other_settings_is_refused_by_name(track, clip, tmp_path, monkeypatch, capsys):
    stopped_at(4, monkeypatch, track)
    capsys.readouterr()
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in files(tmp_path / "out")}

    def refused(*extra, words, **options):
        code, out, err = track("--resume", *extra, **options)
        assert code == 2 and err.startswith(f"stm: error: {words}") and err.count("\n") == 1, err
        assert out == "", "nothing is announced that is refused then"
        assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in files(tmp_path / "out")} == before

    for settings, words in OTHER.values():
        refused(*settings, words=words)
    refused(video="frames", words="video: not those that the saved state was made with")
    model = STM(STMConfig("resnet18", key_channels=16, value_channels=16, decoder_channels=16))
    write_tensors(model.state_dict(), tmp_path / "other.safetensors")
    refused("--checkpoint", tmp_path / "other.safetensors", words="weights: not those that")
    refused("--mask", clip / "masks" / "00006.png", words="masks: not those that")
    refused("--overwrite", words="--resume goes on with what --overwrite replaces; choose one of them")
    mask = tmp_path / "out" / "masks" / "00002.png"
    mask.rename(tmp_path / "mask.png")
    before.pop("masks/00002.png")
    refused(words=f"{mask}: is gone, without it the run can't go on")
    (tmp_path / "mask.png").rename(mask)
    # what the result does not depend on may change
    assert track("--resume", "--no-overlay", "--save-every", "0")[0] == 0
    assert not (tmp_path / "out" / "overlay.mp4").exists()


@pytest.mark.parametrize("content", [b"", b"text", "cut", "list"])
def test_what_is_no_state_is_refused(track, tmp_path, monkeypatch, content):
    stopped_at(4, monkeypatch, track)
    file = tmp_path / "out" / "resume.pt"
    if content == "list":
        torch.save([1, 2], file)
    else:
        file.write_bytes(file.read_bytes()[:-5000] if content == "cut" else content)
    code, _, err = track("--resume")
    assert code == 2 and err.count("\n") == 1
    assert err.startswith(f"stm: error: {file}: can't be read as a state to resume from")
    assert track("--overwrite", "--save-every", "0")[0] == 0 and not file.exists()


def test_a_folder_with_something_else_is_refused(track, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    code, out, err = track("--resume")
    assert (code, out) == (2, "") and "holds something other than results" in err and err.count("\n") == 1
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["notes.txt"]
    code, _, err = track("--save-every", "-1", out=tmp_path / "other")
    assert code == 2 and err == "stm: error: save_every: expected at least 0 seconds, got -1.0\n"
