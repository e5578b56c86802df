"""`stm evaluate` as its user meets it: files, tables, exit codes, several processes, studies and the report."""

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from answers import refused

from stm_model import STM, Tracker
from stm_model.distributed import Ranks
from stm_model.evaluation import figures, predict, studies
from stm_model.evaluation.config import EvaluateConfig
from stm_model.evaluation.metrics import sequence_scores
from stm_model.evaluation.protocol import open_dataset
from stm_model.evaluation.scoring import ObjectScore
from stm_model.evaluation.studies import STUDIES
from stm_model.io import images
from stm_model.io.masks import read_mask, write_mask
from stm_model.runtime import DEFAULT_INTERACTIVE_WEIGHTS, NetworkOptions

HELD = Path(__file__).parents[3] / "shared" / "data" / "davis2016-train"


def _table(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_a_split_is_tracked_scored_and_reported(evaluate, davis, weights, clips, tmp_path):
    code, out, err = evaluate("--dtype", "float32")
    assert (code, err) == (0, "")
    folder = tmp_path / "out"
    tracker = Tracker(STM.load(weights, device="cpu", dtype=torch.float32))
    expected = {}
    for name, (_, labels) in clips.items():
        video = next(video for video in open_dataset("davis2017", davis).videos if video.name == name)
        frames = [images.read_image(path) for path in video.frame_paths]
        masks = [result.labels for result in tracker.track(frames, {0: labels[0]})]
        for index, mask in enumerate(masks):
            np.testing.assert_array_equal(read_mask(folder / "masks" / name / f"{index:05d}.png"), mask)
        expected |= {f"{name}_{label}": score for label, score in sequence_scores(masks, labels).items()}
    rows = _table(folder / "per-sequence_results-val.csv")
    assert {row["Sequence"]: (float(row["J-Mean"]), float(row["F-Mean"])) for row in rows} == {
        name: pytest.approx(score, abs=1e-6) for name, score in expected.items()
    }
    summary = json.loads((folder / "evaluation.json").read_text())
    assert summary["scores"]["J-Mean"] == pytest.approx(np.mean([region for region, _ in expected.values()]))
    assert summary["speed"]["frames"] == sum(len(frames) for frames, _ in clips.values())
    assert summary["speed"]["FPS"] == pytest.approx(summary["speed"]["frames"] / summary["speed"]["seconds"])
    assert summary["speed"]["peak_bytes"] >= summary["speed"]["loaded_bytes"] > 2**20
    assert len(summary["objects"]) == 6 and len(summary["objects"][0]["J_by_frame"]) == 7
    for word in ("J&F-Mean", "tracked", "first mask repeated", "frames a second over 22 frames", "peak memory"):
        assert word in out


@pytest.mark.parametrize("small, side", [(0.0, 32), (1.0, 64)])
def test_small_objects_are_seen_larger(evaluate, weights, monkeypatch, small, side):
    sides, make = [], predict.Tracker
    monkeypatch.setattr(
        predict, "Tracker", lambda model, size, **options: sides.append(size) or make(model, size=size, **options)
    )
    for name, value in (("DEFAULT_WEIGHTS", weights), ("USUAL_SIZE", 32), ("CLOSE_SIZE", 64), ("SMALL", small)):
        monkeypatch.setattr(f"stm_model.runtime.{name}", value)
    assert evaluate("--no-report")[0] == 0
    assert sides == [side]


def test_the_speed_leaves_files_out_and_drops_the_warm_up(evaluate, monkeypatch):
    read, write = predict.read_image, predict.write_mask
    monkeypatch.setattr(predict, "read_image", lambda path: (time.sleep(0.05), read(path))[1])
    monkeypatch.setattr(predict, "write_mask", lambda *arguments: (time.sleep(0.05), write(*arguments))[1])
    seen = []
    track = Tracker.track
    monkeypatch.setattr(Tracker, "track", lambda self, *a, **k: (seen.append(0), track(self, *a, **k))[1])
    times = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    code, out, _ = evaluate("--json", "--no-report", "--videos", "bee")
    speed = json.loads(out)["speed"]
    # a clock that ticks at every look: one tick lies before reading a frame and one behind it; one to find the end
    assert code == 0 and speed["frames"] == 6 and speed["seconds"] == 2 * 6 + 1
    assert len(seen) == 2


def test_results_of_others_are_scored(evaluate, davis, tmp_path, copy_truth):
    copy_truth(open_dataset("davis2017", davis), tmp_path / "results")
    code, out, err = evaluate("--results", tmp_path / "results", checkpoint=None)
    assert (code, err) == (0, "") and "results" in out and "frames a second" not in out
    (row,) = _table(tmp_path / "out" / "global_results-val.csv")
    assert float(row["J&F-Mean"]) == 1.0
    assert not (tmp_path / "out" / "masks").exists()
    assert "1.000" in (tmp_path / "out" / "report.html").read_text()


def test_davis_2016_is_written_as_it_is_annotated(evaluate, davis, tmp_path):
    root = shutil.copytree(davis, tmp_path / "davis")
    for path in root.glob("Annotations/480p/*/*.png"):
        write_mask(path, np.where(read_mask(path) > 0, 255, 0))
    scores = []
    for data in (davis, root):
        code, out, err = evaluate("--json", data=data, dataset="davis2016", out=tmp_path / data.name / "out")
        assert (code, err) == (0, "")
        scores.append(json.loads(out)["scores"])
    assert scores[0] == scores[1]
    labels = [read_mask(data / "out/masks/ant/00000.png") for data in (tmp_path / davis.name, root)]
    np.testing.assert_array_equal(labels[0] * np.uint8(255), labels[1])
    assert set(np.unique(labels[0])) == {0, 1}


def test_a_broken_submission_ends_with_one_line(evaluate, davis, tmp_path, copy_truth):
    copy_truth(open_dataset("davis2017", davis), tmp_path / "results")
    (tmp_path / "results/bee/00002.png").unlink()
    assert refused(evaluate("--results", tmp_path / "results", checkpoint=None), "bee/00002.png is missing")
    assert not (tmp_path / "out").exists()
    write_mask(tmp_path / "results/bee/00002.png", np.full((48, 80), 7))
    assert refused(evaluate("--results", tmp_path / "results", checkpoint=None), "bee/00002.png: label 7 is no object")


def test_youtube_vos_writes_the_asked_frames(evaluate, youtube_vos, tmp_path):
    code, out, err = evaluate(data=youtube_vos, dataset="youtube_vos")
    assert (code, err) == (0, "")
    masks = tmp_path / "out" / "masks" / "Annotations"
    assert sorted(path.name for path in (masks / "ant").iterdir()) == [f"{frame:05d}.png" for frame in (0, 2, 4, 6, 8)]
    assert sorted(path.name for path in (masks / "bee").iterdir()) == ["00002.png", "00004.png"]
    assert set(np.unique(read_mask(masks / "ant/00002.png"))) <= {0, 1}
    truth = read_mask(youtube_vos / "valid/Annotations/ant/00004.png")
    # the object that enters comes back as it was given
    np.testing.assert_array_equal(read_mask(masks / "ant/00004.png") == 2, truth == 2)
    (row,) = _table(tmp_path / "out" / "global_results-valid.csv")
    assert list(row) == ["Overall", "J_seen", "J_unseen", "F_seen", "F_unseen"]
    assert float(row["Overall"]) == pytest.approx(np.mean([float(row[key]) for key in list(row)[1:]]), abs=2e-6)
    assert "quoted [1]" in (tmp_path / "out" / "report.html").read_text()


def test_without_public_ground_truth_the_masks_are_written(evaluate, youtube_vos, tmp_path):
    root = shutil.copytree(youtube_vos, tmp_path / "youtube_vos")
    for name in ("ant/00006.png", "bee/00004.png"):
        (root / "valid/Annotations" / name).unlink()
    code, out, err = evaluate(data=root, dataset="youtube_vos")
    assert (code, err) == (0, "") and "no ground truth here" in out
    assert len(list((tmp_path / "out").glob("masks/Annotations/*/*.png"))) == 7
    assert not list((tmp_path / "out").glob("*.csv")) and (tmp_path / "out" / "report.html").is_file()
    for arguments in (["--study", "memory"], ["--results", tmp_path / "out" / "masks"]):
        found = evaluate(*arguments, data=root, dataset="youtube_vos", out=tmp_path / "b", checkpoint=None)
        assert refused(found, "youtube_vos: the ground truth of the split valid is not here to score by")


def test_a_long_video_streams(evaluate, lvos, tmp_path, monkeypatch):
    """No more than one frame has been read ahead of the masks written."""
    read, order = predict.read_image, []
    monkeypatch.setattr(predict, "read_image", lambda path: (order.append("read"), read(path))[1])
    write = predict.write_mask
    monkeypatch.setattr(predict, "write_mask", lambda path, labels: (order.append("write"), write(path, labels))[1])
    code, _, err = evaluate("--no-report", data=lvos, dataset="lvos")
    assert (code, err) == (0, "")
    assert order[predict.WARM_UP :] == ["read", "write"] * 54
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [len(row["frames"]) for row in summary["objects"]] == [8, 3]


def _torchrun(arguments, folder, processes=2):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    return subprocess.run(
        [*command, "-m", "stm_model", "evaluate", *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_ranks_give_what_one_process_gives(evaluate, davis, weights, tmp_path):
    arguments = ["--dtype", "float32", "--no-report"]
    assert evaluate(*arguments)[0] == 0
    common = ["--data", davis, "--dataset", "davis2017", "--checkpoint", weights, "--device", "cpu", "--workers", 1]
    finished = _torchrun([*common, *arguments, "--out", tmp_path / "two"], tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("frames a second over 22 frames") == 1
    for name in ("global_results-val.csv", "per-sequence_results-val.csv"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "out" / name).read_text()
    for path in (tmp_path / "out" / "masks").glob("*/*.png"):
        assert (tmp_path / "two" / path.relative_to(tmp_path / "out")).read_bytes() == path.read_bytes()


def test_an_error_of_one_rank_ends_all(davis, weights, tmp_path):
    root = shutil.copytree(davis, tmp_path / "davis")
    (root / "JPEGImages/480p/bee/00003.jpg").write_bytes(b"no picture")
    arguments = ["--data", root, "--dataset", "davis2017", "--checkpoint", weights, "--device", "cpu", "--no-report"]
    finished = _torchrun([*arguments, "--out", tmp_path / "two"], tmp_path)
    assert finished.returncode != 0
    assert finished.stderr.count("stm: error: ") == 1 and "bee/00003.jpg" in finished.stderr
    # the other rank gives up by itself, or is ended by torchrun
    assert set(re.findall(r"exitcode\s*: (-?\d+)", finished.stderr)) <= {"2", "-15"}


@pytest.mark.parametrize("name", list(STUDIES))
def test_a_study_compares_its_variants(evaluate, name, tmp_path, monkeypatch):
    # in this process: fresh ones, which keep their memory apart, take seconds to start
    monkeypatch.setattr("stm_model.evaluation.studies.track_videos_apart", predict.track_videos)
    code, out, err = evaluate("--study", name, "--videos", "bee", "--dtype", "float32")
    assert (code, err) == (0, "")
    variants = list(STUDIES[name].variants)
    rows = _table(tmp_path / "out" / f"study_{name}.csv")
    assert [row["Variant"] for row in rows] == variants
    assert all(0 <= float(row["J-Mean"]) <= 1 and float(row["FPS"]) > 0 for row in rows)
    assert images.read_image(tmp_path / "out" / f"study_{name}.png").shape[0] > 200
    distribution = _table(tmp_path / "out" / f"study_{name}_percentiles.csv")
    assert len(distribution) == 101 and list(distribution[0]) == ["Percentile", *variants]
    for variant in variants:
        values = [float(row[variant]) for row in distribution]
        assert values == sorted(values) and variant in out


def test_a_study_shows_how_j_is_distributed(davis, tmp_path, monkeypatch):
    """Over the frames of all objects, as the paper's figure 7."""
    scores = [
        ObjectScore("ant", 1, None, (1, 2, 3), (0.9, 0.0, 0.5), (1.0, 1.0, 1.0)),
        ObjectScore("bee", 1, None, (1, 2), (0.25, 1.0), (1.0, 1.0)),
    ]
    monkeypatch.setattr(studies, "track_videos_apart", lambda *_, **__: predict.Speed(5, 2.0, 3 * 2**20, 2**20))
    monkeypatch.setattr(studies, "score", lambda *_, **__: scores)
    dataset = open_dataset("davis2016", davis)
    config = EvaluateConfig(data=davis, out=tmp_path, workers=1)
    rows = studies.run_study("memory", dataset, config, Ranks())
    row = rows["first"]
    assert [row["percentiles"][place] for place in (0, 25, 50, 75, 100)] == [0.0, 0.25, 0.5, 0.9, 1.0]
    assert (row["FPS"], row["Peak-MiB"], row["Added-MiB"]) == (2.5, 3.0, 2.0)
    assert row["J-Mean"] == pytest.approx((1.4 / 3 + 0.625) / 2)


@pytest.mark.filterwarnings("error")
def test_the_figure_of_a_study_that_scores_nothing(tmp_path):
    row = {"J-Mean": 0.0, "percentiles": [0.0] * 101}
    figures.draw_study("nothing", {"first": row, "previous": row}, tmp_path / "study.png")
    assert images.read_image(tmp_path / "study.png").shape[0] > 200


def test_a_variants_memory_is_of_its_own_process(davis, weights, tmp_path):
    videos = list(open_dataset("davis2017", davis, videos=["bee"]).videos)
    network = NetworkOptions(checkpoint=weights, device="cpu", dtype="float32")
    block = torch.zeros(2**28)  # 1 GiB that the other process must not count
    block += 1
    speed = predict.track_videos_apart(videos, network, {}, tmp_path / "apart")
    assert speed.frames == 6 and speed.peak_bytes < 2**30
    assert len(list((tmp_path / "apart" / "bee").iterdir())) == 6


@pytest.fixture
def seen(monkeypatch):
    """The options of each tracker that is made; the first one only says whether they make sense."""
    seen = []
    initialize = Tracker.__init__
    monkeypatch.setattr(
        Tracker,
        "__init__",
        lambda self, model, **options: (seen.append(options), initialize(self, model, **options))[1],
    )
    return seen


def test_how_to_remember_and_read_reaches_the_tracker(evaluate, seen):
    assert evaluate("--videos", "bee", "--memory-share", "0.5", "--top-k", "7", "--no-report")[0] == 0
    assert [(options["budget"].share, options["top_k"]) for options in seen] == 2 * [(0.5, 7)]


def test_the_studies_reach_the_tracker(evaluate, seen, monkeypatch):
    monkeypatch.setattr("stm_model.evaluation.studies.track_videos_apart", predict.track_videos)
    assert evaluate("--study", "every", "--videos", "bee", "--memory", "first")[0] == 0
    assert [options["memory"] for options in seen] == ["first", "every:1", "every:2", "every:5", "every:10", "every:20"]


def test_neither_pyav_nor_tyro_is_needed():
    """A machine to evaluate on may have neither."""
    modules = "evaluate, figures, report"
    code = (
        f"from stm_model.evaluation import {modules}; import sys; sys.exit(bool({{'av', 'tyro'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory", "sometimes"], ["memory: expected first", "'sometimes'"]),
        (["--size", "3"], ["size: expected at least 16"]),
        (["--memory-share", "7"], ["memory share: expected a share above 0 and up to 1, got 7.0"]),
        (["--workers", "0"], ["workers: expected at least 1"]),
        (["--top-k", "0"], ["top_k: expected at least 1, got 0"]),
        (["--binary"], ["binary: says how to read --results"]),
        (["--study", "memory", "--results", "x"], ["study", "--results"]),
        (["--videos", "zebra"], ["zebra not in the split val"]),
        (["--split", "test"], ["2017/test.txt"]),
        (["--resolution", "1080p"], ["JPEGImages/1080p/ant"]),
        (["--device", "nowhere"], ["nowhere"]),
    ],
)
def test_settings_that_make_no_sense_arerefused(evaluate, tmp_path, arguments, words):
    assert refused(evaluate(*arguments, checkpoint=None), *words)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_not_there_isrefused(evaluate, tmp_path):
    assert refused(evaluate(checkpoint=tmp_path / "no.safetensors"), "no such file", "no.safetensors")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("cut.safetensors", lambda whole: whole[:-100], "cut.safetensors can't be read: "),
        ("no.pth", lambda _: b"hello\n", "no.pth can't be read: it is no file of torch.save (KeyError)"),
        ("empty.pth", lambda _: b"", "empty.pth can't be read: "),
        (DEFAULT_INTERACTIVE_WEIGHTS, None, "expected a network guided by masks"),
    ],
)
@pytest.mark.parametrize("study", [(), ("--study", "every")], ids=["tracked", "study"])
def test_weights_that_cannot_track_leave_no_folder(evaluate, weights, tmp_path, study, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content(weights.read_bytes()))
    assert refused(evaluate(*study, checkpoint=path), words)
    assert not (tmp_path / "out").exists()


def test_a_full_folder_is_refused_and_an_earlier_evaluation_replaced(evaluate, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert refused(evaluate("--no-report"), "is not empty", "--overwrite")
    assert evaluate("--no-report", "--overwrite")[0] == 0
    assert evaluate("--no-report", "--overwrite", "--videos", "bee")[0] == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in (out / "masks").iterdir()] == ["bee"]


def test_results_are_never_overwritten(evaluate, davis, tmp_path, copy_truth):
    copy_truth(open_dataset("davis2017", davis), tmp_path / "out" / "masks")
    for results in (tmp_path / "out" / "masks", tmp_path / "out"):
        found = evaluate("--results", results, "--overwrite", checkpoint=None)
        assert refused(found, "would overwrite the results") or refused(found, "no folder")
    assert len(list((tmp_path / "out" / "masks").glob("*/*.png"))) == 22


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: (root / "JPEGImages/480p/bee/00003.jpg").write_bytes(b"no"), "bee/00003.jpg: cannot be read"),
        (
            lambda root: images.write_image(
                root / "JPEGImages/480p/bee/00003.jpg", np.zeros((40, 80, 3), dtype=np.uint8)
            ),
            "bee: frame 3: expected [H, W] = [48, 80]",
        ),
        (
            lambda root: write_mask(root / "Annotations/480p/bee/00000.png", np.ones((40, 80))),
            "bee/00000.png: 80x40 pixels; expected 80x48",
        ),
    ],
)
def test_a_broken_video_is_named(evaluate, davis, tmp_path, change, words):
    root = shutil.copytree(davis, tmp_path / "davis")
    change(root)
    assert refused(evaluate(data=root), words)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["stopped"] == "unfinished"


@pytest.mark.skipif(not HELD.is_dir(), reason="davis2016-train is not here")
def test_the_default_weights_on_real_sequences(evaluate, tmp_path):
    """The default weights, through the command, on a held-out sequence: far above the floor."""
    code, out, err = evaluate(
        "--split", "held", "--videos", "soccerball", "--no-report", data=HELD, dataset="davis2016", checkpoint=None
    )  # fmt: skip
    assert code == 0
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert summary["speed"]["frames"] == 48
    assert summary["scores"]["J-Mean"] > 0.5 > 0.2 > summary["floor"]["J-Mean"]
