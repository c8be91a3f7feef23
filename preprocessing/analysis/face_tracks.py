"""Links the faces of a reel into tracks: one person in one shot, with short gaps bridged."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from jaxtyping import Float32

from preprocessing.reels import Faces, Reel, Track
from tccp.faces import MAX_BRIDGED_FRAMES, MIN_SEEN_FRAMES, Face, link
from tccp.sequences import true_runs


def find_tracks(reel: Reel) -> list[Track]:
    """The tracks of all persons in all shots of a reel, by shot, then by time, numbered from 0.

    Within a shot, a face is linked to the person whose last box it overlaps most (`tccp.faces.link`).
    """
    assert reel.faces is not None, "find_tracks needs a reel whose faces have been detected"
    tracks: list[Track] = []
    edges = [reel.start_frame, *reel.cuts, reel.stop_frame]
    for shot, (start, stop) in enumerate(itertools.pairwise(edges)):
        found = []
        for person in _people(reel.faces, start, stop):
            seen = np.zeros(stop - start, bool)
            seen[[reel.faces.frame[i] - start for i in person]] = True
            for first, end in true_runs(seen, MAX_BRIDGED_FRAMES):
                indices = [i for i in person if first <= reel.faces.frame[i] - start < end]
                if len(indices) >= MIN_SEEN_FRAMES:
                    found.append(_track(reel.faces, indices, shot))
        for track in sorted(found, key=lambda track: (track.start_frame, -track.num_frames, track.box[0].tolist())):
            tracks.append(numbered(track, len(tracks)))
    return tracks


def numbered(track: Track, number: int) -> Track:
    """The track with another number."""
    return replace(track, number=number)


def part_of(track: Track, start_frame: int, stop_frame: int) -> Track:
    """The frames [start_frame, stop_frame) of a track."""
    rows = slice(start_frame - track.start_frame, stop_frame - track.start_frame)
    chips = {frame: chip for frame, chip in track.chips.items() if start_frame <= frame < stop_frame}
    return Track(
        track.number, track.shot, start_frame, track.box[rows], track.landmarks[rows], track.confidence[rows], chips
    )


def _people(faces: Faces, start: int, stop: int) -> list[list[int]]:
    """Indices of the faces of each person in the frames [start, stop)."""
    low, high = np.searchsorted(faces.frame, [start, stop])
    frames: list[list[Face]] = [[] for _ in range(stop - start)]
    index: dict[int, int] = {}
    for i in range(low, high):
        points = faces.landmarks[i]
        known = points if np.isfinite(points).all() else None
        face = Face(faces.box[i], known, float(faces.confidence[i]))
        frames[faces.frame[i] - start].append(face)
        index[id(face)] = i
    # `link` pairs greedily, largest overlap first. SciPy's linear_sum_assignment would maximise the sum of all overlaps
    # instead, and so could give a face to another person than the one whose last box it overlaps most.
    return [[index[id(face)] for _, face in sorted(person.items())] for person in link(frames)]


def _track(faces: Faces, indices: list[int], shot: int) -> Track:
    at = faces.frame[indices]
    frames = np.arange(at[0], at[-1] + 1)
    confidence = np.zeros(len(frames), np.float32)
    confidence[at - at[0]] = np.maximum(faces.confidence[indices], 1e-3)  # 0 marks bridged frames
    return Track(
        number=0,
        shot=shot,
        start_frame=int(at[0]),
        box=_bridged(faces.box[indices], at, frames),
        landmarks=_bridged(faces.landmarks[indices], at, frames),
        confidence=confidence,
        chips={int(faces.frame[i]): faces.chips[i] for i in indices if i in faces.chips},
    )


def _bridged(values: np.ndarray, at: np.ndarray, frames: np.ndarray) -> Float32[np.ndarray, "f ..."]:
    """The values known at the frames `at`, interpolated linearly to all `frames`; NaN where values are NaN."""
    flat = values.reshape(len(values), -1).astype(np.float64)
    filled = np.stack([np.interp(frames, at, column) for column in flat.T], axis=1)
    return filled.reshape(len(frames), *values.shape[1:]).astype(np.float32)
