"""The shared clips in one run: every file is kept, or set aside for the reason that its description gives.

`make soak` runs all of them, the normal suite only the fast ones.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import ROOT

from preprocessing.report.record import RunReport, SourceReport
from tccp.clips.clip_table import Clip, ClipTable
from tccp.config import SAMPLES_PER_FRAME
from tccp.media import VideoWriter, open_audio, read_frames

pytestmark = pytest.mark.slow
LONG = {"latentsync_demo1.mp4", "latentsync_demo2.mp4", "fps_50.mp4", "fps_59.94.mp4"}
"""High-resolution clips, which would take half of the time."""


@pytest.fixture(scope="module", params=["quick", pytest.param("all", marks=pytest.mark.soak)])
def run(
    request: pytest.FixtureRequest,
    shared_clips: Path,
    shared_weights: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[RunReport, Path]:
    """Speakers by lips alone: Light-ASD would take longer than all other steps and gives the same result.

    Runs in a subprocess, as for users: run-time type checks would double the time.
    """
    folder = tmp_path_factory.mktemp("clips")
    films = folder / "films"
    films.mkdir()
    for path in shared_clips.iterdir():
        if path.suffix != ".md" and (request.param == "all" or path.name not in LONG):
            (films / path.name).symlink_to(path)
    # The clip of a signer with a face printed on his shirt has no audio. Dubbed with speech, it must give no clip.
    pictures = read_frames(shared_clips / "intel_asl_again.mkv")
    with (
        open_audio(shared_clips / "grid_bbaf2n.mpg") as sound,
        VideoWriter(
            films / "signer_with_speech.mp4", 640, 480, audio_from=np.array(sound.samples[: 65 * SAMPLES_PER_FRAME])
        ) as film,
    ):
        for picture in pictures:
            film.write(picture)
    manifest = folder / "films.csv"
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([["path", "source"], *([path, path.name] for path in sorted(films.iterdir()))])
    out = folder / "out"
    command = [sys.executable, "-m", "tccp.cli", "preprocess", manifest, out]
    command += ["--weights", shared_weights / "face_landmarker.task"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=1200)
    return RunReport.from_json((out / "report.json").read_bytes()), out


@pytest.fixture(scope="module")
def sources(run: tuple[RunReport, Path]) -> dict[str, SourceReport]:
    return {source.source: source for source in run[0].sources}


@pytest.fixture(scope="module")
def clips(run: tuple[RunReport, Path]) -> dict[str, list[Clip]]:
    found: dict[str, list[Clip]] = {}
    with ClipTable(run[1]) as table:
        for clip in table:
            found.setdefault(clip.source, []).append(clip)
    return found


SET_ASIDE = {
    "audio_only.m4a": "no_video",
    "no_audio.mp4": "no_audio",
    "intel_asl_again.mkv": "no_audio",
    "intel_asl_book.mkv": "no_audio",
    "corrupt_empty.mp4": "empty_file",
    "corrupt_text.mp4": "not_media",
    "corrupt_truncated_no_moov.mp4": "no_index",
    "corrupt_truncated_faststart.mp4": "truncated",
    "corrupt_bitflips.mp4": "corrupt",
    "moviepy_chaplin.mp4": "no_face",
    "nasa_13013.mp4": "no_face",
    "two_person_overlap.mp4": "several_speak",
    "signer_with_speech.mp4": "not_speaking",
}


def test_every_file_is_kept_or_set_aside_for_the_right_reason(
    sources: dict[str, SourceReport], request: pytest.FixtureRequest
) -> None:
    left_out = set() if request.node.callspec.params["run"] == "all" else LONG
    assert len(sources) == 32 - len(left_out) and not left_out & sources.keys()
    reasons = {name: source.reason for name, source in sources.items() if source.reason is not None}
    for name in ("moviepy_chaplin.mp4", "nasa_13013.mp4", "signer_with_speech.mp4"):
        assert sources[name].clips == 0
        assert reasons.pop(name) in {"no_face", "not_speaking"}
    expected = {name: reason for name, reason in SET_ASIDE.items() if name in reasons}
    assert reasons == expected and len(expected) >= 10
    for source in sources.values():
        assert source.frames == source.frames_in_clips + sum(source.left_out.values())


LEAST_FRAMES = {
    "latentsync_demo1.mp4": 225,
    "latentsync_demo2.mp4": 450,
    **{f"grid_{name}.mpg": 70 for name in ("bbaf2n", "brbk7n", "lwbsza")},
    **{f"fps_{rate}.mp4": 90 for rate in ("29.97", "50", "59.94")},
    "vfr.mp4": 90,
    "rotate_tag.mp4": 90,
    "audio_short_2s.mp4": 45,
    "lowres_180x320.mp4": 60,
    "hard_cut.mp4": 125,
    "two_person_turns.mp4": 120,
    "face_gap.mp4": 85,
}


def test_speaking_people_are_kept(sources: dict[str, SourceReport]) -> None:
    kept = {name: sources[name].frames_in_clips for name in LEAST_FRAMES.keys() & sources.keys()}
    assert LEAST_FRAMES.keys() - kept.keys() <= LONG
    assert not {name: frames for name, frames in kept.items() if frames < LEAST_FRAMES[name]}


def test_clips_show_the_current_speaker_of_two_people(clips: dict[str, list[Clip]]) -> None:
    for clip in clips["two_person_turns.mp4"]:
        middle = clip.start_s + clip.num_frames / 50
        centre = (clip.head_box[:, 0] + clip.head_box[:, 2]).mean() / 2
        assert (centre < 360) == (middle < 2.96)


def test_no_clip_spans_a_cut_or_a_face_gap(clips: dict[str, list[Clip]]) -> None:
    cuts = {"hard_cut.mp4": [73], "short_hamilton_clip.mp4": [22 + 17, 22 + 68, 22 + 175]}
    for name, frames in cuts.items():
        for clip in clips.get(name, []):
            for cut in frames:
                assert not clip.start_frame + 3 < cut < clip.start_frame + clip.num_frames - 3
    for clip in clips["hard_cut.mp4"]:
        assert not clip.start_frame < 73 < clip.start_frame + clip.num_frames
    for clip in clips["face_gap.mp4"]:
        assert clip.start_frame + clip.num_frames <= 52 or clip.start_frame >= 98


def test_rotated_film_gives_upright_clips(clips: dict[str, list[Clip]]) -> None:
    for clip in clips["rotate_tag.mp4"]:
        assert (clip.source_width, clip.source_height) == (720, 1280)
        eyes, mouth = clip.landmarks[:, 36:48, 1].mean(), clip.landmarks[:, 48:68, 1].mean()
        assert mouth > eyes + 0.1


def test_corrected_av_offsets_are_right(clips: dict[str, list[Clip]]) -> None:
    for name, frames in (("0", 0), ("audio_late_200ms", 5), ("audio_early_200ms", -5)):
        for clip in clips.get(f"sync_grid_{name}.mp4", []):
            if clip.quality.av_corrected:
                assert clip.quality.av_offset_ms == pytest.approx(40 * frames, abs=40)
