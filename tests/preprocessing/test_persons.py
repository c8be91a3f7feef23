"""Persons: tracks are grouped by person, a requested person is matched, and switches within a track are found."""

from __future__ import annotations

import dataclasses
import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
from facetracks import film_track, moved, repainted, roundtable_track, spliced
from hypothesis import given
from hypothesis import strategies as st

from preprocessing.analysis import persons
from preprocessing.analysis.chips import read_chip
from preprocessing.analysis.face_tracks import part_of
from preprocessing.analysis.persons import SAME_PERSON_COSINE, FaceEmbedder
from preprocessing.plan import make_plan
from preprocessing.reels import Track
from preprocessing.report.record import RunReport
from preprocessing.run import preprocess
from tccp import faces, roundtable
from tccp.errors import TccpError
from tccp.media import VideoWriter, read_frames

FRAMES = 41


# ---- A network of SFace's layout: an ONNX file written by hand, which pools the aligned face and projects it


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _field(number: int, value: int | str | bytes) -> bytes:
    """One protobuf field: a varint, or bytes with their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _tensor(name: str, values: np.ndarray) -> bytes:
    dims = b"".join(_field(1, size) for size in values.shape)
    return dims + _field(2, 1) + _field(8, name) + _field(9, values.astype("<f4").tobytes())


def _ints(name: str, values: Sequence[int]) -> bytes:
    return _field(5, _field(1, name) + b"".join(_field(8, value) for value in values) + _field(20, 7))


def _node(kind: str, inputs: Sequence[str], output: str, attributes: bytes = b"") -> bytes:
    return b"".join(_field(1, name) for name in inputs) + _field(2, output) + _field(4, kind) + attributes


def _shaped(name: str, shape: Sequence[int]) -> bytes:
    dims = b"".join(_field(1, _field(1, size)) for size in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, dims)))


def write_network(path: Path, bias: np.ndarray) -> Path:
    """1 x 3 x 112 x 112 to 1 x 128: mean colours of 8 x 8 cells, times a fixed random matrix, plus the bias."""
    matrix = np.random.default_rng(0).normal(0, 1 / 14, (192, 128)).astype(np.float32)
    nodes = [
        _node("AveragePool", ["data"], "pooled", _ints("kernel_shape", (14, 14)) + _ints("strides", (14, 14))),
        _node("Flatten", ["pooled"], "flat"),
        _node("Gemm", ["flat", "matrix", "bias"], "fc1"),
    ]
    graph = b"".join(_field(1, node) for node in nodes) + _field(2, "sface")
    graph += _field(5, _tensor("matrix", matrix)) + _field(5, _tensor("bias", bias))
    graph += _field(11, _shaped("data", (1, 3, 112, 112))) + _field(12, _shaped("fc1", (1, 128)))
    path.write_bytes(_field(1, 7) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 11)))
    return path


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory, grid: dict[str, Track]) -> FaceEmbedder:
    """Centred on the mean of the GRID faces, so that different people get different directions."""
    folder = tmp_path_factory.mktemp("sface")
    first = FaceEmbedder(write_network(folder / "raw.onnx", np.zeros(128)))
    mean = np.mean([first.embed_frames(track, [0]) for track in grid.values()], axis=0)
    chip = read_chip(next(iter(grid.values())), 0)
    network = cv2.dnn.readNetFromONNX(str(folder / "raw.onnx"))
    network.setInput(cv2.dnn.blobFromImage(chip.picture))
    return FaceEmbedder(write_network(folder / "centred.onnx", -mean * np.linalg.norm(network.forward())))


@pytest.fixture(scope="module")
def backend(shared_weights: Path) -> Iterator[faces.FaceBackend]:
    detector = faces.open_backend("mediapipe", shared_weights)
    yield detector
    detector.close()


@pytest.fixture(scope="module")
def grid(backend: faces.FaceBackend, shared_clips: Path) -> dict[str, Track]:
    names = {"man": "bbaf2n", "woman": "brbk7n", "other woman": "lwbsza"}
    return {who: film_track(shared_clips / f"grid_{name}.mpg", backend, FRAMES) for who, name in names.items()}


@pytest.fixture(scope="module")
def people() -> list[Track]:
    """Tracks of ten RoundTable people, one after the other."""
    clips = (roundtable.synthesise(1000 + s, 0.8, person_seed=s) for s in range(10))
    return [roundtable_track(clip, 100 * s) for s, clip in enumerate(clips)]


def halves(track: Track, start: int = 0) -> list[Track]:
    """The two halves of a track, moved to start at `start` and at `start` + 500."""
    middle = track.start_frame + track.num_frames // 2
    first, second = part_of(track, track.start_frame, middle), part_of(track, middle, track.stop_frame)
    return [moved(first, start - first.start_frame), moved(second, start + 500 - second.start_frame)]


# ---- Grouping


def test_appearance_alone_separates_different_people(people: list[Track], grid: dict[str, Track]) -> None:
    humans = [moved(track, 5000 + 100 * i) for i, track in enumerate(grid.values())]
    assert persons.group([*people, *humans], None) == list(range(13))


def test_appearance_alone_joins_tracks_of_one_person_in_one_scene(people: list[Track], grid: dict[str, Track]) -> None:
    tracks = [half for i, track in enumerate([*grid.values(), *people]) for half in halves(track, 1000 * i)]
    numbers = persons.group(tracks, None)
    joined = [a == b for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
    assert joined[:3] == [True] * 3 and sum(joined[3:]) >= 8
    assert len(set(numbers)) == 13 + joined.count(False)


def test_overlapping_tracks_are_different_people(grid: dict[str, Track], embedder: FaceEmbedder) -> None:
    man = grid["man"]
    for using in (None, embedder):
        assert persons.group([man, man], using) == [0, 1]
        assert persons.group([man, moved(man, man.num_frames - 1)], using) == [0, 1]
        assert persons.group([man, moved(man, man.num_frames)], using) == [0, 0]


def test_track_order_sets_person_numbers_but_not_groups(grid: dict[str, Track], embedder: FaceEmbedder) -> None:
    tracks = [half for i, track in enumerate(grid.values()) for half in halves(track, 1000 * i)]
    for using in (None, embedder):
        assert persons.group(tracks, using) == [0, 0, 1, 1, 2, 2]
        order = [4, 1, 3, 0, 2, 5]
        assert persons.group([tracks[i] for i in order], using) == [0, 1, 2, 1, 2, 0]
    assert persons.group([], None) == []


def test_tracks_without_chips_or_landmarks_are_separate_people(grid: dict[str, Track], embedder: FaceEmbedder) -> None:
    man = grid["man"]
    boxes_only = dataclasses.replace(man, landmarks=np.full_like(man.landmarks, np.nan))
    tracks = [man, moved(dataclasses.replace(man, chips={}), 100), moved(boxes_only, 200), moved(man, 300)]
    for using in (None, embedder):
        assert persons.group(tracks, using) == [0, 1, 2, 0]
        assert persons.switches(boxes_only, using) == []


def _average_linkage_by_definition(distance: np.ndarray, limit: float) -> list[set[int]]:
    """Average linkage by its definition: joins the two nearest groups while their mean distance is within `limit`."""
    groups = [{i} for i in range(len(distance))]

    def mean(pair: tuple[set[int], set[int]]) -> float:
        return float(np.mean([distance[i, j] for i in pair[0] for j in pair[1]]))

    while len(groups) > 1:
        nearest = min(itertools.combinations(groups, 2), key=mean)
        if mean(nearest) > limit:
            break
        groups = [group for group in groups if group not in nearest] + [nearest[0] | nearest[1]]
    return groups


@given(st.integers(0, 10**6), st.integers(0, 12), st.floats(0.05, 2.0), st.floats(0, 1))
def test_average_linkage_matches_its_definition_and_separates_forbidden_pairs(
    seed: int, count: int, limit: float, share_forbidden: float
) -> None:
    rng = np.random.default_rng(seed)
    distance = np.tril(rng.random((count, count)), -1)
    distance[rng.random((count, count)) < share_forbidden] = np.inf
    distance = np.tril(distance, -1) + np.tril(distance, -1).T
    numbers = persons.average_linkage(distance, limit)
    assert list(dict.fromkeys(numbers)) == list(range(len(set(numbers))))
    groups = [{i for i in range(count) if numbers[i] == number} for number in range(len(set(numbers)))]
    assert sorted(map(sorted, groups)) == sorted(map(sorted, _average_linkage_by_definition(distance, limit)))
    for i, j in itertools.combinations(range(count), 2):
        assert numbers[i] != numbers[j] or np.isfinite(distance[i, j])


# ---- The requested person


PictureOf = Callable[[str], Path]


@pytest.fixture
def picture_of(shared_clips: Path, tmp_path: Path) -> PictureOf:
    def write(name: str) -> Path:
        (picture,) = read_frames(shared_clips / name, 60, 1)
        cv2.imwrite(str(tmp_path / f"{name}.png"), picture[..., ::-1])
        return tmp_path / f"{name}.png"

    return write


def bgr(path: Path) -> np.ndarray:
    picture = cv2.imread(str(path))
    assert picture is not None
    return picture


def test_requested_person_is_matched_by_a_picture(
    grid: dict[str, Track], embedder: FaceEmbedder, backend: faces.FaceBackend, picture_of: PictureOf
) -> None:
    man = embedder.embed_reference(picture_of("grid_bbaf2n.mpg"), backend)
    woman = embedder.embed_reference(str(picture_of("grid_brbk7n.mpg")), backend)
    assert float(man @ man) == pytest.approx(1, abs=1e-5) and float(man @ woman) < SAME_PERSON_COSINE
    tracks = [*grid.values(), dataclasses.replace(grid["man"], chips={})]
    assert persons.matches(tracks, [man], embedder) == [True, False, False, False]
    assert persons.matches(tracks, [man, woman], embedder) == [True, True, False, False]


def test_large_reference_picture_gives_the_same_embedding(
    embedder: FaceEmbedder, backend: faces.FaceBackend, picture_of: PictureOf, tmp_path: Path
) -> None:
    path = picture_of("grid_bbaf2n.mpg")
    large = cv2.resize(bgr(path), None, fx=5, fy=5, interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(tmp_path / "large.png"), large)
    one, other = (embedder.embed_reference(p, backend) for p in (path, tmp_path / "large.png"))
    assert float(one @ other) > 0.95


def test_person_filter_without_sface_gives_an_error_with_the_fix(grid: dict[str, Track]) -> None:
    with pytest.raises(TccpError, match="tccp weights fetch sface"):
        persons.matches(list(grid.values()), [], None)


def test_unusable_reference_pictures_are_refused(
    embedder: FaceEmbedder, backend: faces.FaceBackend, picture_of: PictureOf, tmp_path: Path
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    cv2.imwrite(str(tmp_path / "wall.png"), np.full((200, 300, 3), 90, np.uint8))
    for name, text in [
        ("absent.png", "there is no such file"),
        ("text.png", "no picture of a known format; give JPEG"),
        ("empty.png", "the file is empty"),
        ("wall.png", "no face was found"),
    ]:
        with pytest.raises(TccpError, match=text) as error:
            embedder.embed_reference(tmp_path / name, backend)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(TccpError, match="2 faces of about the same size"):
        embedder.embed_reference(picture_of("two_person_overlap.mp4"), backend)
    detector = faces.open_backend("lbp")
    with pytest.raises(TccpError, match="lbp gives no landmarks"):
        embedder.embed_reference(picture_of("grid_bbaf2n.mpg"), detector)


def test_reference_picture_uses_the_clearly_largest_face(
    embedder: FaceEmbedder, backend: faces.FaceBackend, picture_of: PictureOf, tmp_path: Path
) -> None:
    man, woman = (bgr(picture_of(name)) for name in ("grid_bbaf2n.mpg", "grid_brbk7n.mpg"))
    small = cv2.resize(woman, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
    both = np.zeros((man.shape[0], man.shape[1] + small.shape[1], 3), np.uint8)
    both[:, : man.shape[1]], both[: small.shape[0], man.shape[1] :] = man, small
    cv2.imwrite(str(tmp_path / "both.png"), both)
    assert len(backend.detect(np.ascontiguousarray(both[..., ::-1]))) == 2
    meant = embedder.embed_reference(tmp_path / "both.png", backend)
    alone = embedder.embed_reference(picture_of("grid_bbaf2n.mpg"), backend)
    assert float(meant @ alone) > 0.95


@pytest.fixture
def rows_with_persons(shared_clips: Path, tmp_path: Path) -> Path:
    """A manifest of three short films: one row asks for a person in a file that is no picture, one in none at all."""
    rows = ["path,person"]
    for name, person in (("bbaf2n", "text.png"), ("brbk7n", "absent.png"), ("lwbsza", "")):
        film = tmp_path / f"{name}.mp4"
        with VideoWriter(film, 360, 288, audio_from=np.full(24 * 640, 0.1, np.float32)) as writer:
            for picture in itertools.islice(read_frames(shared_clips / f"grid_{name}.mpg"), 24):
                writer.write(picture)
        rows.append(f"{film.name},{person}")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "films.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "films.csv"


@pytest.mark.slow
def test_a_row_whose_person_cannot_be_compared_costs_that_row_only(
    rows_with_persons: Path, shared_weights: Path, picture_of: PictureOf, tmp_path: Path
) -> None:
    weights, out = tmp_path / "weights", tmp_path / "out"
    weights.mkdir()
    (weights / "face_landmarker.task").symlink_to(shared_weights / "face_landmarker.task")

    def run() -> RunReport:
        return preprocess([rows_with_persons], out, make_plan(32, "mediapipe", weights, speakers="main"))

    report = run()
    assert [source.reason for source in report.sources] == ["no_person_network", "no_person_network", None]
    assert report.clips == 1 and report.reasons["no_person_network"] == 2
    assert "tccp weights fetch sface" in str(report.sources[0].message)

    write_network(weights / "face_recognition_sface_2021dec.onnx", np.zeros(128))
    report = run()
    assert [source.reason for source in report.sources] == ["bad_person", "bad_person", None]
    assert report.clips == 1 and report.sources[0].left_out == {"bad_person": 24}
    assert all(str(source.message).count("\n") == 0 for source in report.sources)
    assert "bbaf2n.mp4: " in str(report.sources[0].message) and "no picture of a known format" in str(
        report.sources[0].message
    )
    assert "absent.png: there is no such file" in str(report.sources[1].message)

    # A picture in their places: what was refused is not kept.
    for name in ("text.png", "absent.png"):
        (tmp_path / name).write_bytes(picture_of("grid_bbaf2n.mpg").read_bytes())
    (rows_with_persons.parent / "absent.png").write_bytes((tmp_path / "text.png").read_bytes())
    report = run()
    assert report.sources[0].reason is None and report.clips >= 2


def test_invalid_model_file_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "sface.onnx"
    broken.write_bytes(struct.pack("<16I", *range(16)))
    for path in (broken, tmp_path / "absent.onnx"):
        with pytest.raises(TccpError, match="not a usable SFace model") as error:
            FaceEmbedder(path)
        assert "\n" not in str(error.value)


# ---- Switches


def test_tracks_of_one_person_have_no_switch(
    grid: dict[str, Track], people: list[Track], embedder: FaceEmbedder
) -> None:
    for track in (*grid.values(), *people):
        assert persons.switches(track, None) == []
    assert persons.switches(grid["man"], embedder) == []


@pytest.mark.parametrize("at", [18, 20, 21, 24])
def test_switch_is_located_to_the_frame(grid: dict[str, Track], embedder: FaceEmbedder, at: int) -> None:
    for one, other in (("man", "woman"), ("woman", "man"), ("woman", "other woman")):
        track = moved(spliced(grid[one], grid[other], at), 1000)
        assert persons.switches(track, None) == [1000 + at]
        assert persons.switches(track, embedder) == [1000 + at]


def test_most_switches_between_roundtable_people_are_found(people: list[Track]) -> None:
    starts = [moved(track, -track.start_frame) for track in people]
    found = [
        any(abs(frame - 12) < 5 for frame in persons.switches(spliced(a, b, 12), None))
        for a in starts
        for b in starts
        if a is not b
    ]
    assert np.mean(found) > 0.7


def test_switch_across_a_bridged_gap_is_at_the_end_of_the_gap(grid: dict[str, Track]) -> None:
    track = spliced(grid["man"], grid["woman"], 17)
    landmarks, box, confidence = track.landmarks.copy(), track.box.copy(), track.confidence.copy()
    for i in range(13, 19):
        share = (i - 12) / 7
        landmarks[i] = (1 - share) * landmarks[12] + share * landmarks[19]
        box[i] = (1 - share) * box[12] + share * box[19]
        confidence[i] = 0
    chips = {frame: chip for frame, chip in track.chips.items() if not 13 <= frame < 19}
    gap = dataclasses.replace(track, landmarks=landmarks, box=box, confidence=confidence, chips=chips)
    assert persons.switches(gap, None) == [19]


def test_lighting_change_is_not_a_switch(grid: dict[str, Track]) -> None:
    def darker(picture: np.ndarray, points: np.ndarray) -> np.ndarray:
        return (picture * 0.5).astype(np.uint8)

    def warmer(picture: np.ndarray, points: np.ndarray) -> np.ndarray:
        return np.clip(picture * np.array([1.15, 1.0, 0.75]), 0, 255).astype(np.uint8)

    for change in (darker, warmer):
        for track in grid.values():
            assert persons.switches(repainted(track, range(20, FRAMES), change), None) == []


def test_sface_overrides_appearance(grid: dict[str, Track], tmp_path: Path) -> None:
    """A network whose large bias gives every face the same embedding joins faces that look different."""
    blind = FaceEmbedder(write_network(tmp_path / "blind.onnx", np.full(128, 1e6)))
    track = spliced(grid["man"], grid["woman"], 18)
    assert persons.switches(track, None) == [18] and persons.switches(track, blind) == []
    assert persons.group([grid["man"], moved(grid["woman"], 1000)], blind) == [0, 0]
