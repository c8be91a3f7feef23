"""Selects the clips of a reel from its faces and sound, and gives a reason for every frame that is in no clip."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from preprocessing.analysis import av_offset as sync
from preprocessing.analysis import persons, quality
from preprocessing.analysis.cut import cut_clips
from preprocessing.analysis.face_tracks import find_tracks, numbered, part_of
from preprocessing.analysis.identity import Sighting, sightings_of
from preprocessing.analysis.speakers import Stretch, score_track, speaking_stretches
from preprocessing.analysis.voice_activity import articulation, voice_activity
from preprocessing.plan import Plan, detector_of
from preprocessing.reasons import FRAME_REASONS, RANK, set_aside
from preprocessing.reels import Reel, Track
from preprocessing.report.record import TrackSample
from preprocessing.spans import Span
from tccp.clips.clip_table import AUDIO_CONTEXT_FRAMES, audio_context_start
from tccp.config import FPS, SAMPLES_PER_FRAME
from tccp.errors import DamagedData
from tccp.files import redacted
from tccp.headbox import head_boxes, visible_share
from tccp.landmarks import smooth
from tccp.media import MediaError
from tccp.media.remote import local_copy
from tccp.sequences import true_runs

SAMPLE_TRACKS = 4
"""Most tracks per reel, for the report's sample, that are in clips, and most of the others."""


class Networks:
    """The optional networks of a plan, loaded at first use."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._loaded: dict[str, Any] = {}
        self._references: dict[str, Float32[np.ndarray, " d"]] = {}

    def _load(self, name: str) -> Any:
        path = self._plan.weights.get(name)
        if path is not None and name not in self._loaded:
            self._loaded[name] = _LOADERS[name](path)
        return self._loaded.get(name)

    @property
    def embedder(self) -> persons.FaceEmbedder | None:
        return self._load("sface")

    @property
    def light_asd(self) -> Any:
        return self._load("light-asd")

    @property
    def syncnet(self) -> Any:
        return self._load("syncnet")

    def references(self, pictures: Sequence[str]) -> list[Float32[np.ndarray, " d"]]:
        """Embeddings of the faces in pictures (paths or URLs) of the requested person. Raises DamagedData."""
        embedder = self.embedder
        if embedder is None:
            return []  # `persons.matches` raises the error
        missing = [picture for picture in pictures if picture not in self._references]
        if missing:
            with contextlib.closing(detector_of(self._plan)) as detector:
                for picture in missing:
                    with local_copy(picture) as path:
                        self._references[picture] = embedder.embed_reference(path, detector, redacted(picture))
        return [self._references[picture] for picture in pictures]

    @property
    def vad(self) -> Path | None:
        return self._plan.weights.get("silero-vad")


@dataclass(frozen=True, eq=False)
class Selection:
    """spans: cover the reel's frames exactly once; spans without a reason are clips. samples: for the report."""

    spans: list[Span]
    samples: list[TrackSample]


def select(reel: Reel, plan: Plan, networks: Networks) -> Selection:
    """The clips of a reel, and the reasons of all other frames.

    Raises MediaError `bad_person` if the source's own picture of the requested person cannot be used.
    """
    if reel.span.reason is not None:
        return Selection([reel.span], [])
    assert reel.faces is not None and reel.sound is not None, "select needs a reel whose faces have been detected"
    outcome = _Outcome(reel)
    if plan.backend == "truth":
        _cut_truth(reel, plan, outcome)
    else:
        _TrackSelection(reel, plan, networks, outcome).select_clips()
    return Selection(outcome.spans(), outcome.samples)


class _Outcome:
    """The clips of a reel, and the reason of every other frame: the highest-ranking of the reasons given for it."""

    def __init__(self, reel: Reel) -> None:
        self.reel = reel
        first, count = reel.span.start_frame, reel.span.num_frames
        at = np.arange(first, first + count)
        self._rank = np.full(count, RANK["no_face"])
        self._rank[at < reel.usable[0]] = RANK["before_video"]
        self._rank[at >= reel.usable[1]] = RANK["after_audio"]
        self._in_clip = np.zeros(count, bool)
        self.clips: list[Span] = []
        self.samples: list[TrackSample] = []

    def reject(self, start_frame: int, stop_frame: int, reason: str) -> None:
        """Adds a reason for the frames [start_frame, stop_frame)."""
        part = slice(start_frame - self.reel.span.start_frame, stop_frame - self.reel.span.start_frame)
        self._rank[part] = np.maximum(self._rank[part], RANK[reason])

    def main_reason(self, track: Track) -> str:
        """The most frequent reason of a track's frames."""
        first = self.reel.span.start_frame
        ranks = self._rank[track.start_frame - first : track.stop_frame - first]
        return FRAME_REASONS[int(np.bincount(ranks).argmax())]

    def keep(self, clip: Span) -> None:
        """Adds a clip."""
        part = slice(clip.start_frame - self.reel.span.start_frame, clip.stop_frame - self.reel.span.start_frame)
        assert not self._in_clip[part].any(), "clips do not overlap: there is one speaker at a time"
        self._in_clip[part] = True
        self.clips.append(clip)

    def spans(self) -> list[Span]:
        """The clips in order of time, then the spans that are left out, in order of time."""
        span = self.reel.span
        left_out = []
        states = np.where(self._in_clip, -1, self._rank)
        start = span.start_frame
        for state, group in groupby(states.tolist()):
            stop = start + len(list(group))
            if state >= 0:
                left_out.append(set_aside(span.cut(start, stop), FRAME_REASONS[state]))
            start = stop
        return sorted(self.clips, key=lambda clip: clip.start_frame) + left_out


def _cut_truth(reel: Reel, plan: Plan, outcome: _Outcome) -> None:
    assert reel.faces is not None and reel.head_box is not None
    if reel.start_frame == reel.stop_frame:
        return
    span = replace(
        reel.span.cut(reel.start_frame, reel.stop_frame),
        track=0,
        person=0,
        landmarks_px=reel.faces.landmarks,
        confidence=reel.faces.confidence,
        head_box=reel.head_box,
        provenance=plan.provenance,
    )
    _cut(span, [], plan, outcome, reel, 0)


def _cut(span: Span, sightings: Sequence[Sighting], plan: Plan, outcome: _Outcome, reel: Reel, shift: int) -> int:
    """Cuts a span into clips with their sound, adds them to the outcome, and returns their number of frames.

    shift: samples by which the sound of the film is late.
    """
    frames = 0
    for part in cut_clips(span, sightings, plan.max_clip_s, plan.min_clip_s):
        reason = part.reason or _bound_reason(part, plan)
        if reason is None:
            outcome.keep(_with_sound(part, reel, shift))
            frames += part.num_frames
        else:
            outcome.reject(part.start_frame, part.stop_frame, reason)
    return frames


def _bound_reason(clip: Span, plan: Plan) -> str | None:
    """The reason of the first violated bound on figures of a whole clip; None if there is none."""
    assert clip.confidence is not None and clip.head_box is not None
    assert clip.width is not None and clip.height is not None
    visible = float(visible_share(clip.head_box, clip.width, clip.height).mean())
    return plan.bounds.reason({"bridged": quality.bridged_share(clip.confidence), "visible": visible})


def _with_sound(clip: Span, reel: Reel, shift: int) -> Span:
    """The clip with its own sound and the sound before and after it."""
    sound = reel.sound
    assert sound is not None
    before = sound.between(audio_context_start(clip.start_frame), clip.start_frame, shift)
    own = sound.between(clip.start_frame, clip.stop_frame, shift)
    stop_sample = max((clip.stop_frame - sound.start_frame) * SAMPLES_PER_FRAME + shift, 0)
    after = sound.pcm[stop_sample : stop_sample + AUDIO_CONTEXT_FRAMES * SAMPLES_PER_FRAME]  # not padded
    return replace(clip, audio_before=before.tobytes(), audio=own.tobytes(), audio_after=after.tobytes())


class _TrackSelection:
    """Selects clips from the tracks of a reel whose faces were found by a detector."""

    def __init__(self, reel: Reel, plan: Plan, networks: Networks, outcome: _Outcome) -> None:
        self.reel, self.plan, self.networks, self.outcome = reel, plan, networks, outcome
        self.tracks = self._without_switches(find_tracks(reel))
        self.persons = persons.group(self.tracks, networks.embedder)
        self._bounds = plan.bounds
        self._occlusion = [quality.occlusion(track) for track in self.tracks]
        self._speaking: dict[int, float] = {}  # track number to the best score of its stretches

    def _without_switches(self, tracks: Sequence[Track]) -> list[Track]:
        """The tracks, cut where another person begins, and numbered anew."""
        parts: list[Track] = []
        for track in tracks:
            edges = [track.start_frame, *persons.switches(track, self.networks.embedder), track.stop_frame]
            parts += [part_of(track, first, stop) for first, stop in pairwise(edges)]
        return [numbered(track, number) for number, track in enumerate(parts)]

    def select_clips(self) -> None:
        """Adds clips, reasons and samples to the outcome."""
        for track in self.tracks:  # the lowest-ranking reason of a frame with a face
            self.outcome.reject(track.start_frame, track.stop_frame, "not_speaking")
        requested = self._requested()
        boxes = [head_boxes(track.landmarks, track.confidence) if _has_points(track) else None for track in self.tracks]
        kept = self._kept_stretches()
        offsets = {number: self._offset(number, kept) for number in {stretch.track for stretch in kept}}
        sightings: dict[int, list[Sighting]] = {}  # by person
        for track, box, occlusion in zip(self.tracks, boxes, self._occlusion, strict=True):
            if box is not None:
                uncovered = _is_uncovered(occlusion, self._bounds.max_occlusion)
                sightings.setdefault(self.persons[track.number], []).extend(sightings_of(track, box, uncovered))
        in_clips = dict.fromkeys(range(len(self.tracks)), 0)
        for stretch in kept:
            number, start, stop = stretch.track, stretch.start_frame, stretch.stop_frame
            track, box = self.tracks[number], boxes[number]
            if not requested[number]:
                self.outcome.reject(start, stop, "other_person")
                continue
            if box is None:
                self.outcome.reject(start, stop, "no_face")
                continue
            for first, end in self._good_parts(track, start, stop):
                span = self._annotated(track, box, first, end, offsets[number])
                span = replace(span, speaking_score=stretch.score if self.plan.speakers == "active" else None)
                shift = sync.correction_frames(offsets[number]) * SAMPLES_PER_FRAME
                seen = sightings.get(self.persons[number], [])
                in_clips[number] += _cut(span, seen, self.plan, self.outcome, self.reel, shift)
        self._add_samples(in_clips)

    def _requested(self) -> list[bool]:
        """Whether each track shows the requested person; true for all tracks if no person is requested."""
        pictures = self.plan.person_pictures
        own = self.reel.span.person_picture
        if own is not None:
            pictures = (own,)
        if not pictures:
            return [True] * len(self.tracks)
        try:
            references = self.networks.references(pictures)
        except DamagedData as error:
            if own is None:
                raise
            raise MediaError(redacted(own), "bad_person", str(error)) from None
        return persons.matches(self.tracks, references, self.networks.embedder)

    def _kept_stretches(self) -> list[Stretch]:
        """The stretches in which a person speaks. Adds the reasons of the other stretches to the outcome."""
        if self.plan.speakers == "main":
            return self._main_stretches()
        reel, span = self.reel, self.reel.span
        assert reel.sound is not None
        first, count = reel.start_frame, reel.stop_frame - reel.start_frame
        voice = voice_activity(reel.sound, first, count, self.networks.vad)
        choose = None
        if span.speaker_x is not None and span.speaker_y is not None:
            choose = (span.speaker_x, span.speaker_y)
        kept = []
        sound_features = articulation(reel.sound, first, count)
        for stretch in speaking_stretches(self.tracks, voice, first, self._asd_scores(), choose, sound_features):
            self._speaking[stretch.track] = max(stretch.score, self._speaking.get(stretch.track, 0.0))
            if stretch.reason is None:
                kept.append(stretch)
            else:
                self.outcome.reject(stretch.start_frame, stretch.stop_frame, stretch.reason)
        return kept

    def _main_stretches(self) -> list[Stretch]:
        """For each shot, the tracks of the person with the largest sum of face sizes over its frames."""
        kept = []
        for _, group in groupby(self.tracks, key=lambda track: track.shot):
            weight: dict[int, float] = {}
            tracks = list(group)
            for track in tracks:
                sides = np.sqrt(np.maximum(np.prod(track.box[:, 2:] - track.box[:, :2], axis=1), 0))
                person = self.persons[track.number]
                weight[person] = weight.get(person, 0.0) + float(sides.sum())
            main = max(weight, key=lambda person: (weight[person], -person))
            own = [track for track in tracks if self.persons[track.number] == main]
            kept += [Stretch(track.number, track.start_frame, track.stop_frame, None) for track in own]
        return kept

    def _asd_scores(self) -> Mapping[int, Float32[np.ndarray, " f"]] | None:
        if "light-asd" not in self.plan.weights:
            return None
        assert self.reel.sound is not None
        return {
            track.number: score_track(self.networks.light_asd, track, self.reel.sound)
            for track in self.tracks
            if track.chips
        }

    def _offset(self, number: int, kept: Sequence[Stretch]) -> sync.Offset:
        assert self.reel.sound is not None
        speaking = [(s.start_frame, s.stop_frame) for s in kept if s.track == number]
        return sync.av_offset(self.tracks[number], self.reel.sound, speaking, self.networks.syncnet)

    def _good_parts(self, track: Track, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of [start, stop) that keep the bounds on quality. Adds the reasons of the rest to the outcome."""
        part = part_of(track, start, stop)
        reason = self._bounds.reason(
            {
                "face_px": quality.face_px(part.landmarks),
                "yaw_deg": quality.median_yaw_deg(part.landmarks),
                "jitter": quality.jitter(part),
            }
        )
        if reason is not None:
            self.outcome.reject(start, stop, reason)
            return []
        occlusion = self._occlusion[track.number][start - track.start_frame : stop - track.start_frame]
        uncovered = _is_uncovered(occlusion, self._bounds.max_occlusion)
        for first, end in true_runs(~uncovered):
            self.outcome.reject(start + first, start + end, "occluded")
        good = []
        for first, end in true_runs(uncovered):
            parts = quality.with_few_bridged(part.confidence[first:end], self._bounds.max_bridged)
            good += [(start + first + one, start + first + other) for one, other in parts]
            kept = np.zeros(end - first, bool)
            for one, other in parts:
                kept[one:other] = True
            for one, other in true_runs(~kept):
                self.outcome.reject(start + first + one, start + first + other, "bridged")
        return good

    def _annotated(
        self, track: Track, box: Float32[np.ndarray, "f 4"], start: int, stop: int, offset: sync.Offset
    ) -> Span:
        """The span of the frames [start, stop) of a track, with its landmarks, head boxes and figures."""
        rows = slice(start - track.start_frame, stop - track.start_frame)
        points = smooth(track.landmarks).astype(np.float32)
        return replace(
            self.reel.span.cut(start, stop),
            track=track.number,
            person=self.persons[track.number],
            landmarks_px=points[rows],
            confidence=track.confidence[rows],
            head_box=box[rows],
            av_offset_frames=offset.frames,
            av_corrected=sync.correction_frames(offset) != 0,
            sync_confidence=offset.confidence,
            occlusion=float(self._occlusion[track.number][rows].max(initial=0.0)),
            jitter=quality.jitter(part_of(track, start, stop)),
            provenance=self.plan.provenance,
        )

    def _add_samples(self, in_clips: Mapping[int, int]) -> None:
        """Adds evenly spaced tracks to the report's sample: some with clips, some without."""
        for kept in (True, False):
            tracks = [track for track in self.tracks if (in_clips[track.number] > 0) == kept]
            count = min(len(tracks), SAMPLE_TRACKS)
            for track in (tracks[(2 * i + 1) * len(tracks) // (2 * count)] for i in range(count)):
                reason = None if kept else self.outcome.main_reason(track)
                self.outcome.samples.append(self._sample(track, kept, reason))

    def _sample(self, track: Track, kept: bool, reason: str | None) -> TrackSample:
        frames = sorted(track.chips)
        figures: dict[str, float] = {}
        if _has_points(track):
            figures["face_px"] = quality.face_px(track.landmarks)
            figures["yaw_deg"] = quality.median_yaw_deg(track.landmarks)
            figures["jitter"] = quality.jitter(track)
            figures["occlusion"] = float(self._occlusion[track.number].max(initial=0.0))
        if track.number in self._speaking:
            figures["speaking"] = self._speaking[track.number]
        return TrackSample(
            source=self.reel.span.source,
            track=track.number,
            start_s=track.start_frame / FPS,
            stop_s=track.stop_frame / FPS,
            kept=kept,
            reason=reason,
            jpeg=track.chips[frames[len(frames) // 2]] if frames else b"",
            figures={name: round(value, 3) for name, value in figures.items()},
        )


def _is_uncovered(occlusion: Float32[np.ndarray, " f"], bound: float | None) -> Bool[np.ndarray, " f"]:
    return np.ones(len(occlusion), bool) if bound is None else occlusion <= bound


def _has_points(track: Track) -> bool:
    return bool(np.isfinite(track.landmarks).all())


def _load_sface(path: Path) -> persons.FaceEmbedder:
    return persons.FaceEmbedder(path)


def _load_light_asd(path: Path) -> Any:
    from tccp.models.light_asd import load_light_asd

    return load_light_asd(path)


def _load_syncnet(path: Path) -> Any:
    from tccp.models.syncnet import load_syncnet

    return load_syncnet(path)


_LOADERS = {"sface": _load_sface, "light-asd": _load_light_asd, "syncnet": _load_syncnet}
