"""Videos of two objects made of videos of one: python -m stm_model.evaluation.pairs --data DAVIS --out PAIRS

Each video of a list gets the object of another pasted into it, frame by frame as it moves there, in front of its own
object or behind it. So data with one object a video, held back from training, also tells how well two objects are kept
apart. The result is a folder in the layout of DAVIS-2017, for

    stm evaluate --dataset davis2017 --data PAIRS --split held

The pasted video is mirrored where its object then covers less of the other.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from stm_model.data.augment import paste_objects, visible_objects
from stm_model.data.clips import Clip, clip_of, generator
from stm_model.data.davis import davis_videos
from stm_model.data.video import Video
from stm_model.io.images import encode_jpeg, width_by_height
from stm_model.io.masks import write_mask
from stm_model.progress import Progress, say

JPEG_QUALITY = 95


def read_clip(sequence: Video) -> Clip:
    """A whole video."""
    return clip_of(*zip(*(sequence.load_pair(index) for index in range(len(sequence.frame_paths))), strict=True))


def pair(clip: Clip, other: Clip, seed: int) -> Clip:
    """The clip with the objects of `other` pasted in, as long as the shorter of the two."""
    length = min(len(clip.labels), len(other.labels))
    clip, other = (Clip(each.frames[:length], each.labels[:length]) for each in (clip, other))
    mirrored = Clip(other.frames.flip(-1), other.labels.flip(-1))
    chosen = min((other, mirrored), key=lambda each: int(((each.labels > 0) & (clip.labels > 0)).sum()))
    return visible_objects(paste_objects(clip, chosen, generator(seed)))


def write_video(clip: Clip, root: Path, name: str) -> None:
    """Frames and masks where DAVIS has them."""
    resolution = f"{clip.labels.shape[1]}p"
    frames, masks = (root / kind / resolution / name for kind in ("JPEGImages", "Annotations"))
    for folder in (frames, masks):
        folder.mkdir(parents=True)
    pixels = (clip.frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    for index, (frame, labels) in enumerate(zip(pixels, clip.labels.numpy(), strict=True)):
        (frames / f"{index:05d}.jpg").write_bytes(encode_jpeg(frame, JPEG_QUALITY))
        write_mask(masks / f"{index:05d}.png", labels)


def write_pairs(sequences: list[Video], distances: list[int], root: Path, split: str) -> list[str]:
    """Pair each video with those so many places further down the list; the names of those that show two objects."""
    written = []
    pairs = [(at, (at + distance) % len(sequences)) for distance in distances for at in range(len(sequences))]
    clips: dict[int, Clip] = {}
    for seed, (first, second) in enumerate(Progress(pairs, desc="pair", unit="video")):
        for index in (first, second):
            if index not in clips:
                clips[index] = read_clip(sequences[index])
        names = [sequences[index].name for index in (first, second)]
        sizes = [clips[index].labels.shape[1:] for index in (first, second)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{', '.join(names)}: expected frames of one size, got "
                f"{width_by_height(sizes[0])} and {width_by_height(sizes[1])}"
            )
        made = pair(clips[first], clips[second], seed)
        if made.objects < clips[first].objects + clips[second].objects:
            say(f"{', '.join(names)}: an object is hidden at first, left out")
            continue
        written.append("_".join(names))
        write_video(made, root, written[-1])
    if written:
        lists = root / "ImageSets" / "2017"
        lists.mkdir(parents=True)
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in written))
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder in the layout of DAVIS")
    parser.add_argument("--split", default="held", help="list under ImageSets")
    parser.add_argument("--distances", type=int, nargs="+", default=[1, 2], help="places down the list of the other")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    arguments = parser.parse_args()
    partial = arguments.out.with_name(f".{arguments.out.name}.partial")
    try:
        if arguments.out.exists():
            raise ValueError(f"--out: {arguments.out} exists")
        sequences = davis_videos(arguments.data, arguments.split)
        if any(distance % len(sequences) == 0 for distance in arguments.distances):
            raise ValueError(f"--distances: expected none that leads back, of {len(sequences)} videos")
        shutil.rmtree(partial, ignore_errors=True)
        names = write_pairs(sequences, arguments.distances, partial, arguments.split)
        if not names:
            raise ValueError("no pair shows two objects in its first frame")
        partial.rename(arguments.out)
    except (OSError, ValueError) as error:
        raise SystemExit(f"pairs: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{len(names)} videos: {arguments.out}")


if __name__ == "__main__":
    main()
