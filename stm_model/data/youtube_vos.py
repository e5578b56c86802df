"""Folders in the YouTube-VOS layout: JPEGImages/<video>/, Annotations/<video>/ and meta.json with the names."""

from __future__ import annotations

import json
from pathlib import Path

from stm_model.data.video import Sequence


def youtube_vos_sequences(root: str | Path) -> list[Sequence]:
    """The videos that meta.json names.

    Not every frame has a mask: every fifth has in the training set, in the validation set those in which an object
    enters. Objects that enter later have labels that the masks before don't.

    Args:
        root: the folder of one split, with meta.json in it.

    Raises:
        FileNotFoundError: meta.json or the frames of a video are missing.
        ValueError: meta.json is not of this kind, a video has no mask, or a mask has no frame.
    """
    root = Path(root)
    path = root / "meta.json"
    if not path.is_file():
        raise FileNotFoundError(f"YouTube-VOS layout: no such file: {path}")
    try:
        names = sorted(json.loads(path.read_text())["videos"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'YouTube-VOS layout: {path}: expected {{"videos": …}}: {error}') from error
    return [_find_video(root, name) for name in names]


def _find_video(root: Path, name: str) -> Sequence:
    frames = sorted((root / "JPEGImages" / name).glob("*.jpg"))
    masks = {path.stem: path for path in (root / "Annotations" / name).glob("*.png")}
    if not frames:
        raise FileNotFoundError(f"YouTube-VOS video {name}: no frames under {root / 'JPEGImages' / name}")
    if not masks:
        raise ValueError(f"YouTube-VOS video {name}: no masks under {root / 'Annotations' / name}")
    without = sorted(masks.keys() - {path.stem for path in frames})
    if without:
        raise ValueError(f"YouTube-VOS video {name}: masks {', '.join(without[:5])} have no frame")
    return Sequence(name, frames, [masks.get(path.stem) for path in frames])
