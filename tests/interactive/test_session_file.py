"""Sessions in files and what they export; files that are refused."""

import json
import zipfile

import numpy as np
import pytest
from drawing import everything, same, stroke

from stm_model.interactive.session import ScribbleSession
from stm_model.interactive.state import LEVELS


def test_a_saved_session_comes_back_with_all_its_steps(two_rounds, scribble_model, clip, tmp_path):
    path = tmp_path / "walk.stm"
    two_rounds.save(path)
    session = ScribbleSession(scribble_model, clip[0])
    session.restore(path)
    assert same(everything(two_rounds), everything(session)) and session.steps == two_rounds.steps
    session.undo()
    session.undo()
    assert session.rounds == 1 and session.objects == (1,)
    session.redo()
    session.run()
    (masks, probabilities, *rest), (other_masks, others, *other_rest) = everything(two_rounds), everything(session)
    assert np.array_equal(masks, other_masks) and rest == other_rest
    # frames that are encoded in other groups differ by a rounding, which may cross a step of the kept masks
    assert (probabilities - others).abs().max() <= 1 / LEVELS + 1e-6
    assert [file.name for file in tmp_path.iterdir()] == ["walk.stm"]


def test_a_session_of_another_video_says_what_differs(two_rounds, scribble_model, clip, tmp_path):
    path, frames = tmp_path / "a.stm", clip[0]
    two_rounds.save(path)
    other = frames.copy()
    other[7, 0, 0] ^= 1
    cases = [
        (frames[:7], {}, "its video has 8 frames, this one 7"),
        (frames[:, :64], {}, "its video has 90x70 pixels, this one 90x64"),
        (frames, {"size": 48}, "its network has 90x70 pixels, this one 62x48"),
        (other, {}, "of another video: frames 7 differ"),
    ]
    for video, options, message in cases:
        with pytest.raises(ValueError, match=message):
            ScribbleSession(scribble_model, video, **options).restore(path)


def rewrite(path, change):
    """A session file whose JSON, or whose entries, were changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    content = json.loads(entries["session.json"])
    change(content, entries)
    entries["session.json"] = json.dumps(content).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, blob in entries.items():
            archive.writestr(name, blob)


BROKEN = {
    "no zip": lambda path: path.write_bytes(b"no zip"),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "another version": lambda path: rewrite(path, lambda content, _: content.update(version=9)),
    "one step too many": lambda path: rewrite(path, lambda content, _: content.update(position=len(content["states"]))),
    "a step before the first": lambda path: rewrite(path, lambda content, _: content.update(position=-1)),
    "no states": lambda path: rewrite(path, lambda content, _: content.pop("states")),
    "a list": lambda path: rewrite(path, lambda content, _: content.update(states=[[]])),
    "a scribble outside": lambda path: rewrite(
        path, lambda content, _: content["states"][-1]["scribbles"]["1"][0]["path"].append([2, 0])
    ),
    "a frame too many": lambda path: rewrite(path, lambda content, _: content["states"][-1].update(fresh=[8])),
    "an unknown object": lambda path: rewrite(path, lambda content, _: content["states"][-1].update(objects=[1])),
    "masks gone": lambda path: rewrite(path, lambda _, entries: [entries.pop(k) for k in list(entries) if "/" in k]),
    "masks changed": lambda path: rewrite(path, lambda _, entries: entries.update(dict.fromkeys(entries, b""))),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_session_is_refused_and_the_session_intact(two_rounds, scribble_model, clip, tmp_path, case):
    path = tmp_path / "a.stm"
    two_rounds.save(path)
    BROKEN[case](path)
    session = ScribbleSession(scribble_model, clip[0])
    session.add_scribbles(1, [stroke(1, (0.5, 0.5))])
    with pytest.raises(ValueError, match=r"a\.stm: .*(session|step)") as error:
        session.restore(path)
    assert "\n" not in str(error.value) and session.objects == (1,) and session.steps[1] == 1
