"""Light-ASD: published layout and numbers, bounded memory, and scores of real faces."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional

from preprocessing.reels import chip_box
from tccp.config import SAMPLES_PER_FRAME
from tccp.errors import TccpError
from tccp.faces import MediapipeBackend
from tccp.media import open_audio, read_frames
from tccp.models import light_asd
from tccp.models.light_asd import LightAsd, load_light_asd
from tccp.models.mfcc import mfcc

# The published network: (in, out) channels of each encoder's blocks, and the first letter of its kernel names.
BLOCKS = ((1, 32), (32, 64), (64, 128))
ENCODERS = {"visualEncoder": "s", "audioEncoder": "m"}


def _kernel(letter: str, k: int) -> tuple[int, ...]:
    return {"s": (1, k, k), "m": (k, 1), "t3": (k, 1, 1), "t2": (1, k)}[letter]


def _published_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for encoder, first in ENCODERS.items():
        along = "t3" if first == "s" else "t2"
        for number, (c_in, c_out) in enumerate(BLOCKS, 1):
            convs = {"last": (c_out, c_out, *_kernel(first, 1))}
            for k in (3, 5):
                convs[f"{first}_{k}"] = (c_out, c_in, *_kernel(first, k))
                convs[f"t_{k}"] = (c_out, c_out, *_kernel(along, k))
            for name, shape in convs.items():
                prefix = f"model.{encoder}.block{number}"
                shapes[f"{prefix}.{name}.weight"] = shape
                for part in ("weight", "bias", "running_mean", "running_var"):
                    shapes[f"{prefix}.bn_{name}.{part}"] = (c_out,)
                shapes[f"{prefix}.bn_{name}.num_batches_tracked"] = ()
    for way in ("forward", "backward"):
        for part, shape in (("weight", (384, 128)), ("bias", (384,))):
            shapes |= {f"model.GRU.gru_{way}.{part}_{side}_l0": shape for side in ("ih", "hh")}
    for head in ("lossAV", "lossV"):
        shapes |= {f"{head}.FC.weight": (2, 128), f"{head}.FC.bias": (2,)}
    return shapes


@pytest.fixture(scope="module")
def network() -> LightAsd:
    """Random weights, and batch-norm statistics that differ from the initial ones."""
    torch.manual_seed(0)
    network = LightAsd()
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(0.2 * torch.rand_like(buffer) + (0.9 if name.endswith("var") else -0.1))
    return network.eval()


def _track(frames: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    pcm = rng.normal(0, 2000, frames * SAMPLES_PER_FRAME).astype(np.int16)
    return pcm, rng.integers(0, 256, (frames, 112, 112), dtype=np.uint8)


def test_layout_matches_the_published_network():
    network = LightAsd()
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == _published_shapes()
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_021_636


def test_scores_match_an_independent_implementation(network: LightAsd) -> None:
    pcm, chips = _track(6)
    cepstra = torch.from_numpy(mfcc(np.pad(pcm, (0, 240))))
    state = network.state_dict()

    def encode(encoder: str, x: torch.Tensor) -> torch.Tensor:
        conv, pool, strides, window, step = (
            (functional.conv3d, functional.max_pool3d, (1, 2, 2), (1, 3, 3), (1, 2, 2))
            if encoder == "visualEncoder"
            else (functional.conv2d, functional.max_pool2d, (1, 1), (1, 3), (1, 2))
        )
        for number in (1, 2, 3):
            prefix = f"model.{encoder}.block{number}"

            def layer(name: str, x: torch.Tensor, stride: tuple[int, ...], prefix: str = prefix) -> torch.Tensor:
                weight = state[f"{prefix}.{name}.weight"]
                x = conv(x, weight, stride=stride, padding=tuple(k // 2 for k in weight.shape[2:]))
                mean, var, weight, bias = (
                    state[f"{prefix}.bn_{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
                )
                return functional.batch_norm(x, mean, var, weight, bias, eps=0.001).clamp(min=0)

            if number > 1:
                x = pool(x, window, step, tuple(k // 2 for k in window))
            ones = (1,) * len(strides)
            first = ENCODERS[encoder]
            branches = [
                layer(f"t_{k}", layer(f"{first}_{k}", x, strides if number == 1 else ones), ones) for k in (3, 5)
            ]
            x = layer("last", branches[0] + branches[1], ones)
        return x.amax((-1, -2)).transpose(1, 2) if x.ndim == 5 else x.mean(2).transpose(1, 2)

    faces = (torch.from_numpy(chips).float() / 255 - 0.4161) / 0.1688
    x = encode("audioEncoder", cepstra.T[None, None]) + encode("visualEncoder", faces[None, None])
    for way, flips in (("forward", False), ("backward", True)):
        cell = torch.nn.GRU(128, 128, batch_first=True)
        prefix = f"model.GRU.gru_{way}."
        cell.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        y = cell(x.flip(1) if flips else x)[0]
        x = functional.gelu(y.flip(1) if flips else y)
    wanted = (x @ state["lossAV.FC.weight"].T + state["lossAV.FC.bias"])[0, :, 1]
    # Six frames fit in one window and are encoded at once.
    np.testing.assert_allclose(network.score(pcm, chips), wanted.detach().numpy(), atol=1e-5)
    with torch.no_grad():
        logits = network(cepstra[None], torch.from_numpy(chips).float()[None])
    np.testing.assert_allclose(logits[0].numpy(), wanted.detach().numpy(), atol=1e-5)


def test_scoring_in_parts_equals_scoring_at_once(network: LightAsd, monkeypatch: pytest.MonkeyPatch) -> None:
    pcm, chips = _track(40)
    monkeypatch.setattr(light_asd, "_PART_FRAMES", 40)
    whole = network.score(pcm, chips)
    monkeypatch.setattr(light_asd, "_PART_FRAMES", 13)
    monkeypatch.setattr(light_asd, "_WINDOWS_AT_ONCE", 2)
    np.testing.assert_allclose(network.score(pcm, chips), whole, atol=1e-5)
    assert whole.std() > 1e-4


def test_score_does_not_depend_on_input_seconds_away(network: LightAsd) -> None:
    pcm, chips = _track(70)
    other_pcm, other_chips = pcm.copy(), chips.copy()
    other_pcm[58 * SAMPLES_PER_FRAME :] //= 7
    other_chips[58:] = 0
    changed = np.abs(network.score(pcm, chips) - network.score(other_pcm, other_chips))
    # A window of 25 frames reaches up to 24 frames back, and the encoders reach 6 more.
    assert changed[:28].max() < 1e-5 < changed[38:].max()


def test_empty_short_and_mismatched_tracks(network: LightAsd) -> None:
    assert network.score(*_track(0)).shape == (0,)
    assert np.isfinite(network.score(*_track(1))).all()
    with pytest.raises(ValueError, match="1280 samples for 3 frames: give 640 per frame"):
        network.score(_track(2)[0], _track(3)[1])


def test_good_checkpoint_loads_and_bad_ones_give_a_one_line_error(network: LightAsd, tmp_path: Path) -> None:
    state = network.state_dict()
    good = tmp_path / "good.model"
    torch.save({f"module.{name}": value for name, value in state.items()}, good)
    pcm, chips = _track(3)
    assert np.array_equal(load_light_asd(good).score(pcm, chips), network.score(pcm, chips))

    def assert_refused(content: object, message: str) -> None:
        path = tmp_path / "bad.model"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(TccpError, match=message) as error:
            load_light_asd(path)
        assert "\n" not in str(error.value) and "finetuning_TalkSet" in str(error.value)

    with pytest.raises(TccpError, match=r"nowhere\.model: no such file"):
        load_light_asd(tmp_path / "nowhere.model")
    assert_refused(b"<html>not found</html>", "not a readable state dict")
    assert_refused(Path, "not a readable state dict")  # a pickle of anything but tensors is not executed
    assert_refused([1, 2], "holds no state dict")
    assert_refused({"epoch": 3}, "holds no state dict")
    short = {name: value for name, value in state.items() if "lossV." not in name}
    assert_refused(short, r"tensors are missing, e\.g\. lossV\.FC\.")
    assert_refused({**state, "extra": torch.zeros(2)}, r"1 unknown tensors, e\.g\. extra")
    assert_refused({**state, "lossAV.FC.bias": torch.zeros(3)}, r"lossAV\.FC\.bias has shape \(3,\), not \(2,\)")


def _chips(film: Path, weights: Path, leftmost: bool, start: int, count: int) -> np.ndarray:
    """The central part of one face's chip in each frame, in grey."""
    detector = MediapipeBackend(weights / "face_landmarker.task")
    try:
        chips = []
        for picture in read_frames(film, start, count):
            faces = sorted(detector.detect(picture), key=lambda face: face.box[0])
            x0, y0, x1, y1 = chip_box(faces[0 if leftmost else -1].box)
            step = (x1 - x0) / 224
            matrix = np.array([[step, 0, (x0 + x1) / 2 - 56 * step], [0, step, (y0 + y1) / 2 - 56 * step]])
            grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
            chips.append(cv2.warpAffine(grey, matrix, (112, 112), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP))
    finally:
        detector.close()
    return np.stack(chips)


def _pcm(film: Path, start: int, count: int) -> np.ndarray:
    with open_audio(film) as audio:
        part = np.array(audio.samples[start * SAMPLES_PER_FRAME : (start + count) * SAMPLES_PER_FRAME])
    return np.round(np.pad(part, (0, count * SAMPLES_PER_FRAME - len(part))) * 32767).astype(np.int16)


def test_talking_mouth_scores_higher_than_a_still_one(shared_clips: Path, shared_weights: Path) -> None:
    network = load_light_asd(shared_weights / "light_asd_finetuning_TalkSet.model")
    film = shared_clips / "two_person_turns.mp4"
    # The right-hand person speaks from frame 74 on and is still before. Both parts contain speech.
    still = _chips(film, shared_weights, leftmost=False, start=25, count=25)
    assert -3.0 < network.score(_pcm(film, 25, 25), still).mean() < -0.5
    talking = _chips(film, shared_weights, leftmost=False, start=95, count=25)
    assert 2.5 < network.score(_pcm(film, 95, 25), talking).mean() < 7.0
    # The network scores the mouth, not its match with the sound: silence changes little.
    assert network.score(np.zeros(25 * SAMPLES_PER_FRAME, np.int16), talking).mean() > 1.5
