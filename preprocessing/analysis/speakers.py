"""Finds which of the people on screen speaks, from their mouth movement and the sound.

A person *talks* in a frame if there is a voice and their mouth moves. Where several people talk at once, the voice is
assigned to the mouth whose movement matches the sound (`preprocessing.analysis.voice_activity.articulation`), or, if
that is not clear, to no person. A person who talks alone is the speaker, unless the movement of their mouth does not
match the sound over several seconds: then the voice belongs to someone who is not seen (off screen, or in profile,
which detectors of frontal faces miss). The result is a list of stretches: sentences with their pauses, not single
frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Int16, Int64, UInt8

from preprocessing.analysis.mouths import best_match, mean_around, mouth_motion, mouth_shape, without_slow_changes
from preprocessing.analysis.voice_activity import hysteresis
from preprocessing.reels import FilmSound, Track
from tccp.config import FPS
from tccp.landmarks import smooth_over_time
from tccp.sequences import true_runs

# The numbers below were chosen on the shared clips and on RoundTable; test_speakers.py checks the results on both.
VOICE = 0.5
"""Voice activity from which on a frame counts as having a voice."""
MOVES = 0.006
"""Path of a mouth's opening per frame, in distances of the outer eye corners, from which on the mouth moves. Means over
0.7 s were 0.010 to 0.030 in talking mouths, 0 to 0.003 in still ones, up to 0.010 for half a second in a signer's."""
ASD_TALKS, ASD_STOPS = 1.5, 0.5
"""Hysteresis thresholds for Light-ASD's score. Scores were 1.7 to 5 in talking faces, lower towards the ends of their
sentences, and -2 to 1.3 in silent faces."""

PAUSE_FRAMES = 2 * FPS
"""Longest pause without a voice inside a stretch."""
STILL_FRAMES = FPS // 2
"""Most frames with a voice but a still mouth inside a stretch: closed phonemes, errors of the voice detector."""
QUIET_FRAMES = FPS
"""Most quiet frames that are kept before and after a stretch ..."""
QUIET_AT_TURN_FRAMES = FPS // 2
"""... and towards another speaker's stretch. The quiet between two speakers is divided; a long one is not used up."""
_STILL_AT_END_FRAMES = FPS // 4
MIN_TALK_FRAMES = 20
"""Least frames of talk in a stretch: shorter ones are often a smile while another person speaks."""
MIN_TALK_SHARE = 0.5
"""Least share of talk among the frames with a voice in a stretch."""

_SYNC_REACH = 3 * FPS  # frames to either side in which mouth and sound are compared
_SYNC_LAGS = range(-2, 3)  # frames by which the sound may be late: viewers do not notice such an offset
_BLOCK = 5  # frames that are decided together
# Over 3 s, the sum of two correlations (opening, width) is 0.0 with a standard deviation of 0.3 between a mouth and
# other people's sound; with its own sound it is 0.4 to 0.9 in real people and 1.2 in RoundTable. The standard deviation
# falls with the square root of time.
_SYNC_NOISE_S = 3.0
SYNC_MARGIN, SYNC_FLOOR = 0.5, 0.3
# A mouth does not belong to the voice if the sum falls short of HEARD_SYNC by more than HEARD_NOISE, the latter over
# 3 s. In real people, the lowest 5 % of the sums with the own sound were 0.1 over 3 s, 0.25 over 5 s and 0.35 over
# 10 s; of the sums with other sound, half were below 0.1, nine tenths below 0.5, 0.4 and 0.3. Pauses are included: the
# mouth rests in them.
HEARD_SYNC, HEARD_NOISE = 0.5, 0.35
_LEAST_HEARD = 2 * FPS
_HEARD_WINDOW = 10 * FPS  # frames around each decision
_HEARD_SLOW_FRAMES = 25.0  # in place of SLOW_FRAMES
_HEARD_SMOOTH = FPS  # frames to either side over which decisions are averaged
_FILM_LAGS = range(-8, 9)  # frames by which the sound of the whole film may be late
_FILM_LAG_MARGIN = 0.45  # by which the match must be better than without that offset, over 3 s
_WEAK_SHARE = 0.35  # of the other mouth's motion: a listener's smile
_SHORT_DOUBT_FRAMES = 15


@dataclass(frozen=True)
class Stretch:
    """Frames [start_frame, stop_frame) of the track with this number.

    reason: None where this person is the speaker, else `not_speaking` or `several_speak`. score: share of talk among
    the frames with a voice.
    """

    track: int
    start_frame: int
    stop_frame: int
    reason: str | None
    score: float = 0.0


@runtime_checkable
class SpeechNetwork(Protocol):
    """A network that scores each frame of a face with its sound, such as tccp.models.light_asd.LightAsd."""

    def score(
        self, pcm: Int16[np.ndarray, " n"], chips: UInt8[np.ndarray, "f 112 112"]
    ) -> Float32[np.ndarray, " f"]: ...


def score_track(network: SpeechNetwork, track: Track, sound: FilmSound) -> Float32[np.ndarray, " f"]:
    """Light-ASD's score of each frame of a track. The track needs at least one chip, of SPEECH_CHIP_PX.

    A frame without a chip uses the latest chip before it.
    """
    frames = np.arange(track.start_frame, track.stop_frame)
    known = np.array(sorted(track.chips))
    latest = known[np.maximum(np.searchsorted(known, frames, "right") - 1, 0)]
    centres = {int(frame): _centre(track.chips[int(frame)]) for frame in np.unique(latest)}
    chips = np.stack([centres[int(frame)] for frame in latest])
    return network.score(sound.between(track.start_frame, track.stop_frame), chips)


def _centre(jpeg: bytes) -> UInt8[np.ndarray, "112 112"]:
    grey = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert grey is not None and grey.shape == (224, 224), "chips for speech networks have 224 px"
    return grey[56:168, 56:168]


def speaking_stretches(
    tracks: Sequence[Track],
    voice: Float32[np.ndarray, " f"],
    first_frame: int,
    scores: Mapping[int, Float32[np.ndarray, " _"]] | None = None,
    choose: tuple[float, float] | None = None,
    articulation: Float32[np.ndarray, "f 2"] | None = None,
) -> list[Stretch]:
    """Divides each track into stretches in which the person speaks, and stretches in which they do not.

    The stretches cover each frame of a track once. Stretches without a reason never overlap, not even between tracks:
    there is one speaker at a time.

    voice, articulation: for the frames from `first_frame` on (`preprocessing.analysis.voice_activity`). Without
    `articulation`, mouth movement is compared with `voice`, which decides little. scores: Light-ASD's scores, one per
    frame, by track number; for other tracks the landmarks decide whether the mouth moves. choose: a point in pixels;
    the person whose face covers it is the speaker, even when silent. A track without landmarks and scores counts as
    talking wherever there is a voice. A person who talks alone for two seconds or more is the speaker only where
    their mouth follows `articulation`: Light-ASD scores a moving mouth as high with another person's sound.
    """
    if not tracks:
        return []
    scene = _Scene(tracks, voice, first_frame, scores or {}, articulation)
    kept = scene.chosen(choose) if choose is not None else scene.kept()
    stretches = [stretch for row in range(len(tracks)) for stretch in scene.stretches(row, kept, choose is None)]
    return sorted(stretches, key=lambda stretch: (stretch.track, stretch.start_frame))


@dataclass(frozen=True)
class _Part:
    """Frames [first, stop), counted from the scene's first frame, of the track in this row."""

    row: int
    first: int
    stop: int


class _Scene:
    """All tracks on a common clock, one row each. Frames are counted from the first frame of all tracks and the voice.

    voice: whether there is a voice. sound_features: `articulation` without slow changes. present: whether the track has
    the frame. talks: whether there is a voice and the person's mouth moves. motion: `mouth_motion`. mouth: opening and
    width without slow changes. speaker: row of the speaker, or -1. unclear: whether the person may be the speaker.
    """

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
        features = np.repeat(voice[:, None], 2, 1) if articulation is None else articulation
        self.sound_features = np.full((length, 2), np.nan)
        self.slow_sound = np.full((length, 2), np.nan)  # with slower changes, like `slow_mouth`
        smoothed, part = smooth_over_time(features.astype(np.float64), 1.0), slice(first_frame - self.origin, None)
        self.sound_features[part][: len(voice)] = without_slow_changes(smoothed)
        self.slow_sound[part][: len(voice)] = without_slow_changes(smoothed, _HEARD_SLOW_FRAMES)
        self.present = np.zeros((len(tracks), length), bool)
        self.talks = np.zeros((len(tracks), length), bool)
        self.motion = np.full((len(tracks), length), np.nan)
        self.mouth = np.full((len(tracks), length, 2), np.nan)
        self.slow_mouth = np.full((len(tracks), length, 2), np.nan)
        for row, track in enumerate(tracks):
            part = slice(track.start_frame - self.origin, track.stop_frame - self.origin)
            self.present[row, part] = True
            points = track.landmarks.astype(np.float64)
            known = np.isfinite(points).all((1, 2))
            moves = np.ones(track.num_frames, bool)
            if known.any():
                self.mouth[row, part] = without_slow_changes(mouth_shape(points))
                self.slow_mouth[row, part] = without_slow_changes(mouth_shape(points), _HEARD_SLOW_FRAMES)
                self.motion[row, part] = mouth_motion(track.landmarks)
                moves = self.motion[row, part] >= MOVES
            if track.number in scores:
                moves = hysteresis(mean_around(scores[track.number].astype(np.float64), 2), ASD_STOPS, ASD_TALKS)
            self.talks[row, part] = moves & self.voice[part]
        self.compares = articulation is not None
        self.unclear = np.zeros_like(self.talks)
        self.speaker = self._speakers()

    # ---- frame by frame: who speaks

    def _speakers(self) -> Int64[np.ndarray, " f"]:
        """The row of the speaker in each frame, -1 for none. Sets `unclear` where it cannot be decided.

        A person who talks alone is the speaker. A short doubt inside one person's talk is resolved in their favour.
        """
        count: Int64[np.ndarray, " f"] = self.talks.sum(0)
        speaker = np.where(count == 1, self.talks.argmax(0), -1)
        speaker[self._unheard(speaker)] = -1
        for first, stop in true_runs(count > 1):
            for start in range(first, stop, _BLOCK):
                block = slice(start, min(start + _BLOCK, stop))
                rivals = np.flatnonzero(self.talks[:, block].any(1))
                winner = self._winner(rivals, start)
                if winner is None:
                    self.unclear[:, block] = self.talks[:, block]
                else:
                    speaker[block] = winner
        for first, stop in true_runs(self.unclear.max(axis=0)):
            around = speaker[max(first - FPS, 0) : first], speaker[stop : stop + FPS]
            before, after = (part[part >= 0] for part in around)
            if stop - first <= _SHORT_DOUBT_FRAMES and len(before) and len(after) and before[-1] == after[0]:
                speaker[first:stop], self.unclear[:, first:stop] = before[-1], False
        return speaker

    def _unheard(self, alone: Int64[np.ndarray, " f"]) -> Bool[np.ndarray, " f"]:
        """The frames in which the person who talks alone is not the one who is heard.

        alone: the row of the person who talks alone in each frame, -1 for none.
        """
        unheard = np.zeros(len(alone), bool)
        usable = np.isfinite(self.slow_mouth).all(2) & np.isfinite(self.slow_sound).all(1)
        own = {row: np.flatnonzero((alone == row) & usable[row]) for row in range(len(self.tracks))}
        own = {row: frames for row, frames in own.items() if len(frames) >= _LEAST_HEARD}
        if not own or not self.compares:
            return unheard
        others = self.talks.sum(0) - self.talks > 0
        # The frames around, with pauses, in which no other person on screen talks.
        free = {row: np.flatnonzero(usable[row] & ~others[row]) for row in own}
        lag = self._film_lag(own)
        for row, frames in own.items():
            fits = np.ones(len(frames))
            for first in range(0, len(frames), _BLOCK):
                low = int(np.searchsorted(free[row], frames[first])) - _HEARD_WINDOW // 2
                low = max(min(low, len(free[row]) - _HEARD_WINDOW), 0)
                around = free[row][low : low + _HEARD_WINDOW]
                if len(around) >= _LEAST_HEARD:
                    least = HEARD_SYNC - HEARD_NOISE * np.sqrt(_SYNC_NOISE_S * FPS / len(around))
                    fits[first : first + _BLOCK] = self._slow_sync(row, around, lag) >= least
            unheard[frames[mean_around(fits, _HEARD_SMOOTH) < 0.5]] = True
        return unheard

    def _slow_sync(self, row: int, window: Int64[np.ndarray, " w"], lag: int) -> float:
        lags = range(lag + _SYNC_LAGS.start, lag + _SYNC_LAGS.stop)
        return best_match(self.slow_mouth[row], self.slow_sound, window, lags)

    def _film_lag(self, own: Mapping[int, Int64[np.ndarray, " _"]]) -> int:
        """The frames by which the film's sound is late, judged by all people who talk alone; 0 unless it is clear."""
        total = sum(map(len, own.values()))
        matches = {
            lag: sum(
                best_match(self.slow_mouth[row], self.slow_sound, frames, range(lag, lag + 1)) * len(frames)
                for row, frames in own.items()
            )
            / total
            for lag in _FILM_LAGS
        }
        best = max(matches, key=lambda lag: (matches[lag], -abs(lag)))
        near = max(matches[lag] for lag in _SYNC_LAGS)
        return best if matches[best] >= near + _FILM_LAG_MARGIN * np.sqrt(_SYNC_NOISE_S * FPS / total) else 0

    def _winner(self, rivals: Int64[np.ndarray, " k"], frame: int) -> int | None:
        """The row whose mouth matches the sound around a frame; None if that is not clear."""
        if np.isnan(self.mouth[rivals, frame]).any():
            return None
        comparable = self.present[rivals].all(0) & np.isfinite(self.sound_features[:, 0])
        window = np.arange(max(frame - _SYNC_REACH, 0), min(frame + _SYNC_REACH, len(comparable)))
        window = window[comparable[window]]
        sync = np.array([self._sync(int(row), window) for row in rivals])
        noise = np.sqrt(_SYNC_NOISE_S * FPS / max(len(window), FPS))
        best = int(sync.argmax())
        if sync[best] >= SYNC_FLOOR * noise and sync[best] - np.delete(sync, best).max() >= SYNC_MARGIN * noise:
            return int(rivals[best])
        motion = self.motion[rivals, frame]
        strongest = int(motion.argmax())
        others_weak = np.delete(motion, strongest).max() < _WEAK_SHARE * motion[strongest]
        return int(rivals[strongest]) if others_weak and strongest == best else None

    def _sync(self, row: int, window: Int64[np.ndarray, " w"]) -> float:
        return best_match(self.mouth[row], self.sound_features, window, _SYNC_LAGS)

    # ---- from frames to stretches

    def kept(self) -> list[_Part]:
        """The parts in which a person is the speaker, in order of time. No two overlap."""
        cores: list[_Part] = []
        taken = np.zeros(len(self.voice), bool)
        found = [(row, *core) for row in range(len(self.tracks)) for core in self._joined(self.speaker == row, row)]
        # The parts with most talk come first, so that an interjection does not interrupt a stretch.
        for row, first, stop in sorted(
            found, key=lambda core: (-(self.speaker[core[1] : core[2]] == core[0]).sum(), core)
        ):
            for free_first, free_stop in true_runs(~taken[first:stop]):
                own = np.flatnonzero(self.speaker[first + free_first : first + free_stop] == row)
                if len(own):
                    core = _Part(row, first + free_first + int(own[0]), first + free_first + int(own[-1]) + 1)
                    if self._is_talk(core):
                        taken[core.first : core.stop] = True
                        cores.append(core)
        cores.sort(key=lambda core: core.first)
        return self._with_quiet(cores)

    def _joined(self, own: Bool[np.ndarray, " f"], row: int) -> list[tuple[int, int]]:
        """Runs of a person's own frames, joined over pauses and over short rests of the mouth."""
        joined: list[tuple[int, int]] = []
        for first, stop in true_runs(own & self.present[row]):
            if joined:
                gap = self.voice[joined[-1][1] : first]
                if gap.sum() <= STILL_FRAMES and (~gap).sum() <= PAUSE_FRAMES:
                    joined[-1] = (joined[-1][0], stop)
                    continue
            joined.append((first, stop))
        return joined

    def _talk_share(self, part: _Part) -> tuple[int, float]:
        """Frames of talk in a part, and their share of its frames with a voice."""
        voiced = self.voice[part.first : part.stop]
        talk = int((voiced & (self.speaker[part.first : part.stop] == part.row)).sum())
        return talk, talk / max(int(voiced.sum()), 1)

    def _is_talk(self, part: _Part) -> bool:
        frames, share = self._talk_share(part)
        return frames >= MIN_TALK_FRAMES and share >= MIN_TALK_SHARE

    def _with_quiet(self, cores: Sequence[_Part]) -> list[_Part]:
        """The parts, each extended by the quiet around it; a gap between two parts is divided."""
        parts = []
        for i, core in enumerate(cores):
            before = self._room(cores[i - 1], core) if i else (0, QUIET_FRAMES)
            after = self._room(core, cores[i + 1]) if i + 1 < len(cores) else (QUIET_FRAMES, 0)
            first = core.first - self._quiet(core.row, core.first - 1, -1, before[1])
            parts.append(_Part(core.row, first, core.stop + self._quiet(core.row, core.stop, 1, after[0])))
        return parts

    def _room(self, one: _Part, other: _Part) -> tuple[int, int]:
        """How many frames of the gap between two parts the first may take, and the second."""
        gap = other.first - one.stop
        most = QUIET_FRAMES
        if one.row != other.row and self.present[[one.row, other.row], one.stop : other.first].all():
            most = QUIET_AT_TURN_FRAMES
        return min(gap // 2, most), min(gap - gap // 2, most)

    def _quiet(self, row: int, frame: int, step: int, most: int) -> int:
        """How many frames from `frame` on are quiet, up to `most`. A few frames with a voice count as quiet."""
        count = voiced = 0
        while count < most and 0 <= frame < len(self.voice) and self.present[row, frame]:
            voiced += bool(self.voice[frame])
            if voiced > _STILL_AT_END_FRAMES:
                break
            count, frame = count + 1, frame + step
        return count

    def chosen(self, point: tuple[float, float]) -> list[_Part]:
        """The tracks whose faces cover a point; of two at the same time, the one that covers it in more frames."""
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
        """A track's stretches: the kept ones, and the rest with reasons. doubts: whether to use `several_speak`."""
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
        """The parts in which it is unclear whether this person or another speaks, with the quiet around them."""
        cores = []
        for first, stop in self._joined(self.talks[row] & (self.unclear[row] | (self.speaker == row)), row):
            if self.unclear[row, first:stop].any():
                before = self._quiet(row, first - 1, -1, QUIET_FRAMES)
                cores.append(_Part(row, first - before, stop + self._quiet(row, stop, 1, QUIET_FRAMES)))
        return cores
