"""Face backends place landmarks correctly; tracking follows one person and reports frames without that person."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from jaxtyping import UInt8

from tccp import faces, headbox, landmarks
from tccp.errors import TccpError
from tccp.faces import Face


def decoded(film: Path, every: int = 1, count: int = 1000) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Frames as PyAV decodes them, with padded rows."""
    with av.open(str(film)) as container:
        frames = (frame for i, frame in enumerate(container.decode(video=0)) if i % every == 0)
        return [frame.to_ndarray(format="rgb24") for frame, _ in zip(frames, range(count), strict=False)]


@pytest.fixture(scope="module")
def mediapipe_backend(shared_weights: Path) -> Iterator[faces.FaceBackend]:
    backend = faces.open_backend("mediapipe", shared_weights)
    yield backend
    backend.close()


def face(x: float, y: float, side: float = 40.0) -> Face:
    return Face(np.array([x, y, x + side, y + side], np.float32), None, 0.5)


# ---- one person over time


def test_the_larger_and_longer_present_person_is_followed():
    big = [face(100 + 3 * i, 50, 60) for i in range(20)]
    small = [face(300 - 3 * i, 50, 30) for i in range(20)]
    frames = [[s, b] if i % 2 else [b, s] for i, (b, s) in enumerate(zip(big, small, strict=True))]
    assert faces.track(frames) == big
    # Size is weighed against time: the small face is alone for three times as long.
    assert faces.track([*frames, *([[small[-1]]] * 60)])[-1] is small[-1]


def test_choose_picks_the_person_under_the_point_else_the_nearest():
    left, right = [face(50, 50, 60)] * 10, [face(300, 60, 30)] * 10
    frames = [list(pair) for pair in zip(left, right, strict=True)]
    assert faces.track(frames, choose=(310, 70)) == right
    assert faces.track(frames, choose=(60, 60)) == left
    assert faces.track(frames, choose=(260, 200)) == right


def test_face_is_absent_in_a_gap_and_the_same_person_after_it():
    frames: list[list[Face]] = [[face(100, 50)]] * 10 + [[]] * 50 + [[face(115, 60)]] * 10
    person = faces.track(frames)
    assert [p is not None for p in person] == [True] * 10 + [False] * 50 + [True] * 10


def test_another_person_does_not_fill_the_gap():
    frames = [[face(100, 50)]] * 20 + [[face(400, 50)]] * 10 + [[face(100, 50)]] * 5
    person = faces.track(frames)
    assert [p is not None for p in person] == [True] * 20 + [False] * 10 + [True] * 5


def test_detection_order_does_not_swap_crossing_people():
    rng = np.random.default_rng(0)
    one, two = [face(100, 50 + i, 50) for i in range(30)], [face(140, 90 - i, 50) for i in range(30)]
    frames = [[a, b] if rng.uniform() < 0.5 else [b, a] for a, b in zip(one, two, strict=True)]
    assert faces.track(frames, choose=(101, 52)) == one


def test_false_positives_do_not_displace_the_person():
    rng = np.random.default_rng(1)
    frames = [[face(100, 50, 50), face(rng.uniform(0, 600), rng.uniform(0, 600), 90)] for _ in range(40)]
    assert faces.track(frames) == [found[0] for found in frames]


def test_frames_without_faces_give_none():
    assert faces.track([[], [], []]) == [None, None, None]
    assert faces.track([]) == []


def test_head_boxes_from_faces_are_steady_and_bridge_gaps():
    rng = np.random.default_rng(0)
    jitter = rng.normal(0, 3, (50, 3))
    person: list[Face | None] = [face(100 + float(dx), 100 + float(dy), 50 + float(ds)) for dx, dy, ds in jitter]
    person[20:25] = [None] * 5
    boxes = faces.head_boxes_from_faces(person)
    assert boxes.shape == (50, 4)
    assert len(np.unique(boxes[:, 2] - boxes[:, 0])) == 1
    assert np.ptp(boxes[:, :2], axis=0).max() <= 4
    with pytest.raises(TccpError, match="no face in any"):
        faces.head_boxes_from_faces([None, None])


def test_head_boxes_from_faces_follow_a_zoom():
    """Also if the detector's sizes are noisy and come in steps of 20 %, as the cascade's."""
    rng = np.random.default_rng(0)
    zoom = 2 ** np.interp(np.arange(150), (30, 120), (0, 1))
    person: list[Face | None] = []
    for size in 60 * zoom * (1 + rng.normal(0, 0.05, 150)):
        side = 1.2 ** round(float(np.log(size) / np.log(1.2)))
        person.append(face(300 - side / 2, 300 - side / 2, side))
    boxes = faces.head_boxes_from_faces(person)
    sides = boxes[:, 2] - boxes[:, 0]
    assert np.abs(sides / (faces.LBP_SIDE * 60 * zoom) - 1).max() < 0.15
    assert np.abs((boxes[:, :2] + boxes[:, 2:]) / 2 - 300).max() < 0.05 * sides.min()
    assert np.abs(np.diff(sides)).max() <= 0.03 * sides.max()


# ---- weights and names


def test_unknown_backend_is_refused():
    with pytest.raises(TccpError, match="choose mediapipe, fan or lbp"):
        faces.open_backend("dlib")


def test_weights_are_found_by_environment_variable_or_path(tmp_path, monkeypatch):
    monkeypatch.delenv("TCCP_WEIGHTS", raising=False)
    monkeypatch.setenv("TCCP_STORAGE", str(tmp_path))
    with pytest.raises(TccpError, match=r"no face landmark weights at .*face_landmarker\.task.*TCCP_WEIGHTS"):
        faces.open_backend("mediapipe")
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights" / "face_landmarker.task"
    file.write_bytes(b"x")
    assert faces.find_weights() == file
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("TCCP_WEIGHTS", str(elsewhere))
    with pytest.raises(TccpError, match="elsewhere"):
        faces.find_weights()
    assert faces.find_weights(file) == faces.find_weights(file.parent) == file


def test_invalid_weights_give_a_one_line_error(tmp_path):
    file = tmp_path / "face_landmarker.task"
    file.write_bytes(b"not a model")
    with pytest.raises(TccpError, match="not a usable MediaPipe face landmark model") as error:
        faces.open_backend("mediapipe", file)
    assert "\n" not in str(error.value)


def test_backend_keys_contain_versions_and_the_weight_digest(shared_weights, mediapipe_backend):
    digest = hashlib.sha256((shared_weights / "face_landmarker.task").read_bytes()).hexdigest()
    assert mediapipe_backend.key == f"mediapipe {importlib.metadata.version('mediapipe')} {digest}"
    assert faces.open_backend("lbp").key == f"lbp scikit-image {importlib.metadata.version('scikit-image')}"


def test_missing_package_gives_an_error_with_the_fix():
    """Runs in a process that cannot import scikit-image."""
    code = (
        "import sys; sys.modules['skimage'] = None; from tccp.errors import TccpError; from tccp import faces\n"
        "try: faces.open_backend('lbp')\n"
        "except TccpError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}, check=True,
    )  # fmt: skip
    assert "backend lbp needs skimage" in run.stdout and "pip install" in run.stdout


# ---- mediapipe on real faces


def test_mesh_points_are_mapped_one_to_one():
    """On a random mesh, every iBUG point except those of the jaw equals one mesh point of its own."""
    mesh = np.random.default_rng(0).uniform(0, 1, (478, 3))
    points = faces.ibug_from_mesh(mesh)
    distance = np.linalg.norm(points[17:, None] - mesh[None], axis=-1)
    assert (distance.min(1) < 1e-6).all()
    assert len(set(distance.argmin(1))) == 51


@pytest.mark.parametrize("film", ["latentsync_demo2.mp4", "grid_lwbsza.mpg", "grid_bbaf2n.mpg"])
def test_landmarks_of_real_faces_are_in_the_right_places(film, shared_clips, mediapipe_backend):
    frames = decoded(shared_clips / film, every=5, count=12)
    person = faces.track([mediapipe_backend.detect(frame) for frame in frames])
    points = np.stack([found.landmarks_px for found in person if found is not None and found.landmarks_px is not None])
    assert len(points) == len(frames)
    frontal = landmarks.normalise(points).mean(0)
    # Each group is near its place on the mean face; the jaw runs left to right over the chin, evenly spaced.
    for group in landmarks.GROUPS.values():
        offset = frontal[list(group)].mean(0) - landmarks.MEAN_FACE[list(group), :2].mean(0)
        assert np.abs(offset).max() < 0.2
    jaw = frontal[:17]
    assert (np.diff(jaw[:, 0])[2:-2] > 0).all()
    assert jaw[:, 1].argmax() in (7, 8, 9)
    steps = np.linalg.norm(np.diff(jaw, axis=0), axis=1)
    assert steps.max() < 1.6 * steps.min()
    # Upper and lower lids and lips are not swapped.
    for upper, lower in ((37, 41), (38, 40), (43, 47), (44, 46), (50, 58), (51, 57), (62, 66)):
        assert frontal[upper, 1] < frontal[lower, 1] + 0.01
    assert np.ptp(landmarks.mouth_opening(points)) > 0.03  # they are speaking
    assert all(found is not None and found.confidence == 1 for found in person)


def test_mediapipe_detects_faces_in_frames_with_padded_rows(shared_clips, mediapipe_backend):
    """MediaPipe ignores strides: PyAV's 360 px wide frames looked sheared to it, and it silently found no face."""
    frame = decoded(shared_clips / "grid_lwbsza.mpg", count=1)[0]
    padded = np.zeros((frame.shape[0], 384, 3), np.uint8)[:, :360]
    padded[:] = frame
    assert not padded.flags["C_CONTIGUOUS"]
    found, again = mediapipe_backend.detect(padded), mediapipe_backend.detect(np.ascontiguousarray(frame))
    assert len(found) == len(again) == 1
    np.testing.assert_array_equal(found[0].landmarks_px, again[0].landmarks_px)


def test_detections_do_not_depend_on_the_frame_order(shared_clips, mediapipe_backend):
    frames = decoded(shared_clips / "grid_bbaf2n.mpg", every=20, count=3)
    forward = [mediapipe_backend.detect(frame)[0].landmarks_px for frame in frames]
    backward = [mediapipe_backend.detect(frame)[0].landmarks_px for frame in frames[::-1]][::-1]
    np.testing.assert_array_equal(np.stack(forward), np.stack(backward))


def test_person_is_absent_in_the_gap_of_a_real_clip(shared_clips, mediapipe_backend):
    frames = decoded(shared_clips / "face_gap.mp4", every=10)
    person = faces.track([mediapipe_backend.detect(frame) for frame in frames])
    present = [found is not None for found in person]
    seconds = np.arange(len(frames)) * 10 / 25
    for at, here in zip(seconds, present, strict=True):
        if min(abs(at - 2), abs(at - 4)) > 0.2:
            assert here == (at < 2 or at > 4), f"at {at} s"


def test_chosen_one_of_two_real_people_is_followed(shared_clips, mediapipe_backend):
    frames = decoded(shared_clips / "two_person_overlap.mp4", every=10)
    found = [mediapipe_backend.detect(frame) for frame in frames]
    assert all(len(people) == 2 for people in found)
    for x, left in ((180, True), (540, False)):
        person = faces.track(found, choose=(x, 150))
        assert all(p is not None and bool(p.center[0] < 360) == left for p in person)


@pytest.mark.parametrize("film", ["grid_bbaf2n.mpg", "grid_brbk7n.mpg"])
def test_head_boxes_of_real_people_contain_the_head(film, shared_clips, mediapipe_backend):
    """GRID's background is plain blue: pixels above the chin that are not blue are head or hair, inside the box."""
    frames = decoded(shared_clips / film, every=6, count=10)
    points = np.stack([mediapipe_backend.detect(frame)[0].landmarks_px for frame in frames])
    boxes = headbox.head_boxes(points)
    assert len(np.unique(boxes[:, 2] - boxes[:, 0])) == 1
    for frame, box, chin in zip(frames, boxes, points[:, 8, 1], strict=True):
        levels = frame.astype(int)
        person = levels[..., 2] - levels[..., 0] < 40
        rows, columns = np.nonzero(person[5 : int(chin), 5:-5])  # the border of the picture is dark
        inside = (rows + 5 >= box[1]) & (columns + 5 >= box[0]) & (columns + 5 < box[2])
        assert len(rows) > 5000
        assert inside.mean() > 0.98
        assert box[3] > chin + 0.15 * (box[3] - box[1])  # room for neck and collar


def test_mesh_fitted_to_an_ear_is_not_a_face(shared_clips, mediapipe_backend):
    """In this near-profile shot MediaPipe fits a mesh to the ear, with the pose of a face that looks backwards."""
    frame = decoded(shared_clips / "short_hamilton_clip.mp4", count=60)[24]
    assert mediapipe_backend.detect(frame) == []


def test_small_faces_are_found_in_tiles(shared_clips, mediapipe_backend):
    """A face of 98 px in a frame 1280 px wide has 10 px in MediaPipe's input and is missed there."""
    frame = decoded(shared_clips / "face_gap.mp4", count=1)[0]
    found = mediapipe_backend.detect(frame)
    assert len(found) == 1
    assert found[0].side / frame.shape[1] < 0.09
    near = frame[: frame.shape[0] // 2, 400:900]
    closer = mediapipe_backend.detect(near)
    assert np.abs(closer[0].landmarks_px + np.array([400, 0]) - found[0].landmarks_px).mean() < 0.02 * found[0].side


def test_mediapipe_points_are_those_of_its_own_python_objects(shared_clips, mediapipe_backend):
    picture = np.ascontiguousarray(decoded(shared_clips / "grid_bbaf2n.mpg", count=1)[0])
    image = mediapipe_backend._mediapipe.Image(image_format=mediapipe_backend._mediapipe.ImageFormat.SRGB, data=picture)
    (mesh,) = mediapipe_backend._meshes(image)
    (points,) = mediapipe_backend._landmarker.detect(image).face_landmarks
    np.testing.assert_array_equal(mesh, [[point.x, point.y] for point in points])


def test_mediapipe_prints_nothing(shared_weights):
    """Its start-up messages must not mix with one-line errors for the user."""
    code = (
        "import sys, numpy as np; from pathlib import Path; from tccp.faces import open_backend;"
        "b = open_backend('mediapipe', Path(sys.argv[1])); b.detect(np.zeros((64, 64, 3), np.uint8)); b.close()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(shared_weights)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}, check=True,
    )  # fmt: skip
    assert run.stderr == ""
    assert run.stdout == ""


# ---- LBP


@pytest.mark.parametrize("film", ["grid_bbaf2n.mpg", "grid_lwbsza.mpg", "latentsync_demo2.mp4"])
def test_lbp_finds_the_face_and_its_head_box_agrees_with_the_landmarks(film, shared_clips, mediapipe_backend):
    frames = decoded(shared_clips / film, every=6, count=8)
    lbp = faces.open_backend("lbp")
    person = faces.track([lbp.detect(frame) for frame in frames])
    assert sum(found is not None for found in person) >= 6
    coarse = faces.head_boxes_from_faces(person)
    points = np.stack([mediapipe_backend.detect(frame)[0].landmarks_px for frame in frames])
    fine = headbox.head_boxes(points)
    side = fine[0, 2] - fine[0, 0]
    assert (coarse[0, 2] - coarse[0, 0]) / side == pytest.approx(1, abs=0.15)
    assert np.abs((coarse[:, :2] + coarse[:, 2:] - fine[:, :2] - fine[:, 2:]) / 2).max() < 0.12 * side


def test_lbp_needs_no_weights_and_finds_no_face_in_a_blank_picture():
    lbp = faces.open_backend("lbp")
    assert lbp.detect(np.full((120, 160, 3), 90, np.uint8)) == []
    lbp.close()
