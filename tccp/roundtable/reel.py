"""Reels: films of several RoundTable scenes joined by hard cuts, like edited footage, with their ground truth.

They serve as raw footage with ground truth, so that tests can check the results of preprocessing frame by frame.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int8, Int32, Int64, UInt8

from tccp.config import FPS, SAMPLES_PER_FRAME
from tccp.errors import TccpError
from tccp.files import atomic_path
from tccp.media import VideoWriter
from tccp.roundtable.film_files import UNREADABLE
from tccp.roundtable.world import RoundTableClip, synthesise

OWN_SOUND, SILENCE, OTHER_SOUND = 0, 1, 2
"""The sound of a frame of a reel: its own talker, silence, or the talker of another, invisible scene."""
MAX_OTHERS = 2


@dataclass(frozen=True)
class Shot:
    """Frames start_frame .. start_frame + num_frames - 1 of the scene `synthesise(seed, ..., person_seed)`.

    Shots with equal seeds show the same room; with equal seeds and given person seeds, also the same other persons.
    Raises TccpError if num_frames is below 1 or start_frame below 0.
    """

    seed: int
    num_frames: int
    person_seed: int | None = None
    start_frame: int = 0

    def __post_init__(self) -> None:
        if self.num_frames < 1 or self.start_frame < 0:
            raise TccpError(
                f"a shot of {self.num_frames} frames from frame {self.start_frame}: give at least 1 frame, from 0 on"
            )

    def scene(self, width: int, height: int) -> RoundTableClip:
        """The scene up to the end of the shot."""
        return synthesise(self.seed, (self.start_frame + self.num_frames) / FPS, width, height, self.person_seed)


@dataclass(frozen=True)
class Dub:
    """Replaces the sound of frames [start_frame, stop_frame) by silence or, with a seed, by that of another scene."""

    start_frame: int
    stop_frame: int
    seed: int | None = None


@dataclass(frozen=True)
class ReelTruth:
    """The ground truth of a reel of f frames in s shots.

    sound_offset_frames: delay of the sound. cuts: first frames of shots 1 .. s - 1. seeds, person_seeds: of the scene
    and the talker of each shot. shot: shot number of each frame. landmarks_px (iBUG order), head_box (x0 y0 x1 y1),
    yaw_deg, mouth_opening: of the talker, as in `Truth`. others_box: NaN for absent persons. sound: OWN_SOUND, SILENCE
    or OTHER_SOUND of each frame, before the offset.
    """

    width: int
    height: int
    sound_offset_frames: int
    cuts: Int64[np.ndarray, " s_minus_1"]
    seeds: Int64[np.ndarray, " s"]
    person_seeds: Int64[np.ndarray, " s"]
    shot: Int32[np.ndarray, " f"]
    landmarks_px: Float32[np.ndarray, "f 68 2"]
    head_box: Float32[np.ndarray, "f 4"]
    others_box: Float32[np.ndarray, "f 2 4"]
    yaw_deg: Float32[np.ndarray, " f"]
    mouth_opening: Float32[np.ndarray, " f"]
    sound: Int8[np.ndarray, " f"]

    @property
    def num_frames(self) -> int:
        return len(self.shot)


def plan_shots(seed: int, seconds: float | int, shot_s: float | int = 5.0, people: int | None = None) -> list[Shot]:
    """Samples shots of about `shot_s` seconds each, with a total of `seconds`.

    people: number of talkers, who take turns; by default each shot has its own talker.
    Raises TccpError if numbers are out of range.
    """
    total = round(seconds * FPS) if math.isfinite(seconds) else 0
    if total < 1 or not (math.isfinite(shot_s) and shot_s * FPS >= 2):
        raise TccpError(
            f"a reel of {seconds} s in shots of {shot_s} s: give at least {1 / FPS} s, and {2 / FPS} s per shot"
        )
    if seed < 0 or (people is not None and people < 1):
        raise TccpError(f"seed {seed}, {people} people: give a seed of at least 0 and at least 1 person")
    count = max(1, round(total / (shot_s * FPS)))
    seeds = np.random.SeedSequence([seed, 1]).generate_state(count, np.uint64) >> 1
    person_seeds = np.random.SeedSequence([seed, 2]).generate_state(people or count, np.uint32)
    even = np.linspace(0, total, count + 1)
    # Borders move by less than a quarter of a shot, so that no shot becomes empty or twice as long.
    shifts = np.random.default_rng([seed, 3]).uniform(-0.2, 0.2, count + 1) * total / count
    edges = np.rint(even + shifts).astype(int)
    edges[[0, -1]] = 0, total
    return [
        Shot(int(seeds[k]), int(stop - start), int(person_seeds[k % len(person_seeds)]))
        for k, (start, stop) in enumerate(itertools.pairwise(edges))
    ]


def pictures(shots: Sequence[Shot], width: int, height: int) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """The pictures of a reel, one at a time."""
    for shot in shots:
        scene = shot.scene(width, height)
        for frame in range(shot.start_frame, scene.num_frames):
            yield scene.render(frame)


def write_reel(
    path: str | Path,
    shots: Sequence[Shot],
    width: int = 640,
    height: int = 480,
    sound_offset_frames: int = 0,
    dubs: Sequence[Dub] = (),
    lossless: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> ReelTruth:
    """Writes one film of the shots in their order, with sound, and its ground truth beside it (`read_reel_truth`).

    sound_offset_frames: delay of the sound in frames (negative: early); the gap is silent. dubs: frames with another
    sound; later dubs replace earlier ones. progress: called with (name, frames done, frames in all).
    Keeps one scene in memory at a time. Equal arguments give equal films.
    Raises TccpError if there is no shot, numbers are out of range or the film cannot be written.
    """
    path, total = Path(path), sum(shot.num_frames for shot in shots)
    if not shots:
        raise TccpError(f"{path}: no shot was given; a reel needs at least one")
    for dub in dubs:
        if not 0 <= dub.start_frame < dub.stop_frame <= total:
            raise TccpError(
                f"{path}: cannot dub frames {dub.start_frame} to {dub.stop_frame}; the reel has 0 to {total}"
            )
    with tempfile.TemporaryFile() as file:  # the writer needs all sound at the start: 4 MiB a minute, kept on disk
        audio = np.memmap(file, np.float32, "w+", shape=(total * SAMPLES_PER_FRAME,))
        truth = _truth(shots, width, height, sound_offset_frames, dubs, audio)
        with atomic_path(reel_truth_path(path)) as partial, partial.open("wb") as out:
            np.savez_compressed(out, **{field.name: np.asarray(getattr(truth, field.name)) for field in fields(truth)})  # type: ignore[arg-type]
        with VideoWriter(path, width, height, audio_from=audio, lossless=lossless) as film:
            for done, picture in enumerate(pictures(shots, width, height), start=1):
                film.write(picture)
                if progress is not None:
                    progress(path.name, done, total)
    return truth


def _truth(
    shots: Sequence[Shot],
    width: int,
    height: int,
    sound_offset_frames: int,
    dubs: Sequence[Dub],
    audio: Float32[np.ndarray, " samples"],
) -> ReelTruth:
    """The ground truth of a reel. Also writes its sound into `audio`, which is silent before."""
    edges = np.cumsum([0, *(shot.num_frames for shot in shots)])
    total = int(edges[-1])
    truth = ReelTruth(
        width=width,
        height=height,
        sound_offset_frames=sound_offset_frames,
        cuts=edges[1:-1].astype(np.int64),
        seeds=np.array([shot.seed for shot in shots], np.int64),
        person_seeds=np.zeros(len(shots), np.int64),
        shot=np.repeat(np.arange(len(shots), dtype=np.int32), np.diff(edges)),
        landmarks_px=np.zeros((total, 68, 2), np.float32),
        head_box=np.zeros((total, 4), np.float32),
        others_box=np.full((total, MAX_OTHERS, 4), np.nan, np.float32),
        yaw_deg=np.zeros(total, np.float32),
        mouth_opening=np.zeros(total, np.float32),
        sound=np.full(total, OWN_SOUND, np.int8),
    )
    for dub in dubs:
        truth.sound[dub.start_frame : dub.stop_frame] = SILENCE if dub.seed is None else OTHER_SOUND

    def add_sound(start_frame: int, samples: Float32[np.ndarray, " n"]) -> None:
        """Writes sound from the picture's frame `start_frame` on, shifted by the offset and cut at both ends."""
        first = (start_frame + sound_offset_frames) * SAMPLES_PER_FRAME
        low, high = max(first, 0), min(first + len(samples), len(audio))
        if low < high:
            audio[low:high] = samples[low - first : high - first]

    for k, (shot, start) in enumerate(zip(shots, map(int, edges), strict=False)):
        scene = shot.scene(width, height)
        of_reel, of_scene = slice(start, start + shot.num_frames), slice(shot.start_frame, scene.num_frames)
        truth.person_seeds[k] = scene.person_seed
        for name in ("landmarks_px", "head_box", "yaw_deg", "mouth_opening"):
            getattr(truth, name)[of_reel] = getattr(scene, name)[of_scene]
        others = scene.others_box[of_scene]
        truth.others_box[of_reel, : others.shape[1]] = others
        add_sound(start, scene.audio[shot.start_frame * SAMPLES_PER_FRAME :])
    for dub in dubs:
        num_frames = dub.stop_frame - dub.start_frame
        silent = np.zeros(num_frames * SAMPLES_PER_FRAME, np.float32)
        add_sound(dub.start_frame, silent if dub.seed is None else synthesise(dub.seed, num_frames / FPS).audio)
    return truth


def reel_truth_path(film: str | Path) -> Path:
    """The path of a reel's ground truth: `<name>.reel.npz` beside it."""
    return Path(film).with_suffix(".reel.npz")


def read_reel_truth(film: str | Path) -> ReelTruth:
    """The ground truth of a reel. Raises TccpError if its file does not exist or cannot be read."""
    source = reel_truth_path(film)
    if not source.is_file():
        raise TccpError(f"{source}: no such truth file; write_reel writes one beside every reel")
    try:
        with np.load(source, allow_pickle=False) as stored:
            values = {field.name: stored[field.name] for field in fields(ReelTruth)}
    except (*UNREADABLE, KeyError) as error:
        raise TccpError(f"{source}: not the truth of a reel ({error}): write the reel again") from None
    return ReelTruth(**{name: int(value) if value.ndim == 0 else value for name, value in values.items()})  # type: ignore[arg-type]
