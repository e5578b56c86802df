"""The study of settings: what it runs, what it takes from runs that are done, and its table."""

import json

import pytest

from stm_model.data.synthetic import procedural_clip
from stm_model.io.images import write_image
from stm_model.io.masks import write_mask
from stm_model.training.studies import main


def done(run, J: float, ended: bool = True) -> None:
    """A run as training leaves it."""
    run.mkdir(parents=True)
    losses = [{"step": step, "loss": step / 500, "seconds_per_step": 0.5} for step in range(50, 501, 50)]
    lines = [*losses, {"step": 500, "J": J, "F": J - 0.1}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if ended:
        (run / "done").touch()


def test_runs_that_are_done_are_compared_seed_by_seed(tmp_path, capsys):
    for name, pair in {"reference": (0.7, 0.8), "l2": (0.74, 0.82)}.items():
        for seed, J in enumerate(pair):
            done(tmp_path / "out" / f"{name}-{seed}", J)
    out, results = str(tmp_path / "out"), tmp_path / "study.json"
    main(["--out", out, "--variant", "l2=--similarity l2", "--json", str(results), "--", "--steps", "500"])
    printed = capsys.readouterr().out
    assert "| reference | 0.700 | 0.800 | +0.000 | +0.000 | 0.950 | 0.500 |" in printed
    assert "| l2 | 0.740 | 0.820 | +0.030 | +0.030 | 0.950 | 0.500 |" in printed
    found = json.loads(results.read_text())
    assert found["variants"]["l2"] == ["--similarity", "l2"] and found["results"]["l2"][1]["J"] == 0.82


def test_a_run_that_fails_is_named_with_its_log(tmp_path):
    # it has a score, but not at its end, and there is nothing to train on
    done(tmp_path / "out" / "reference-0", 0.7, ended=False)
    with pytest.raises(
        SystemExit, match="studies: reference-0 did not end with a held-out score; see .*reference-0.log"
    ):
        main(["--out", str(tmp_path / "out"), "--seeds", "1", "--", "--data", str(tmp_path / "absent")])
    assert "stm: error: " in (tmp_path / "out" / "reference-0.log").read_text()


def test_variants_are_trained_and_scored(tmp_path, capsys):
    frames, labels = procedural_clip(frames=4, size=(48, 64), objects=1, seed=2)
    root = tmp_path / "davis"
    for kind, write, pictures, suffix in (
        ("JPEGImages", write_image, frames, "jpg"), ("Annotations", write_mask, labels, "png")
    ):  # fmt: skip
        (root / kind / "240p" / "boat").mkdir(parents=True)
        for index, picture in enumerate(pictures):
            write(root / kind / "240p" / "boat" / f"{index:05d}.{suffix}", picture)
    (root / "ImageSets" / "2016").mkdir(parents=True)
    for split in ("fit", "held"):
        (root / "ImageSets/2016" / f"{split}.txt").write_text("boat\n")
    shared = ["--data", str(root), "--split", "fit", "--validation-split", "held", "--device", "cpu"]
    shared += ["--steps", "2", "--batch", "1", "--crop", "32", "--log-every", "1", "--workers", "0"]
    main(["--out", str(tmp_path / "out"), "--seeds", "1", "--variant", "narrow=--key-channels 16", "--", *shared])
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["| reference", "| narrow"]


@pytest.mark.parametrize("words", [["--variant", "nothing"], ["--variant", "reference=--color 0"], ["--seeds", "0"]])
def test_wrong_options_are_one_line(tmp_path, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--out", str(tmp_path), *words, "--", "--steps", "1"])
    assert end.value.code == 2 and "expected" in capsys.readouterr().err
