"""Small datasets in the benchmarks' layouts, made of procedural clips, and a network that has learnt nothing."""

import json

import numpy as np
import pytest
from layouts import write_video

from stm_model.commands.main import main
from stm_model.io.masks import write_mask

YOUTUBE_EVERY = 2
ENTRIES = {"ant": {1: 0, 2: 4}, "bee": {1: 2}}
CATEGORIES = {"ant": {1: "insect", 2: "rock"}, "bee": {1: "insect"}}


@pytest.fixture(scope="session")
def youtube_vos(tmp_path_factory, clips):
    """YouTube-VOS: every second frame is asked for and annotated, objects enter late, `rock` is an unseen category."""
    root = tmp_path_factory.mktemp("youtube_vos")
    meta = {}
    for name, entries in ENTRIES.items():
        frames, labels = clips[name]
        labels = labels.copy()
        for label in (1, 2):
            first = entries.get(label, len(labels))
            labels[:first][labels[:first] == label] = 0
        start = min(entries.values())
        asked = range(start, len(frames), YOUTUBE_EVERY)
        write_video(
            root / "valid_all_frames/JPEGImages" / name, root / "valid/Annotations" / name, frames, labels, masks=asked
        )
        meta[name] = {
            "objects": {
                str(label): {
                    "category": CATEGORIES[name][label],
                    "frames": [f"{frame:05d}" for frame in asked if frame >= first],
                }
                for label, first in entries.items()
            }
        }
    (root / "valid/meta.json").write_text(json.dumps({"videos": meta}))
    (root / "train").mkdir()
    seen = {"videos": {"dog": {"objects": {"1": {"category": "insect", "frames": ["00000"]}}}}}
    (root / "train/meta.json").write_text(json.dumps(seen))
    return root


@pytest.fixture(scope="session")
def lvos(tmp_path_factory, clips):
    """A long video whose frames are annotated now and then; its second object appears at frame 30."""
    root = tmp_path_factory.mktemp("lvos")
    frames, labels = clips["ant"]
    there = np.concatenate([np.arange(len(frames)), np.arange(len(frames))[::-1]] * 3)
    frames, labels = frames[there], labels[there].copy()
    labels[:30][labels[:30] == 2] = 0
    write_video(
        root / "valid/JPEGImages/long",
        root / "valid/Annotations/long",
        frames,
        labels,
        "{:08d}",
        range(0, len(frames), 6),
    )
    return root


@pytest.fixture
def copy_truth():
    """Write a submission that is a dataset's ground truth, each video's masks changed by `change(labels)`."""

    def copy(dataset, folder, change=lambda labels: labels):
        for video in dataset.videos:
            target = folder / dataset.submission_folder / video.name
            target.mkdir(parents=True)
            for frame in video.asked:
                if frame in video.annotations:
                    write_mask(target / video.mask_name(frame), change(video.read_annotation(frame)))
        return folder

    return copy


@pytest.fixture
def evaluate(davis, weights, tmp_path, capsys):
    """Run `stm evaluate`; the exit code, stdout and stderr."""

    def run(*extra, data=davis, dataset="davis2017", out=tmp_path / "out", checkpoint=weights):
        arguments = ["--data", data, "--dataset", dataset, "--out", out, "--workers", 1]
        arguments += ["--checkpoint", checkpoint, "--device", "cpu"] if checkpoint else []
        code = main(["evaluate", *map(str, [*arguments, *extra])])
        return code, *capsys.readouterr()

    return run
