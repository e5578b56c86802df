"""Folders in the DAVIS layout: JPEGImages/<resolution>/<sequence>/, Annotations/<resolution>/<sequence>/, ImageSets."""

from __future__ import annotations

from pathlib import Path

from stm_model.data.video import Sequence


def davis_sequences(root: str | Path, split: str, resolution: str | None = None) -> list[Sequence]:
    """The sequences a split names.

    Args:
        root: the dataset's folder.
        split: name of a list under ImageSets/2017 or ImageSets/2016, without `.txt`; where both have it, 2017's, which
            names all that 2016's does.
        resolution: folder under JPEGImages; None takes the only one, or `480p`.

    Raises:
        FileNotFoundError: a folder, list or sequence is missing.
        ValueError: frames and masks of a sequence differ in number.
    """
    root = Path(root)
    lists = [path for year in ("2017", "2016") if (path := root / "ImageSets" / year / f"{split}.txt").is_file()]
    if not lists:
        raise FileNotFoundError(f"DAVIS split: no {split}.txt under {root / 'ImageSets'}")
    resolution = resolution or _only_resolution(root)
    return [_find_sequence(root, resolution, name) for name in lists[0].read_text().split()]


def _only_resolution(root: Path) -> str:
    found = sorted(path.name for path in (root / "JPEGImages").glob("*") if path.is_dir())
    if not found:
        raise FileNotFoundError(f"DAVIS layout: no resolution folder under {root / 'JPEGImages'}")
    return "480p" if "480p" in found else found[0]


def _find_sequence(root: Path, resolution: str, name: str) -> Sequence:
    frames = sorted((root / "JPEGImages" / resolution / name).glob("*.jpg"))
    masks = sorted((root / "Annotations" / resolution / name).glob("*.png"))
    if not frames:
        raise FileNotFoundError(f"DAVIS sequence {name}: no frames under {root / 'JPEGImages' / resolution / name}")
    if len(frames) != len(masks):
        raise ValueError(f"DAVIS sequence {name}: {len(frames)} frames but {len(masks)} masks")
    return Sequence(name, frames, masks)
