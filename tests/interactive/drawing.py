"""Scribbles for tests, and all that a session shows."""

import numpy as np
import torch


def stroke(label, *points):
    return {"path": [list(point) for point in points], "object_id": label}


def middle(mask, label):
    """A short scribble around the middle of an object."""
    rows, columns = np.nonzero(mask == label)
    y, x = rows.mean() / (mask.shape[0] - 1), columns.mean() / (mask.shape[1] - 1)
    return stroke(label, (x - 0.03, y), (x + 0.03, y + 0.03))


def scribble_file(sequence, frames, frame_count):
    """Scribbles, by frame, as DAVIS' JSON has them."""
    times = {"start_time": 0, "end_time": 0}
    listed = [[scribble | times for scribble in frames.get(index, ())] for index in range(frame_count)]
    return {"sequence": sequence, "scribbles": listed}


def everything(session):
    """All that a session shows, to compare bit for bit."""
    probabilities = torch.stack([session.probabilities(index) for index in range(len(session.frames))])
    return session.masks(), probabilities, session.objects, session.rounds, session.annotated_frames


def same(first, second):
    return np.array_equal(first[0], second[0]) and torch.equal(first[1], second[1]) and first[2:] == second[2:]
