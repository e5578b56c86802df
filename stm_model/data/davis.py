"""The DAVIS layout: ImageSets/<year>/<split>.txt, JPEGImages/<resolution>/<video>/ and Annotations/ likewise."""

from collections.abc import Collection
from pathlib import Path
from typing import Literal

from stm_model.data.video import Video

Year = Literal["2016", "2017"]
SPLITS = Path(__file__).parent / "splits" / "davis2016"
"""Lists for datasets without a list of that name: `fit` and `held` divide DAVIS-2016's training sequences."""


def davis_videos(
    root: Path,
    split: str,
    resolution: str | None = None,
    *,
    year: Year | None = None,
    only: Collection[str] = (),
    first_mask_suffices: bool = False,
) -> list[Video]:
    """The videos of a split, a list under ImageSets or shipped with the package.

    Args:
        root: the dataset's folder.
        split: name of the list, without `.txt`.
        resolution: folder under JPEGImages; None takes `480p`, or the only one.
        year: whose list; None takes 2017's, which names all that 2016's does, else 2016's.
        only: names of the videos to find; none finds all.
        first_mask_suffices: accept videos of which only the first mask is public, as in test-dev.
    """
    names = find_list(root, split, year).read_text(encoding="utf-8").split()
    resolution = resolution or _only_resolution(root / "JPEGImages")
    videos = []
    for name in names:
        if only and name not in only:
            continue
        folder = root / "Annotations" / resolution / name
        video = Video.find("DAVIS", root / "JPEGImages" / resolution / name, folder)
        only_first = first_mask_suffices and len(video.annotations) == 1
        for frame in range(1 if only_first else len(video.frame_paths)):
            if frame not in video.annotations:
                stem = video.frame_paths[frame].stem
                raise FileNotFoundError(f"DAVIS video {name}: frame {stem} has no annotation in {folder}")
        videos.append(video)
    return videos


def find_list(root: Path, split: str, year: Year | None = None) -> Path:
    """The file of a list: the dataset's own, else the package's.

    Raises:
        FileNotFoundError: neither has it.
    """
    own = [root / "ImageSets" / of / f"{split}.txt" for of in ([year] if year else ["2017", "2016"])]
    for path in (*own, SPLITS / f"{split}.txt"):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(path.stem for path in SPLITS.glob("*.txt")))
    raise FileNotFoundError(f"DAVIS split {split}: no such file: {own[0]}; the package has {shipped}")


def _only_resolution(folder: Path) -> str:
    found = sorted(path.name for path in folder.glob("*") if path.is_dir())
    if not found:
        raise FileNotFoundError(f"DAVIS layout: no resolution folder under {folder}")
    if "480p" not in found and len(found) > 1:
        raise ValueError(f"DAVIS layout: several resolutions under {folder} ({', '.join(found)}); choose one")
    return "480p" if "480p" in found else found[0]
