"""Who of the people on screen speaks, from how their mouths move and what is heard. Numbers in, numbers out.

A person *talks* in a frame if there is a voice and his mouth moves. Where two talk at once and there is one voice, it
belongs to the mouth that moves as the sound says (`preprocessing.analysis.voice_activity.articulation`), or, if that is not clear, to
nobody. What comes of it are stretches: a sentence with its pauses, not a frame here and there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int16, Int64, UInt8

from preprocessing.analysis.voice_activity import hysteresis
from preprocessing.reels import FilmSound, Track
from tccp.config import FPS
from tccp.landmarks import MEAN_FACE, RIGID, head_pose, mouth_opening, mouth_width, smooth_over_time
from tccp.sequences import correlation, true_runs

# Frames and shares below were set on the shared clips and on RoundTable (tests/preprocessing/test_speakers.py holds them to it).
VOICE = 0.5
"""Voice activity from which on somebody is heard."""
MOVES = 0.006
"""Path of a mouth's opening per frame, in distances of the outer eye corners, from which on it is moving. Means over
0.7 s were 0.010 to 0.030 in talking mouths, 0 to 0.003 in still ones, up to 0.010 for half a second in a signer's."""
ASD_TALKS, ASD_STOPS = 1.5, 0.5
"""Light-ASD's score from which on it is, and below which it no longer is: 1.7 to 5 in talking faces, less towards the
ends of what they say, -2 to 1.3 in silent ones."""
_MOTION_REACH = 8  # frames to either side, a third of a second: a syllable with its closure
_JITTER_SHARE = 0.5  # of the rigid points' noise, as a path of the opening (which is a mean of three gaps, smoothed)

PAUSE_FRAMES = 2 * FPS
"""A pause without a voice up to here is part of a stretch."""
STILL_FRAMES = FPS // 2
"""So is a voice whose mouth rests, up to here: closed phonemes, slips of the voice detector."""
QUIET_FRAMES = FPS
"""Quiet kept before and after a stretch ..."""
QUIET_AT_TURN_FRAMES = FPS // 2
"""... and towards another's: what comes between two speakers is divided, and of much of it nobody gets all."""
_STILL_AT_END_FRAMES = FPS // 4
MIN_TALK_FRAMES = 20
"""A stretch holds as much talk: shorter ones are as often a smile while somebody else speaks."""
MIN_TALK_SHARE = 0.5
"""Of the frames with a voice in a stretch, this share is talk."""

_SYNC_REACH = 3 * FPS  # frames to either side in which mouth and sound are compared
_SYNC_LAGS = range(-2, 3)  # frames by which sound may come late: within it, nobody sees anything amiss
_SLOW_FRAMES = 12.0  # what changes more slowly than speech (smiles, distance, loudness) is taken out
_BLOCK = 5  # frames decided at once
# Over 3 s, the sum of two correlations (opening, width) is 0.0 with a deviation of 0.3 between a mouth and others'
# sound; with its own it is 0.4 to 0.9 in real people and 1.2 in RoundTable. The deviation falls as the root of time.
_SYNC_NOISE_S = 3.0
SYNC_MARGIN, SYNC_FLOOR = 0.5, 0.3
_FEEBLE = 0.35  # of the other's motion: a listener's smile
_BLIP_FRAMES = 15


@dataclass(frozen=True)
class Stretch:
    """Frames [start_frame, stop_frame) of a track (its number). reason: None where this person is the one who talks,
    else `not_speaking` or `several_speak`. score: share of the frames with a voice in which he talks."""

    track: int
    start_frame: int
    stop_frame: int
    reason: str | None
    score: float = 0.0


@runtime_checkable
class SpeechNetwork(Protocol):
    """E.g. tccp.models.light_asd.LightAsd."""

    def score(
        self, pcm: Int16[np.ndarray, " n"], chips: UInt8[np.ndarray, "f 112 112"]
    ) -> Float32[np.ndarray, " f"]: ...


def score_track(network: SpeechNetwork, track: Track, sound: FilmSound) -> Float32[np.ndarray, " f"]:
    """Light-ASD's score of each frame of a track, whose chips are of SPEECH_CHIP_PX and at least one.

    A frame without a chip shows the one before it.
    """
    frames = np.arange(track.start_frame, track.stop_frame)
    known = np.array(sorted(track.chips))
    latest = known[np.maximum(np.searchsorted(known, frames, "right") - 1, 0)]
    middles = {int(frame): _middle(track.chips[int(frame)]) for frame in np.unique(latest)}
    chips = np.stack([middles[int(frame)] for frame in latest])
    return network.score(sound.between(track.start_frame, track.stop_frame), chips)


def _middle(jpeg: bytes) -> UInt8[np.ndarray, "112 112"]:
    grey = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert grey is not None and grey.shape == (224, 224), "chips for speech networks have 224 px"
    return grey[56:168, 56:168]


def talking(
    tracks: Sequence[Track],
    voice: Float32[np.ndarray, " f"],
    first_frame: int,
    scores: Mapping[int, Float32[np.ndarray, " _"]] | None = None,
    choose: tuple[float, float] | None = None,
    articulation: Float32[np.ndarray, "f 2"] | None = None,
) -> list[Stretch]:
    """Which frames of each track show the person who speaks: stretches, which cover each frame of a track once.

    Stretches without a reason never overlap, whosever they are: one speaks at a time. voice, articulation: of the
    frames from `first_frame` on (`preprocessing.analysis.voice_activity`); without the latter, moving mouths are compared with the voice
    alone, which says little. scores: Light-ASD's, a value per frame, by track number; of other tracks the landmarks
    say whether the mouth moves. choose: a point in pixels: whose face covers it has the word, even when silent.
    A track without landmarks and scores is kept where there is a voice and nobody else.
    """
    if not tracks:
        return []
    scene = _Scene(tracks, voice, first_frame, scores or {}, articulation)
    kept = scene.chosen(choose) if choose is not None else scene.kept()
    stretches = [stretch for row in range(len(tracks)) for stretch in scene.stretches(row, kept, choose is None)]
    return sorted(stretches, key=lambda stretch: (stretch.track, stretch.start_frame))


@dataclass(frozen=True)
class _Part:
    """Frames [first, stop), counted from the scene's first one, of the track in a row."""

    row: int
    first: int
    stop: int


class _Scene:
    """All tracks on one clock, a row each. Frames are counted from the first of all."""

    def __init__(
        self,
        tracks: Sequence[Track],
        voice: Float32[np.ndarray, " f"],
        first_frame: int,
        scores: Mapping[int, Float32[np.ndarray, " _"]],
        articulation: Float32[np.ndarray, "f 2"] | None,
    ) -> None:
        self.tracks = tracks
        self.origin = min(first_frame, *(track.start_frame for track in tracks))
        length = max(first_frame + len(voice), *(track.stop_frame for track in tracks)) - self.origin
        self.voice = np.zeros(length, bool)
        self.voice[first_frame - self.origin :][: len(voice)] = voice >= VOICE
        heard = np.full((length, 2), np.nan)
        told = np.repeat(voice[:, None], 2, 1) if articulation is None else articulation
        heard[first_frame - self.origin :][: len(voice)] = _without_slow(smooth_over_time(told.astype(np.float64), 1.0))
        self.heard = heard
        self.present = np.zeros((len(tracks), length), bool)
        self.talks = np.zeros((len(tracks), length), bool)
        self.motion = np.full((len(tracks), length), np.nan)
        self.mouth = np.full((len(tracks), length, 2), np.nan)
        for row, track in enumerate(tracks):
            part = slice(track.start_frame - self.origin, track.stop_frame - self.origin)
            self.present[row, part] = True
            points = track.landmarks.astype(np.float64)
            known = np.isfinite(points).all((1, 2))
            moves = np.ones(track.num_frames, bool)
            if known.any():
                self.mouth[row, part] = _without_slow(_mouth(points))
                self.motion[row, part] = mouth_motion(track.landmarks)
                moves = self.motion[row, part] >= MOVES
            if track.number in scores:
                moves = hysteresis(_mean_around(scores[track.number].astype(np.float64), 2), ASD_STOPS, ASD_TALKS)
            self.talks[row, part] = moves & self.voice[part]
        self.unclear = np.zeros_like(self.talks)
        self.owner = self._owners()

    # ---- frame by frame: whose is the voice

    def _owners(self) -> Int64[np.ndarray, " f"]:
        """The row of the one who has the voice in each frame, -1 for nobody; where it is not clear, `unclear` is set.

        Somebody who talks alone has it. A short doubt within one person's talk is none.
        """
        count: Int64[np.ndarray, " f"] = self.talks.sum(0)
        owner = np.where(count == 1, self.talks.argmax(0), -1)
        for first, stop in true_runs(count > 1):
            for start in range(first, stop, _BLOCK):
                block = slice(start, min(start + _BLOCK, stop))
                rivals = np.flatnonzero(self.talks[:, block].any(1))
                winner = self._winner(rivals, start)
                if winner is None:
                    self.unclear[:, block] = self.talks[:, block]
                else:
                    owner[block] = winner
        for first, stop in true_runs(self.unclear.max(axis=0)):
            around = owner[max(first - FPS, 0) : first], owner[stop : stop + FPS]
            before, after = (part[part >= 0] for part in around)
            if stop - first <= _BLIP_FRAMES and len(before) and len(after) and before[-1] == after[0]:
                owner[first:stop], self.unclear[:, first:stop] = before[-1], False
        return owner

    def _winner(self, rivals: Int64[np.ndarray, " k"], frame: int) -> int | None:
        """Whose mouth the sound around a frame comes from; None if that is not clear."""
        if np.isnan(self.mouth[rivals, frame]).any():
            return None
        together = self.present[rivals].all(0) & np.isfinite(self.heard[:, 0])
        window = np.arange(max(frame - _SYNC_REACH, 0), min(frame + _SYNC_REACH, len(together)))
        window = window[together[window]]
        sync = np.array([self._sync(int(row), window) for row in rivals])
        doubt = np.sqrt(_SYNC_NOISE_S * FPS / max(len(window), FPS))
        best = int(sync.argmax())
        if sync[best] >= SYNC_FLOOR * doubt and sync[best] - np.delete(sync, best).max() >= SYNC_MARGIN * doubt:
            return int(rivals[best])
        motion = self.motion[rivals, frame]
        strongest = int(motion.argmax())
        feeble = np.delete(motion, strongest).max() < _FEEBLE * motion[strongest]
        return int(rivals[strongest]) if feeble and strongest == best else None

    def _sync(self, row: int, window: Int64[np.ndarray, " w"]) -> float:
        """How well a mouth follows the sound: correlations of opening and width, added, at the best of a few lags."""
        best = -2.0
        for lag in _SYNC_LAGS:
            heard = np.clip(window + lag, 0, len(self.heard) - 1)
            sound = np.where(np.isfinite(self.heard[heard]), self.heard[heard], 0)
            each = [correlation(self.mouth[row, window, i], sound[:, i]) for i in (0, 1)]
            best = max(best, float(np.nansum(each)))
        return best

    # ---- from frames to stretches

    def kept(self) -> list[_Part]:
        """The parts in which somebody is the speaker, by time; no two overlap."""
        cores: list[_Part] = []
        taken = np.zeros(len(self.voice), bool)
        found = [(row, *core) for row in range(len(self.tracks)) for core in self._joined(self.owner == row, row)]
        # Those with the most talk first: an interjection does not take the word.
        for row, first, stop in sorted(
            found, key=lambda core: (-(self.owner[core[1] : core[2]] == core[0]).sum(), core)
        ):
            for free_first, free_stop in true_runs(~taken[first:stop]):
                mine = np.flatnonzero(self.owner[first + free_first : first + free_stop] == row)
                if len(mine):
                    core = _Part(row, first + free_first + int(mine[0]), first + free_first + int(mine[-1]) + 1)
                    if self._is_talk(core):
                        taken[core.first : core.stop] = True
                        cores.append(core)
        cores.sort(key=lambda core: core.first)
        return self._with_quiet(cores)

    def _joined(self, mine: Bool[np.ndarray, " f"], row: int) -> list[tuple[int, int]]:
        """Runs of a person's frames, joined over pauses and over short rests of the mouth."""
        joined: list[tuple[int, int]] = []
        for first, stop in true_runs(mine & self.present[row]):
            if joined:
                gap = self.voice[joined[-1][1] : first]
                if gap.sum() <= STILL_FRAMES and (~gap).sum() <= PAUSE_FRAMES:
                    joined[-1] = (joined[-1][0], stop)
                    continue
            joined.append((first, stop))
        return joined

    def _talk_share(self, part: _Part) -> tuple[int, float]:
        voiced = self.voice[part.first : part.stop]
        talk = int((voiced & (self.owner[part.first : part.stop] == part.row)).sum())
        return talk, talk / max(int(voiced.sum()), 1)

    def _is_talk(self, part: _Part) -> bool:
        frames, share = self._talk_share(part)
        return frames >= MIN_TALK_FRAMES and share >= MIN_TALK_SHARE

    def _with_quiet(self, cores: Sequence[_Part]) -> list[_Part]:
        """Each with the quiet around it, as far as it is not another's."""
        parts = []
        for i, core in enumerate(cores):
            before = self._room(cores[i - 1], core) if i else (0, QUIET_FRAMES)
            after = self._room(core, cores[i + 1]) if i + 1 < len(cores) else (QUIET_FRAMES, 0)
            first = core.first - self._quiet(core.row, core.first - 1, -1, before[1])
            parts.append(_Part(core.row, first, core.stop + self._quiet(core.row, core.stop, 1, after[0])))
        return parts

    def _room(self, one: _Part, other: _Part) -> tuple[int, int]:
        """How much of the gap between two parts the first may have, and the second."""
        gap = other.first - one.stop
        most = QUIET_FRAMES
        if one.row != other.row and self.present[[one.row, other.row], one.stop : other.first].all():
            most = QUIET_AT_TURN_FRAMES
        return min(gap // 2, most), min(gap - gap // 2, most)

    def _quiet(self, row: int, frame: int, step: int, most: int) -> int:
        """How many frames from `frame` on are quiet, up to `most`; a little voice that the mouth does not show is."""
        count = voiced = 0
        while count < most and 0 <= frame < len(self.voice) and self.present[row, frame]:
            voiced += bool(self.voice[frame])
            if voiced > _STILL_AT_END_FRAMES:
                break
            count, frame = count + 1, frame + step
        return count

    def chosen(self, point: tuple[float, float]) -> list[_Part]:
        """The tracks whose faces cover a point; of two at once, the one that covers it in more frames."""
        hits = []
        for row, track in enumerate(self.tracks):
            inside = (track.box[:, :2] <= point).all(1) & (point <= track.box[:, 2:]).all(1)
            hits.append((int((inside & (track.confidence > 0)).sum()), row))
        parts: list[_Part] = []
        taken = np.zeros(len(self.voice), bool)
        for count, row in sorted(hits, key=lambda hit: (-hit[0], hit[1])):
            where = self.present[row]
            if count and not (taken & where).any():
                taken |= where
                parts += [_Part(row, first, stop) for first, stop in true_runs(where)]
        return parts

    def stretches(self, row: int, kept: Sequence[_Part], doubts: bool) -> list[Stretch]:
        """A track's own: those kept, and the reasons for the rest. doubts: whether others may be `several_speak`."""
        names = (None, "not_speaking", "several_speak")
        state = np.where(self.present[row], 1, -1)
        for part in self._doubtful(row) if doubts else ():
            state[part.first : part.stop] = 2
        for part in kept:
            if part.row == row:
                state[part.first : part.stop] = 0
        state[~self.present[row]] = -1
        found = []
        for value, name in enumerate(names):
            for first, stop in true_runs(state == value):
                score = self._talk_share(_Part(row, first, stop))[1] if value == 0 else 0.0
                found.append(
                    Stretch(self.tracks[row].number, self.origin + first, self.origin + stop, name, round(score, 3))
                )
        return found

    def _doubtful(self, row: int) -> list[_Part]:
        """The stretches in which he may be the one who talks, or somebody else, with the quiet around them."""
        cores = []
        for first, stop in self._joined(self.talks[row] & (self.unclear[row] | (self.owner == row)), row):
            if self.unclear[row, first:stop].any():
                before = self._quiet(row, first - 1, -1, QUIET_FRAMES)
                cores.append(_Part(row, first - before, stop + self._quiet(row, stop, 1, QUIET_FRAMES)))
        return cores


# ---- mouths


def mouth_motion(landmarks: Float32[np.ndarray, "f 68 2"]) -> Float64[np.ndarray, " f"]:
    """How much the mouth opens and closes around each frame: path per frame, in distances of the outer eye corners.

    Moving and turning the head is taken out, and so is the noise of the points: small faces tremble. NaN where no
    points are near.
    """
    points = landmarks.astype(np.float64)
    opening = _mouth(points)[:, 0]
    step = np.abs(np.diff(opening, prepend=opening[:1]))
    path = _mean_around(step, _MOTION_REACH)
    return np.sqrt(np.maximum(path**2 - (_JITTER_SHARE * _jitter(points)) ** 2, 0))


def _mouth(points: Float64[np.ndarray, "f 68 2"]) -> Float64[np.ndarray, "f 2"]:
    """Opening and width of the mouth, a little smoothed."""
    return smooth_over_time(np.stack([mouth_opening(points), mouth_width(points)], 1), 0.7)


_RIGID_FACE = np.column_stack([MEAN_FACE[list(RIGID)], np.ones(len(RIGID))])
_RIGID_MOVES = _RIGID_FACE @ np.linalg.pinv(_RIGID_FACE)


def _jitter(points: Float64[np.ndarray, "f 68 2"]) -> float:
    """Noise (one deviation) of points that cannot move on a head, in distances of the eye corners.

    What is left of them without any motion of the head; a second difference of noise has six times its variance.
    """
    rigid = points[:, list(RIGID)]
    rest = (rigid - _RIGID_MOVES @ rigid) / head_pose(points).scale[:, None, None]
    bend = np.abs(rest[2:] - 2 * rest[1:-1] + rest[:-2])
    bend = bend[np.isfinite(bend)]
    return float(np.median(bend)) / 0.6745 / np.sqrt(6) if len(bend) else 0.0


def _mean_around(values: Float64[np.ndarray, " f"], reach: int) -> Float64[np.ndarray, " f"]:
    """Mean over the known values within so many frames; NaN where there are none."""
    known = np.isfinite(values)
    ends = np.arange(len(values))
    low, high = np.maximum(ends - reach, 0), np.minimum(ends + reach + 1, len(values))
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0))])
    count = np.concatenate([[0], np.cumsum(known)])
    number = count[high] - count[low]
    return np.where(number > 0, (total[high] - total[low]) / np.maximum(number, 1), np.nan)


def _without_slow(series: Float64[np.ndarray, "f 2"]) -> Float64[np.ndarray, "f 2"]:
    return series - smooth_over_time(series, _SLOW_FRAMES)
