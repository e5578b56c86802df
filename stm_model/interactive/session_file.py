"""A session in one file: a zip of `session.json`, with every step, and of the masks that the steps name by checksum."""

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from stm_model.interactive.scribbles import MAX_LABEL, check_scribbles
from stm_model.interactive.state import FrameMasks, State, check_look, unpack_bits
from stm_model.io.files import whole
from stm_model.io.images import width_by_height

VERSION = 1
MAX_BYTES = 2 * 2**30
"""Largest unpacked size; a session of 300 frames and 8 rounds takes a few megabytes."""
CHECKED_FRAMES = 5
"""Evenly spread frames whose checksums identify the video."""


class SessionFileError(ValueError):
    """Not a session file, or one of another video; the message says what differs."""


def describe_video(frames: Sequence[np.ndarray], size: tuple[int, int]) -> dict[str, Any]:
    """What a session file says of its video: frames, uint8 `[H, W, 3]`, and the network's height and width."""
    places = sorted({round(place * (len(frames) - 1) / (CHECKED_FRAMES - 1)) for place in range(CHECKED_FRAMES)})
    return {
        "frames": len(frames),
        "pixels": list(np.shape(frames[0])[:2]),
        "network pixels": list(size),
        "checksums": {
            str(place): hashlib.sha256(np.ascontiguousarray(frames[place]).tobytes()).hexdigest() for place in places
        },
    }


def write_session(path: str | os.PathLike, video: Mapping[str, Any], history: Sequence[State], position: int) -> None:
    """Write every step of a session, whole or not at all; `position` is the present one."""
    blobs: dict[str, bytes] = {}

    def keep(content: bytes) -> str:
        name = hashlib.sha256(content).hexdigest()
        blobs[name] = content
        return name

    states = [_to_json(state, keep) for state in history]
    content = {"version": VERSION, "video": video, "position": position, "states": states}
    with whole(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        archive.writestr("session.json", json.dumps(content), zipfile.ZIP_DEFLATED)
        for name, blob in blobs.items():
            archive.writestr(f"masks/{name}", blob)


def _to_json(state: State, keep: Callable[[bytes], str]) -> dict[str, Any]:
    painted = state.painted.items()
    return {
        "action": state.action,
        "objects": list(state.objects),
        "rounds": state.rounds,
        "fresh": sorted(state.fresh),
        "names": {str(label): name for label, name in state.names.items()},
        "colors": {str(label): color for label, color in state.colors.items()},
        "scribbles": {str(frame): list(scribbles) for frame, scribbles in state.scribbles.items()},
        "painted": {str(frame): {str(label): keep(mask) for label, mask in masks.items()} for frame, masks in painted},
        "masks": {str(frame): [list(masks.objects), keep(masks.packed)] for frame, masks in state.masks.items()},
    }


def read_session(path: str | os.PathLike, video: Mapping[str, Any]) -> tuple[list[State], int]:
    """The steps of a session of this video, and the index of the present one.

    Raises SessionFileError for what is no session, a damaged one, or one of another video.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_BYTES:
                raise SessionFileError(f"{path}: unpacks to more than {MAX_BYTES} bytes")
            content = json.loads(archive.read("session.json"))
            _check_video(path, content, video)
            blobs = {name.removeprefix("masks/"): archive.read(name) for name in archive.namelist()}
        states = [_from_json(state, blobs, video) for state in content["states"]]
        position = content["position"]
        if not 0 <= position < len(states):
            raise SessionFileError(f"{path}: step {position} of {len(states)}")
    except (SessionFileError, FileNotFoundError):
        raise
    except (zipfile.BadZipFile, zlib.error, UnicodeDecodeError, json.JSONDecodeError, NotImplementedError) as error:
        raise SessionFileError(f"{path}: not a session, or a damaged one ({error})") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise SessionFileError(f"{path}: a damaged session ({type(error).__name__}: {error})") from error
    return states, position


def _check_video(path: str | os.PathLike, content: Any, video: Mapping[str, Any]) -> None:
    if content["version"] != VERSION:
        raise SessionFileError(f"{path}: a session of version {content['version']}; expected {VERSION}")
    saved = content["video"]
    if saved["frames"] != video["frames"]:
        raise SessionFileError(f"{path}: its video has {saved['frames']} frames, this one {video['frames']}")
    for name, what in (("pixels", "its video"), ("network pixels", "its network")):
        if list(saved[name]) != list(video[name]):
            sizes = f"{width_by_height(saved[name])} pixels, this one {width_by_height(video[name])}"
            raise SessionFileError(f"{path}: {what} has {sizes}")
    different = [place for place, checksum in video["checksums"].items() if saved["checksums"].get(place) != checksum]
    if different:
        raise SessionFileError(f"{path}: of another video: frames {', '.join(different)} differ")


def _from_json(content: Any, blobs: Mapping[str, bytes], video: Mapping[str, Any]) -> State:
    objects = tuple(content["objects"])
    if len(set(objects)) != len(objects) or not set(objects) <= set(range(1, MAX_LABEL + 1)):
        raise ValueError(f"objects: {objects}")
    state = State(
        str(content["action"]),
        objects,
        {int(frame): tuple(scribbles) for frame, scribbles in content["scribbles"].items()},
        {
            int(frame): {int(label): blobs[name] for label, name in masks.items()}
            for frame, masks in content["painted"].items()
        },
        {int(frame): FrameMasks(tuple(labels), blobs[name]) for frame, (labels, name) in content["masks"].items()},
        frozenset(content["fresh"]),
        int(content["rounds"]),
        # sessions of version 0.1 have none
        **{
            kind: {int(label): str(value) for label, value in content.get(kind, {}).items()}
            for kind in ("names", "colors")
        },
    )
    for label in {*state.names, *state.colors}:
        check_look(state, label, state.names.get(label), state.colors.get(label))
    for frame in {*state.scribbles, *state.painted, *state.masks, *state.fresh}:
        if not 0 <= frame < video["frames"]:
            raise ValueError(f"frame {frame} of {video['frames']}")
    for scribbles in state.scribbles.values():
        check_scribbles(scribbles, objects)
    for masks in state.masks.values():
        if not set(masks.objects) <= set(objects):
            raise ValueError(f"masks of objects {masks.objects}, but the objects are {objects}")
        masks.unpack(tuple(video["network pixels"]))
    for frame, painted in state.painted.items():
        for label, packed in painted.items():
            if label not in state.masks[frame].objects:
                raise ValueError(f"object {label} is painted on frame {frame}, but has no mask there")
            unpack_bits(packed, tuple(video["pixels"]))
    return state
