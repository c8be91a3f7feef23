"""The fixed face probe: accuracy on true and blurred faces, refusal of bad input, reproducible training."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tccp.errors import TccpError
from tccp.evaluation.face_probe import (
    CANDIDATES,
    PROBE_FILE,
    PROBE_PX,
    FaceProbe,
    FaceSamples,
    augment,
    embed_identity,
    load_probe,
    probe_loss,
    read_faces,
    render_samples,
    save_probe,
    top1,
    train_probe,
)
from tccp.headbox import crop
from tccp.roundtable import RoundTableClip, synthesise

UNSEEN_SEED = 5_900_000  # used for neither training nor evaluation


def faces_of(clip: RoundTableClip, size_px: int = PROBE_PX, every: int = 2) -> np.ndarray:
    return np.stack([crop(clip.render(i), clip.head_box[i], size_px) for i in range(0, clip.num_frames, every)])


@pytest.fixture(scope="module")
def clips() -> list[RoundTableClip]:
    return [synthesise(UNSEEN_SEED + k, 2.0) for k in range(CANDIDATES)]


@pytest.fixture(scope="module")
def faces(clips) -> list[np.ndarray]:
    return [faces_of(clip) for clip in clips[:4]]


@pytest.fixture(scope="module")
def probe() -> FaceProbe:
    return load_probe()


@pytest.fixture(scope="module")
def samples() -> FaceSamples:
    return render_samples(6, 4, UNSEEN_SEED)


# -- readings of the packaged probe -----------------------------------------------------------------------------------


def test_probe_is_small(probe):
    assert sum(parameter.numel() for parameter in probe.parameters()) <= 600_000
    assert PROBE_FILE.stat().st_size <= 1.5e6


def test_probe_reads_mouth_and_yaw_of_unseen_people(probe, clips, faces):
    for clip, shown in zip(clips, faces, strict=False):
        reading = read_faces(probe, shown)
        assert np.corrcoef(reading.opening, clip.mouth_opening[::2])[0, 1] > 0.95
        assert reading.opening.std() == pytest.approx(clip.mouth_opening[::2].std(), rel=0.15)
        assert np.corrcoef(reading.width, clip.mouth_width[::2])[0, 1] > 0.8
        assert np.abs(reading.yaw_deg - clip.yaw_deg[::2]).mean() < 5


def test_probe_identifies_the_person_among_candidates(probe, clips, faces):
    candidates = embed_identity(probe, np.stack([clip.identity for clip in clips]))
    np.testing.assert_allclose(np.linalg.norm(candidates, axis=1), 1, atol=1e-5)
    right = [top1(read_faces(probe, shown).identity, candidates, k) for k, shown in enumerate(faces)]
    assert np.mean(right) > 0.9
    assert top1(read_faces(probe, faces[0]).identity, candidates, 5) < 0.1


def test_probe_reads_blurred_faces(probe, clips, faces):
    for clip, shown in zip(clips, faces, strict=False):
        soft = np.stack([cv2.resize(cv2.resize(f, (28, 28), interpolation=cv2.INTER_AREA), (64, 64)) for f in shown])
        reading = read_faces(probe, soft)
        assert np.corrcoef(reading.opening, clip.mouth_opening[::2])[0, 1] > 0.85
        assert np.abs(reading.yaw_deg - clip.yaw_deg[::2]).mean() < 8


def test_mirroring_a_face_negates_its_yaw(probe, faces):
    reading, mirrored = (read_faces(probe, f) for f in (faces[0], np.ascontiguousarray(faces[0][:, :, ::-1])))
    assert np.abs(reading.yaw_deg + mirrored.yaw_deg).mean() < 6


def test_mouth_reading_does_not_depend_on_head_motion(probe, clips):
    clip = clips[0]
    still = clip.with_head(mouth_opening=np.full(clip.num_frames, 0.4, np.float32))
    reading = read_faces(probe, faces_of(still))
    assert np.abs(reading.opening - 0.4).mean() < 0.06
    assert reading.opening.std() < 0.3 * read_faces(probe, faces_of(clip)).opening.std()


def test_pictures_of_another_size_are_resized(probe, clips, faces):
    large, small = read_faces(probe, faces_of(clips[1], 128)), read_faces(probe, faces[1])
    assert np.abs(large.opening - small.opening).mean() < 0.05
    assert np.abs(large.yaw_deg - small.yaw_deg).mean() < 3
    assert len(read_faces(probe, faces_of(clips[1], 32)).features) == len(faces[1])


def test_frames_are_read_independently(probe, faces):
    together, alone = read_faces(probe, faces[2]), read_faces(probe, faces[2][3:4])
    np.testing.assert_allclose(together.features[3:4], alone.features, atol=1e-4)
    np.testing.assert_allclose(together.yaw_deg[3:4], alone.yaw_deg, atol=1e-3)


def test_empty_input_is_refused(probe):
    with pytest.raises(TccpError, match="at least one frame"):
        read_faces(probe, np.empty((0, 64, 64, 3), np.uint8))


def test_top1_is_the_share_of_frames():
    candidates = np.eye(3, dtype=np.float32)
    identity = np.array([[0.9, 0.1, 0], [0.9, 0.4, 0], [0.2, 0.9, 0], [0, 0.2, 0.9]], np.float32)
    assert [top1(identity, candidates, k) for k in range(3)] == [0.5, 0.25, 0.25]


# -- files ------------------------------------------------------------------------------------------------------------


def test_probe_round_trips_through_a_file(tmp_path):
    probe = FaceProbe().eval()
    save_probe(probe, tmp_path / "p.safetensors", {"seed": "0"})
    again = load_probe(tmp_path / "p.safetensors")
    pictures = torch.rand(2, 3, 64, 64)
    for one, other in zip(probe(pictures), again(pictures), strict=True):
        torch.testing.assert_close(one, other, atol=5e-3, rtol=0)


def test_missing_or_invalid_probe_file_is_named_in_the_error(tmp_path):
    with pytest.raises(TccpError, match=r"no probe at .*p\.safetensors.*python -m tccp\.evaluation\.train_face_probe"):
        load_probe(tmp_path / "p.safetensors")
    (tmp_path / "q.safetensors").write_bytes(b"not weights")
    with pytest.raises(TccpError, match=r"q\.safetensors is no probe"):
        load_probe(tmp_path / "q.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "r.safetensors")
    with pytest.raises(TccpError, match=r"r\.safetensors is no probe"):
        load_probe(tmp_path / "r.safetensors")


# -- training ---------------------------------------------------------------------------------------------------------


def test_training_is_reproducible_and_reduces_the_loss(samples):
    losses: list[float] = []
    first = train_probe(samples, 30, 0, lambda step, loss: losses.append(loss))
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    short, again, other = (train_probe(samples, 2, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(short[name], again[name]) for name in short)
    assert not torch.equal(short["pose.weight"], other["pose.weight"])
    assert not first.training


def test_samples_have_their_truth_and_a_margin(samples):
    assert samples.faces.shape == (6, 4, 72, 72, 3)
    clip = synthesise(UNSEEN_SEED, 2.0)
    # Without its margin, every second face equals a frame of the clip.
    distance = np.abs(faces_of(clip, every=1).astype(int) - samples.faces[0, 1, 4:-4, 4:-4]).mean(axis=(1, 2, 3))
    frame = int(distance.argmin())
    assert distance[frame] < 4
    truth = clip.mouth_opening[frame], clip.mouth_width[frame], clip.yaw_deg[frame] / 45
    np.testing.assert_allclose(samples.pose[0, 1], truth, atol=0.15)
    again = render_samples(1, 4, UNSEEN_SEED)
    assert np.array_equal(again.faces[0], samples.faces[0])
    assert not np.array_equal(samples.identities[0], samples.identities[1])


def test_augmented_pictures_keep_their_size_and_range(samples):
    pictures = torch.from_numpy(samples.faces.reshape(-1, 72, 72, 3)).movedim(-1, 1).float() / 127.5 - 1
    one, again, other = (augment(pictures, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert one.shape == (24, 3, 64, 64)
    assert one.abs().max() <= 1.2  # pictures that are only blurred may overshoot a little
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    # The augmentation moves the face only a little.
    assert torch.nn.functional.l1_loss(one, pictures[:, :, 4:-4, 4:-4]) < 0.25


def test_loss_is_low_for_the_correct_reading_and_person():
    truth = torch.rand(6, 3)
    people = torch.eye(3)
    faces = people[:, None].expand(3, 2, 3)
    right = probe_loss(truth, truth, faces, people)
    assert right < 1e-3
    assert probe_loss(truth + 0.1, truth, faces, people) > right + 0.1
    assert probe_loss(truth, truth, faces.roll(1, 0), people) > 1
