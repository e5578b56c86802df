"""Every documented command that reads DAVIS opens its data on a folder laid out as DAVIS is released."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from stm_model.commands.main import main
from stm_model.evaluation import pairs
from stm_model.io.images import write_image
from stm_model.io.masks import write_mask

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "stm_model/weights").glob("*.md"))]
SEQUENCES = {
    "2016/train": """
        bear bmx-bumps boat breakdance-flare bus car-turn dance-jump dog-agility drift-turn elephant flamingo hike
        hockey horsejump-low kite-walk lucia mallard-fly mallard-water motocross-bumps motorbike paragliding rhino
        rollerblade scooter-gray soccerball stroller surf swing tennis train""",
    "2016/val": """
        blackswan bmx-trees breakdance camel car-roundabout car-shadow cows dance-twirl dog drift-chicane drift-straight
        goat horsejump-high kite-surf libby motocross-jump paragliding-launch parkour scooter-black soapbox""",
    "2017/train": """
        bear bmx-bumps boat boxing-fisheye breakdance-flare bus car-turn cat-girl classic-car color-run crossing
        dance-jump dancing disc-jockey dog-agility dog-gooses dogs-scale drift-turn drone elephant flamingo hike hockey
        horsejump-low kid-football kite-walk koala lady-running lindy-hop longboard lucia mallard-fly mallard-water
        miami-surf motocross-bumps motorbike night-race paragliding planes-water rallye rhino rollerblade schoolgirls
        scooter-board scooter-gray sheep skate-park snowboard soccerball stroller stunt surf swing tennis tractor-sand
        train tuk-tuk upside-down varanus-cage walking""",
    "2017/val": """
        bike-packing blackswan bmx-trees breakdance camel car-roundabout car-shadow cows dance-twirl dog dogs-jump
        drift-chicane drift-straight goat gold-fish horsejump-high india judo kite-surf lab-coat libby loading
        mbike-trick motocross-jump paragliding-launch parkour pigs scooter-black shooting soapbox""",
}


def _documented() -> list[str]:
    """Code spans and lines of code blocks, with one space between words."""
    commands = []
    for page in PAGES:
        blocks = page.read_text().split("```")
        lines = [line.partition("#")[0] for block in blocks[1::2] for line in block.splitlines()]
        spans = [span for text in blocks[::2] for span in re.findall(r"`([^`]+)`", text)]
        commands += [" ".join(command.split()).removeprefix(".venv/bin/") for command in (*lines, *spans)]
    read = re.compile(
        r"(\.venv/bin/)?(stm|torchrun .*-m stm_model|python -m stm_model\.[\w.]+) .*--data (\w+ )*DAVIS\b"
    )
    return sorted({command.removeprefix(".venv/bin/") for command in commands if read.match(command)})


COMMANDS = _documented()


@pytest.fixture(scope="module", params=["2016", "2017"])
def released(request, tmp_path_factory):
    """The names and folders of a release; tiny frames. 2016's masks are black and white, 2017's have two objects."""
    root = tmp_path_factory.mktemp("released")
    first = tmp_path_factory.mktemp("pictures")
    labels = np.zeros((24, 32), np.uint8)
    labels[4:20, 4:14], labels[4:20, 18:28] = (255, 255) if request.param == "2016" else (1, 2)
    write_image(first / "frame.jpg", np.full((24, 32, 3), 90, np.uint8))
    write_mask(first / "mask.png", labels)
    # the release of 2017 has 2016's lists too
    for name in [name for name in SEQUENCES if name[:4] <= request.param]:
        path = root / "ImageSets" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{sequence}\n" for sequence in SEQUENCES[name].split()))
        for sequence in SEQUENCES[name].split():
            for kind, picture in (("JPEGImages", "frame.jpg"), ("Annotations", "mask.png")):
                folder = root / kind / "480p" / sequence
                folder.mkdir(parents=True, exist_ok=True)
                for index in range(3):
                    (folder / f"{index:05d}{Path(picture).suffix}").write_bytes((first / picture).read_bytes())
    return root


class Opened(Exception):
    """The data was found."""


@pytest.fixture
def stop(monkeypatch):
    """Commands end where their data is open and the work would begin."""

    def opened(*_, **__):
        raise Opened

    for name in (
        "training.train.TrainState",
        "evaluation.evaluate.track_videos",
        "evaluation.studies.track_videos_apart",
        "interactive.evaluate._run",
        "evaluation.pairs.write_pairs",
    ):
        monkeypatch.setattr(f"stm_model.{name}", opened)


def test_the_documents_have_commands_that_read_davis():
    """An expression that finds none would pass everything."""
    assert len([command for command in COMMANDS if "train" in command]) >= 3
    assert len([command for command in COMMANDS if "evaluate" in command]) >= 4
    assert any("pairs" in command for command in COMMANDS)


def _write_others(root):
    """The other datasets that stand beside DAVIS in a command, each with one frame."""
    youtube = root / "YOUTUBE" / "train"
    instances = [root / "COCO", root / "INSTANCES"]
    frames = [youtube / "JPEGImages/aaa/00000.jpg", *(each / "train2017/1.jpg" for each in instances)]
    labels = [youtube / "Annotations/aaa", *(each / "annotations" for each in instances)]
    for folder in (*(path.parent for path in frames), *labels):
        folder.mkdir(parents=True)
    for path in frames:
        write_image(path, np.zeros((24, 32, 3), np.uint8))
    write_mask(youtube / "Annotations/aaa/00000.png", np.ones((24, 32)))
    (youtube / "meta.json").write_text('{"videos": {"aaa": {"objects": {}}}}')
    square = {"id": 1, "image_id": 1, "segmentation": [[2, 2, 9, 2, 9, 9]], "iscrowd": 0, "area": 24}
    content = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [square]}
    for each in instances:
        (each / "annotations/instances_train2017.json").write_text(json.dumps(content))


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_open_a_released_davis(command, released, stop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _write_others(tmp_path)
    words = shlex.split(command.replace("…", ""))
    words = [str(released) if word == "DAVIS" else word for word in words]
    with pytest.raises(Opened):
        if "stm_model.evaluation.pairs" in words:
            monkeypatch.setattr("sys.argv", words[2:])
            pairs.main()
        else:
            start = next(place for place, word in enumerate(words) if word in ("train", "evaluate"))
            assert main(words[start:]) == 0
