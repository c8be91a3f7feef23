"""What one process of an evaluation does: draws clips, has every row make them, reads and judges them.

Only numbers leave it: figures, and the probe's vectors for figures of all clips together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from tccp.evaluation import benchmark_clips as of
from tccp.evaluation.benchmark_clips import EvaluationClip, in_mid_speech, make_clip
from tccp.evaluation.face_probe import embed_identity, read_faces
from tccp.evaluation.figures import (
    Drift,
    Shown,
    clip_figures,
    drift_figures,
    faces_acted,
    landmarks_acted,
    listener_slope,
)
from tccp.evaluation.methods import ROWS, Models, Shard, composed, other_index
from tccp.evaluation.predictors import Cue, cue_figures, mean_face
from tccp.evaluation.sheet import SheetClip, sheet_clip

DRIFT_AT = (10, 50)
"""Windows that are compared with a chain's first."""
DRIFT_ROWS = ("two_stage_truth", "two_stage_generated", "one_stage", "per_frame")
"""per_frame is the control: its faces are no chain, though its landmarks are. What it loses is stage 1's drift, and
what later windows are harder by; what the others lose beyond that is the chain of faces."""
_REFERENCE_CHAINS = 0.1  # drawing and reading a true clip, as part of what a stage takes to make one: for the ETA


@dataclass
class RowOfClip:
    """What is kept of a row's clip: its figures, and what figures of all clips together are made of."""

    figures: dict[str, float]
    identity: Float32[np.ndarray, "f d"] | None = None
    features: Float32[np.ndarray, "f k"] | None = None


@dataclass
class HeldOut:
    """One held-out clip. identity: the probe's vector of its identity picture."""

    rows: dict[str, RowOfClip]
    identity: Float32[np.ndarray, " d"]
    sheet: SheetClip | None = None


@dataclass(frozen=True)
class Reference:
    """A true clip that nothing but a distance and a choice of persons is made of."""

    identity: Float32[np.ndarray, " d"]
    features: Float32[np.ndarray, "f k"]


@dataclass(frozen=True)
class Worker:
    """What one process does. tick: called with the work done since, in frames that a stage makes."""

    models: Models
    tick: Callable[[float], object]

    def held_out(
        self,
        numbered: Sequence[tuple[int, int]],
        num_frames: int,
        forests: Mapping[Cue, Any],
        on_sheet: Sequence[int],
    ) -> list[HeldOut]:
        """Every row of clips that are given by number and seed. on_sheet: numbers of clips that the sheet shows."""
        settings = self.models.pipeline.settings
        clips = [make_clip(seed, num_frames, settings) for _, seed in numbered]
        shard = Shard(self.models, clips, self.tick)
        truths = shard.truth()
        identities = embed_identity(self.models.probe, np.stack([clip.identity for clip in clips]))
        done = [HeldOut({}, identity) for identity in identities]
        others = [in_mid_speech(clips[other_index(i, len(clips))]) for i in range(len(clips))]

        def keep(row: str, shown: Sequence[Shown]) -> None:
            for i, one in enumerate(shown):
                done[i].rows[row] = _kept(clip_figures(clips[i], one, truths[i], others[i]), one)

        keep("truth", truths)
        for name, row in ROWS.items():
            if name not in self.models.missing:
                made = row.make(shard)
                shown = shard.shown(made)
                keep(name, shown)
                for i, (number, _) in enumerate(numbered):
                    if name == "two_stage_generated" and number in on_sheet:
                        assert made.marks is not None
                        marks = shard.decode(made.marks[i], "landmark")
                        done[i].sheet = sheet_clip(number, clips[i], shown[i], marks, done[i].rows[name].figures)
        mean = mean_face(settings.picture_px)
        points, faces = np.stack([mean.points] * num_frames), np.stack([mean.face] * num_frames)
        keep("mean", [composed(self.models.probe, clip, faces, points) for clip in clips])
        for cue, forest in forests.items():
            for result, clip in zip(done, clips, strict=True):
                result.rows[cue] = RowOfClip(cue_figures(cue, forest, clip))
        return done

    def reference(self, seeds: Sequence[int], num_frames: int) -> list[Reference]:
        """True faces of other clips."""
        done = []
        for seed in seeds:
            clip = make_clip(seed, num_frames, self.models.pipeline.settings)
            identity = embed_identity(self.models.probe, clip.identity[None])[0]
            done.append(Reference(identity, read_faces(self.models.probe, clip.faces).features))
            self.tick(_REFERENCE_CHAINS * num_frames)
        return done

    def drift(self, seeds: Sequence[int], num_frames: int) -> list[dict[str, Drift]]:
        """Long chains: the rows of DRIFT_ROWS. Of landmarks only the windows that are compared are read.

        They begin in mid-speech, for the first window to be no easier than those it is compared with.
        """
        settings = self.models.pipeline.settings
        clips = [make_clip(seed, num_frames, settings, of.MID_SPEECH_FRAME) for seed in seeds]
        shard = Shard(self.models, clips, self.tick)
        new = settings.window - 1
        frames = [i for k in (1, *DRIFT_AT) for i in range((k - 1) * new + 1, k * new + 1) if k * new < num_frames]
        done: list[dict[str, Drift]] = [{} for _ in seeds]
        for row in DRIFT_ROWS:
            if row in self.models.missing:
                continue
            made = ROWS[row].make(shard)
            for k, clip in enumerate(shard.clips):
                faces = shard.decode(made.faces[k], "face")
                points = None if made.marks is None else shard.read_points(made.marks[k], frames)
                shown = Shown(points, faces, read_faces(self.models.probe, faces))
                done[k][row] = drift_figures(clip, shown, Shown(faces=clip.faces), settings.window, DRIFT_AT)
        return done

    def counterfactual(self, seeds: Sequence[int]) -> list[dict[str, dict[str, float]]]:
        """Slope of the generated yaw over the true one when nothing but the listener moves, per row and clip."""
        settings, models = self.models.pipeline.settings, self.models
        bearings, frames = of.COUNTERFACTUAL_DEG, of.COUNTERFACTUAL_FRAMES
        clips = [make_clip(seed, frames, settings, listener_deg=at) for seed in seeds for at in bearings]
        shard = Shard(models, clips, self.tick)
        shown: dict[str, list[Shown]] = {"truth": shard.truth()}
        marks = {"two_stage_generated": shard.landmark_latents}
        if "context_blind" in models.ablations:
            marks["context_blind"] = shard.stage_one(models.ablations["context_blind"], clips)
        for row, latents in marks.items():
            shown[row] = [Shown(points=shard.read_points(one)) for one in latents]
        if "one_stage" in models.ablations:
            faces = [shard.decode(one, "face") for one in ROWS["one_stage"].make(shard).faces]
            shown["one_stage"] = [Shown(faces=one, reading=read_faces(models.probe, one)) for one in faces]
        done: list[dict[str, dict[str, float]]] = []
        for k in range(0, len(clips), len(bearings)):
            part = slice(k, k + len(bearings))
            done.append({row: _slopes(clips[part], of_row[part]) for row, of_row in shown.items()})
        return done


def _kept(figures: dict[str, float], shown: Shown) -> RowOfClip:
    if shown.reading is None:
        return RowOfClip(figures)
    return RowOfClip(figures, shown.reading.identity, shown.reading.features)


def _slopes(clips: Sequence[EvaluationClip], shown: Sequence[Shown]) -> dict[str, float]:
    slopes = {}
    for name, acted_of in (("listener_slope", landmarks_acted), ("listener_slope_face", faces_acted)):
        acted = [acted_of(clip, one) for clip, one in zip(clips, shown, strict=True)]
        known = [one for one in acted if one is not None]
        if known:
            pairs = [(float(one.yaw_deg.mean()), float(one.true_yaw_deg.mean())) for one in known]
            generated, true = np.array(pairs).T
            slopes[name] = listener_slope(generated, true)
    return slopes


def held_out_work(models: Models) -> int:
    """Ticks of a frame of a held-out clip; of other clips below."""
    return sum(row.chains for name, row in ROWS.items() if name not in models.missing)


def reference_work() -> float:
    return _REFERENCE_CHAINS


def drift_work(models: Models) -> int:
    return sum(ROWS[row].chains for row in DRIFT_ROWS if row not in models.missing)


def counterfactual_work(models: Models) -> int:
    """Of a whole clip, at all bearings."""
    chains = 1 + sum(name in models.ablations for name in ("context_blind", "one_stage"))
    return chains * of.COUNTERFACTUAL_FRAMES * len(of.COUNTERFACTUAL_DEG)
