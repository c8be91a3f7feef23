"""Bad input to `preprocess` and `generate`: a one-line error on stderr, exit code 2, no files left behind."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from tiny import pictures, tccp, write_film

from tccp.cli import main
from tccp.media import write_audio_wav
from tccp.roundtable import identity_path, truth_path

pytest_plugins = ["tiny_fixtures"]

_PROGRESS = re.compile(r"[a-z ]+: (\d+/\d+, )?\d+ s.*")


def one_line(stderr: str) -> str:
    """The error message, without the progress lines before it."""
    lines = [line for line in stderr.splitlines() if line.strip() and not _PROGRESS.fullmatch(line)]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("tccp: error: "), stderr
    assert "Traceback" not in stderr
    return lines[0].removeprefix("tccp: error: ")


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def refused(capsys: pytest.CaptureFixture[str], folder: Path, *expected: str) -> Iterator[None]:
    """Require that `main()` fails with one line that contains all of `expected` and leaves no file in `folder`."""
    before = files_below(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        yield
    captured = capsys.readouterr()
    message = one_line(captured.err)
    assert caught.value.code == 2
    assert captured.out == ""
    missing = [text for text in expected if text not in message]
    assert not missing, message
    assert files_below(folder) == before


@pytest.fixture
def arguments(film: Path, weights: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Builds a valid `generate` command line with changes; None removes an option."""

    def build(**changes: Any) -> list[str]:
        options: dict[str, Any] = {
            "scene": film,
            "audio": film,
            "identity": identity_path(film),
            "identity-box": "whole",
            "box": "40,20,80,60",
            "weights": weights,
            "out": tmp_path / "made" / "out.mp4",
            "steps": 1,
            "device": "cpu",
        }
        options |= {name.replace("_", "-"): value for name, value in changes.items()}
        person = options.pop("person", None)
        given = [f"--{name}={value}" for name, value in options.items() if value is not None and value is not True]
        given += ["--person", *person.split()] if person else []
        return ["generate", *given, *(f"--{name}" for name, value in options.items() if value is True)]

    return build


# Bad files


def _wave(path: Path, samples: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())


def _float_wave(path: Path, samples: np.ndarray) -> None:
    """A WAV of 32-bit floats, which may contain NaN."""
    data = samples.astype("<f4").tobytes()
    header = b"RIFF" + (36 + len(data)).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
    header += (3).to_bytes(2, "little") + (1).to_bytes(2, "little") + (16000).to_bytes(4, "little")
    header += (64000).to_bytes(4, "little") + (4).to_bytes(2, "little") + (32).to_bytes(2, "little")
    path.write_bytes(header + b"data" + len(data).to_bytes(4, "little") + data)


@pytest.fixture(scope="module")
def broken(film: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bad files, each named after its fault."""
    folder = tmp_path_factory.mktemp("broken")
    content = film.read_bytes()
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is no film\n" * 100)
    index = content.rindex(b"moov") - 4
    mdat = content.rindex(b"mdat") - 4
    assert index < mdat  # our own films begin with their index
    (folder / "no_index.mp4").write_bytes(content[:index] + content[mdat:])
    (folder / "truncated.mp4").write_bytes(content[: len(content) * 2 // 3])
    flipped = bytearray(content)
    places = np.random.default_rng(0).integers(mdat + 5000, len(content), 200)
    for place in places:
        flipped[place] ^= 1 << int(place % 8)
    (folder / "flipped.mp4").write_bytes(bytes(flipped))
    write_film(folder / "no_audio.mp4", pictures(film))
    _wave(folder / "no_video.wav", np.zeros(16000))
    write_film(folder / "no_face.mp4", np.full((25, 96, 128, 3), 120, np.uint8), np.zeros(16000, np.float32))
    _wave(folder / "no_length.wav", np.zeros(0))
    nan = np.zeros(16000)
    nan[9000] = np.nan
    _float_wave(folder / "nan.wav", nan)
    cv2.imwrite(str(folder / "tiny.png"), np.full((1, 1, 3), 90, np.uint8))
    (folder / "no_picture.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    return folder


FILMS = {
    "absent.mp4": "no such file; check the path",
    "empty.mp4": "the file is empty (0 bytes)",
    "text.mp4": "no video or audio file of a known format; give",
    "no_index.mp4": "index",
    "truncated.mp4": "cut short",
    "flipped.mp4": "damaged",
}


@pytest.mark.parametrize(
    ("option", "name"),
    [
        (option, name)
        for option in ("scene", "audio", "identity", "mask")
        for name in FILMS
        if (option, name) != ("audio", "flipped.mp4")  # AAC with flipped bits still decodes, without an error
    ],
)
def test_generate_names_a_bad_file(
    broken: Path,
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    name: str,
) -> None:
    changes = {option: broken / name} | ({"box": None} if option == "mask" else {})
    with refused(capsys, tmp_path, str(broken / name), FILMS[name]):
        main(arguments(**changes))


@pytest.mark.parametrize("name", FILMS)
def test_preprocess_names_a_bad_file(
    broken: Path, shared_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with refused(capsys, tmp_path, str(broken / name), FILMS[name]):
        main(["preprocess", str(broken / name), str(tmp_path / "clips"), "--weights", str(shared_weights)])


CORRUPT = {
    "corrupt_empty.mp4": "empty",
    "corrupt_text.mp4": "known format",
    "corrupt_truncated_no_moov.mp4": "index",
    "corrupt_truncated_faststart.mp4": "cut short",
    "corrupt_bitflips.mp4": "damaged",
}


@pytest.mark.clips
@pytest.mark.parametrize("name", CORRUPT)
def test_real_damaged_films_are_named(
    shared_clips: Path,
    shared_weights: Path,
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    path = shared_clips / name
    write_audio_wav(tmp_path / "sound.wav", np.full(int(3.9 * 16000), 0.01))
    with refused(capsys, tmp_path, str(path), CORRUPT[name]):
        main(arguments(scene=path, audio=tmp_path / "sound.wav", box="300,100,700,500"))
    with refused(capsys, tmp_path, str(path), CORRUPT[name]):
        main(["preprocess", str(path), str(tmp_path / "clips"), "--weights", str(shared_weights)])


@pytest.mark.parametrize(
    ("option", "name", "expected"),
    [
        ("audio", "no_audio.mp4", "no sound; give one"),
        ("audio", "no_length.wav", "empty"),
        ("audio", "nan.wav", "not numbers; export it again"),
        ("audio", "no_picture.png", "known format"),
        ("scene", "no_video.wav", "no pictures; --scene needs"),
        ("identity", "no_video.wav", "sound only; give a picture"),
        ("identity", "no_picture.png", "the picture is damaged (it begins like PNG, but cannot be read)"),
        ("identity", "text.mp4", "this is no picture, and no video or audio file of a known format; give JPEG, PNG"),
        ("mask", "no_video.wav", "no pictures; give a film"),
    ],
)
def test_generate_names_what_a_file_lacks(
    broken: Path,
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    name: str,
    expected: str,
) -> None:
    changes = {option: broken / name} | ({"box": None} if option == "mask" else {})
    with refused(capsys, tmp_path, str(broken / name), expected):
        main(arguments(**changes))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no_audio.mp4", "no sound"),
        ("no_video.wav", "no video"),
        ("no_face.mp4", "face"),
        ("no_length.wav", ""),
        ("nan.wav", "no video"),
    ],
)
def test_preprocess_names_what_a_file_lacks(
    broken: Path, shared_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, expected: str
) -> None:
    with refused(capsys, tmp_path, str(broken / name), expected):
        main(["preprocess", str(broken / name), str(tmp_path / "clips"), "--weights", str(shared_weights)])


def test_preprocess_skips_and_counts_bad_files(
    broken: Path, film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    footage = tmp_path / "footage"
    shutil.copytree(broken, footage)
    for path in (film, truth_path(film), identity_path(film)):
        shutil.copy(path, footage)
    main(["preprocess", str(footage), str(tmp_path / "clips"), "--backend", "truth", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["clips"] == 1
    assert sum(record["reasons"].values()) == len(record["sources"]) - 1
    assert all(source["message"] for source in record["sources"] if not source["clips"])


# No face, invalid options, unwritable outputs


@pytest.mark.parametrize("detector", ["lbp", "mediapipe"])
def test_scene_or_identity_without_a_face_is_refused(
    broken: Path,
    shared_weights: Path,
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    detector: str,
) -> None:
    seen = {"box": None, "detector": detector, "detector_weights": shared_weights}
    with refused(capsys, tmp_path, "no_face.mp4", f"no face found in {broken}", "--box"):
        main(arguments(scene=broken / "no_face.mp4", **seen))
    with refused(capsys, tmp_path, f"no face found in {broken / 'no_face.mp4'}", "--identity-box"):
        main(arguments(identity=broken / "no_face.mp4", identity_box=None, **seen | {"box": "40,20,80,60"}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"box": "900,10,980,90"}, ["--box 900,10,980,90", "outside the picture of 128x96", "in pixels"]),
        ({"box": "10,10,90"}, ["--box 10,10,90", "four numbers"]),
        ({"box": "track.json"}, ["track.json", "neither a box nor a track file"]),
        ({"identity_box": "-90,0,-10,80"}, ["identity.png", "outside the picture"]),
        ({"box": None, "person": "900 20"}, ["--person 900 20 is not in the picture", "x from 0 to 127", "0 to 95"]),
        ({"box": None, "person": "nan 20"}, ["--person nan 20 is not in the picture"]),
        ({"box": None, "person": "-1 20"}, ["--person -1 20 is not in the picture"]),
        ({"person": "60 40"}, ["--person chooses among faces", "without --mask, --box and --truth"]),
        ({"preset": "nosuch"}, ["unknown preset 'nosuch': choose one of paper, toy"]),
        ({"identity_box": "10,10,12,12"}, ["identity.png", "the head is 2x2 pixels", "at least 16"]),
        ({"identity": "@tiny.png"}, ["tiny.png", "the head is 1x1 pixels", "at least 16 pixels on each side"]),
        ({"landmarks": "points.jsonl"}, ["points.jsonl", "No such file", "--save-landmarks"]),
        ({"steps": 0}, ["sampling.steps", "0"]),
        ({"preset": "paper"}, ["weights of preset 'toy', not 'paper'", "--preset toy"]),
        ({"out": "out.avi"}, ["out.avi", ".mp4"]),
        ({"box": None, "truth": True, "scene": "@no_audio.mp4"}, ["no_audio.truth.npz", "no such truth file"]),
        (
            {"box": None, "detector_weights": "nowhere"},
            ["nowhere/face_landmarker.task (nowhere does not exist)", "--to FOLDER", "leave the option out", "lbp"],
        ),
    ],
)
def test_invalid_options_are_refused(
    broken: Path,
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    expected: list[str],
) -> None:
    given = {
        name: str(broken / value[1:]) if isinstance(value, str) and value.startswith("@") else value
        for name, value in changes.items()
    }
    with refused(capsys, tmp_path, *expected):
        main(arguments(**given))


@pytest.mark.parametrize("place", ["file/out.mp4", "file/below/out.mp4", "folder.mp4"])
def test_unwritable_outputs_are_refused(
    film: Path, arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """Tests may run as root, who may write anywhere but below a file."""
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    with refused(capsys, tmp_path, str(tmp_path / place)):
        main(arguments(out=tmp_path / place))
    with refused(capsys, tmp_path, str(tmp_path / place)):
        main(arguments(save_landmarks=tmp_path / place))
    if place != "folder.mp4":
        with refused(capsys, tmp_path, str(tmp_path / "file")):
            main(["preprocess", str(film), str((tmp_path / place).parent), "--backend", "truth"])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_unwritable_file_system_is_refused(
    film: Path, arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with refused(capsys, tmp_path, "/proc/out.mp4", "give a folder"):
        main(arguments(out="/proc/out.mp4"))
    with refused(capsys, tmp_path, "/proc/clips"):
        main(["preprocess", str(film), "/proc/clips", "--backend", "truth"])


HEADER = '{"tccp": "landmarks"}'
POINTS = [[0.5, 0.5]] * 68
LANDMARKS = {
    "far": ({"frame": 0, "points": [[0.5, 1e30], *POINTS[1:]]}, r"line 2: .*a point at 1e\+30: give points in 0..1"),
    "near": ({"frame": 0, "points": [[0.5, -2.1], *POINTS[1:]]}, "a point at -2.1"),
    "few": ({"frame": 0, "points": POINTS[1:]}, "68 finite pairs"),
    "unsure": ({"frame": 0, "points": POINTS, "confidence": 1e9}, r"confidence 1e\+09 is outside 0..1"),
    "when": ({"frame": 1.5, "points": POINTS}, "frame 1.5 is not a number of a frame"),
    "nan": ('{"frame": 0, "points": [[NaN, 0.5]]}', "NaN is not a number"),
    "huge": ('{"frame": 0, "points": [[1e400, 0.5]]}', "1e400 is too large"),
    "deep": ('{"frame": 0, "points": ' + "[" * 100_000, "levels deep"),
}


@pytest.mark.parametrize("name", LANDMARKS)
def test_bad_landmarks_are_refused_before_anything_is_loaded(
    broken: Path,
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    """The bad line is the last of the film, and there are no weights."""
    line, message = LANDMARKS[name]
    lines = [HEADER, line if isinstance(line, str) else json.dumps(line)]
    (tmp_path / "points.jsonl").write_text("\n".join(lines))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(arguments(landmarks=tmp_path / "points.jsonl", weights=tmp_path / "none"))
    assert re.search(message, one_line(capsys.readouterr().err))


# Weights


def _no_folder(folder: Path) -> str:
    shutil.rmtree(folder)
    return "manifest.json is missing"


def _a_file_instead(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.write_text("weights")
    return "cannot be read"


def _no_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "train one with"


def _manifest(change: Callable[[dict[str, Any]], object], expected: str) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))
        return expected

    return damage


def _manifest_cut(folder: Path) -> str:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:200])
    return "is damaged"


def _deep_manifest(folder: Path) -> str:
    (folder / "manifest.json").write_text('{"format": 1, "settings": ' + "[" * 100_000)
    return "is damaged (it is nested more than"


def _missing(folder: Path) -> str:
    next((folder / "face_first").glob("*.safetensors")).unlink()
    return "is missing: the pipeline folder is incomplete"


def _truncated(folder: Path) -> str:
    path = next((folder / "face_sequence").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:5000])
    return "SHA-256 differs"


def _config(folder: Path) -> str:
    (folder / "lips" / "config.json").write_text("{}")
    return "SHA-256 differs"


def _signed(component: str, damage: Callable[[Path], object], expected: str) -> Callable[[Path], str]:
    """Damage, with a manifest whose digests match the damaged files."""

    def apply(folder: Path) -> str:
        import hashlib

        damage(folder / component)
        manifest = json.loads((folder / "manifest.json").read_text())
        files = manifest["components"][component]["files"]
        for name in files:
            files[name] = hashlib.sha256((folder / component / name).read_bytes()).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return expected

    return apply


def _cut_weights(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:5000])


def _other_network(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "face_sequence", folder)


DAMAGE: dict[str, Callable[[Path], str]] = {
    "absent": _no_folder,
    "a file": _a_file_instead,
    "no manifest": _no_manifest,
    "manifest cut": _manifest_cut,
    "deep manifest": _deep_manifest,
    "huge picture": _manifest(lambda m: m["settings"].update(picture_px=10**200), "less than or equal to 4096"),
    "other format": _manifest(lambda m: m.update(format=99), "pipeline format 99; this version reads 1"),
    "no settings": _manifest(lambda m: m.pop("settings"), "is damaged"),
    "no components": _manifest(lambda m: m.update(components=[]), "is damaged"),
    "unknown setting": _manifest(lambda m: m["settings"].update(speed=1), "speed"),
    "other window": _manifest(lambda m: m["settings"].update(window=8), "num_frames is 4, but the settings in"),
    "other digest": _manifest(lambda m: m["components"]["lips"]["files"].update({"config.json": "0"}), "SHA-256"),
    "no component": _manifest(lambda m: m["components"].pop("face_first"), "has no face_first"),
    "missing": _missing,
    "truncated": _truncated,
    "config": _config,
    "signed network": _signed("face_first", _cut_weights, "face_first cannot be loaded"),
    "signed autoencoder": _signed("autoencoder", _cut_weights, "autoencoder"),
    "signed lips": _signed("lips", _cut_weights, "cannot be loaded"),
    "other network": _signed("landmark_sequence", _other_network, "condition_kinds is"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_weights_are_refused(
    weights: Path,
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    expected = DAMAGE[name](folder)
    with refused(capsys, tmp_path, str(folder), expected):
        main(arguments(weights=folder))


def test_unusable_detector_weights_are_refused(
    film: Path, arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "face_landmarker.task"
    path.write_bytes(b"no model")
    with refused(capsys, tmp_path, str(path), "not a usable"):
        main(arguments(box=None, detector_weights=path))
    with refused(capsys, tmp_path, str(path), "not a usable"):
        main(["preprocess", str(film), str(tmp_path / "clips"), "--weights", str(path)])
    with refused(capsys, tmp_path, "nowhere/face_landmarker.task", "nowhere does not exist", "leave the option out"):
        main(["preprocess", str(film), str(tmp_path / "clips"), "--weights", str(tmp_path / "nowhere")])


# Valid, with a warning


def test_silent_and_clipped_sound_gives_a_warning(
    arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, samples in {"silent": np.zeros(2000), "clipped": np.tile([1.0, -1.0], 1000)}.items():
        write_audio_wav(tmp_path / f"{name}.wav", samples)
        main(arguments(audio=tmp_path / f"{name}.wav", json=True))
        captured = capsys.readouterr()
        assert json.loads(captured.out)["frames"] == 4
        (line,) = [line for line in captured.err.splitlines() if line.startswith("tccp: ")]
        assert f"{name}.wav" in line and f"is {name}" in line


# In a process of its own


@pytest.mark.parametrize("name", ["text.mp4", "flipped.mp4"])
def test_generate_prints_a_one_line_error_in_its_own_process(
    broken: Path, arguments: Callable[..., list[str]], tmp_path: Path, name: str
) -> None:
    """Native libraries, above all decoders, print no lines of their own."""
    done = tccp(*arguments(scene=broken / name))
    assert done.returncode == 2
    assert done.stdout == ""
    assert str(broken / name) in one_line(done.stderr)
    assert not (tmp_path / "made" / "out.mp4").exists()


def test_preprocess_prints_a_one_line_error_in_its_own_process(
    broken: Path, shared_weights: Path, tmp_path: Path
) -> None:
    done = tccp("preprocess", broken / "no_face.mp4", tmp_path / "clips", "--weights", shared_weights)
    assert done.returncode == 2
    assert "no_face.mp4" in one_line(done.stderr)
    assert not files_below(tmp_path)
